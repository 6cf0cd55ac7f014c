"""Models that the engine of transformers refuses to load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from plad_dist.config import Model
from plad_dist.errors import UserError
from plad_dist.sampling.generation.engine import TransformersEngine
from tests.tiny import TEMPLATE
from tests.tiny_generators import make_generator


def test_weights_in_a_pickle_are_not_loaded(tmp_path: Path) -> None:
    folder = make_generator(tmp_path / "model", "t5")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load this model"):
        TransformersEngine(str(folder), Model(path=str(folder), template=TEMPLATE), {})


def test_an_encoder_decoder_needs_the_token_with_which_responses_begin(tmp_path: Path) -> None:
    folder = make_generator(tmp_path / "model", "t5")
    config = AutoConfig.from_pretrained(folder)
    config.decoder_start_token_id = None
    config.save_pretrained(folder)
    with pytest.raises(UserError, match="decoder_start_token_id"):
        TransformersEngine(str(folder), Model(path=str(folder), template=TEMPLATE), {})


def test_a_model_whose_files_lack_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills them with random numbers, others in each engine."""
    folder = make_generator(tmp_path / "llama", "llama")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its files lack \d+ weights of the model, such as model.layers.1"):
        TransformersEngine(str(folder), Model(path=str(folder), template=TEMPLATE), {})


def test_a_weight_of_another_shape_is_an_error_of_the_user(tmp_path: Path) -> None:
    folder = make_generator(tmp_path / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(UserError, match="transformers cannot load this model"):
        TransformersEngine(str(folder), Model(path=str(folder), template=TEMPLATE), {})
