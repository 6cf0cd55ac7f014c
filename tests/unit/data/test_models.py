"""Pretrained models: the context and the sampling parameters that their configs state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config import Model, RewardModel
from plad_dist.data.models import check_max_length, generation_defaults
from plad_dist.errors import UserError


def model_folder(folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> str:
    """Write the configs of a model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32} | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


def test_max_length_beyond_the_context_of_a_model_is_refused(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", max_position_embeddings=512)
    for settings in (Model(path=path, max_length=513), RewardModel(path=path, max_length=513)):
        with pytest.raises(UserError, match=r"student.max_length: 513: .* has a context of 512 tokens"):
            check_max_length(path, settings, "student")
    for settings in (Model(path=path, max_length=512), Model(path=path), RewardModel(path=path)):
        check_max_length(path, settings, "student")


def test_an_extended_context_counts_as_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    path = model_folder(tmp_path / "model", max_position_embeddings=131072, rope_scaling=rope)
    check_max_length(path, Model(path=path, max_length=131072), "student")


def test_a_model_without_a_context_length_is_not_checked(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", model_type="bloom")
    check_max_length(path, Model(path=path, max_length=1 << 20), "student")


def test_the_sampling_parameters_of_a_generation_config_are_read(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1, 2], "do_sample": True}
    path = model_folder(tmp_path / "a", generation)
    assert generation_defaults(path, Model(path=path)) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    path = model_folder(tmp_path / "b")
    assert generation_defaults(path, Model(path=path)) == {}
