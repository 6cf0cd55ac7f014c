"""Sizes of models are computed without weights, from their configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config import Model, Student
from plad_dist.data.models import load_model_config
from plad_dist.data.templates import load_tokenizer
from plad_dist.errors import UserError
from plad_dist.planning.sizes import size_of


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("EleutherAI/gpt-neo-125m", 125_198_592),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560),
    ],
)
def test_parameters_are_counted_without_weights(name: str, parameters: int) -> None:
    assert size_of(Model(path=name)).parameters == parameters


@pytest.mark.parametrize(("name", "active"), [("Qwen/Qwen3-30B-A3B", 3.3e9), ("Qwen/Qwen3-235B-A22B", 22e9)])
def test_active_parameters_of_a_mixture_are_those_that_its_name_gives(name: str, active: float) -> None:
    """The look-up in the embeddings, which takes no arithmetic, is left out."""
    size = size_of(Model(path=name))
    lookup = size.vocabulary * size.hidden
    assert size.is_mixture
    assert size.active_parameters + lookup == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32_768),
        ({"rope_type": "linear", "factor": 2.0}, 16_384),
        (None, 8192),
    ],
)  # fmt: skip
def test_positions_are_counted_as_in_vllm_and_the_context_is_that_of_the_config(
    tmp_path: Path, rope: dict[str, Any] | None, positions: int
) -> None:
    architecture = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 64, "max_position_embeddings": 8192, "rope_theta": 10_000.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(architecture | ({"rope_scaling": rope} if rope else {})))
    size = size_of(Model(path=str(tmp_path)))
    assert (size.positions, size.context) == (positions, 8192)


def test_a_cut_student_has_the_parameters_of_its_layers_and_of_the_embeddings() -> None:
    whole = size_of(Model(path="meta-llama/Llama-3.1-8B"))
    cut = size_of(Student.model_validate({"from": {"path": "meta-llama/Llama-3.1-8B", "layers": 12}}))
    assert (cut.layers, cut.layer_parameters, cut.context) == (12, whole.layer_parameters, whole.context)
    assert cut.parameters == whole.parameters - 20 * whole.layer_parameters
    assert cut.name == "meta-llama/Llama-3.1-8B, 12 of 32 layers"


def test_a_model_with_far_too_many_layers_is_refused_at_once(tmp_path: Path) -> None:
    architecture = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 100_000, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(architecture | {"vocab_size": 100, "intermediate_size": 64}))
    with pytest.raises(UserError, match="num_hidden_layers: 100,000, expected at most 1,000"):
        size_of(Model(path=str(tmp_path)))


def test_a_bad_value_in_a_model_config_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "abc"}))
    for load in (load_model_config, load_tokenizer):
        with pytest.raises(UserError, match=f"{tmp_path}: .*hidden_size"):
            load(str(tmp_path), Model(path=str(tmp_path)))
