"""Loading of weights in place of transformers; tests/numerics tests it under ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_dist.compat.pretrained import BuiltModel, weights_loaded_by
from tests.tiny import make_random_model


def test_without_zero3_transformers_loads_the_weights_and_the_function_is_removed_afterwards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    before = PreTrainedModel._load_pretrained_model

    def load(_: BuiltModel) -> set[str] | None:
        raise AssertionError("is only called under ZeRO-3")

    with weights_loaded_by(load):
        assert PreTrainedModel._load_pretrained_model is not before
        model = AutoModelForCausalLM.from_pretrained(make_random_model(tmp_path))
    assert float(model.get_input_embeddings().weight.detach().abs().sum()) > 0
    with pytest.raises(KeyError), weights_loaded_by(load):
        raise KeyError
    assert PreTrainedModel._load_pretrained_model is before
