"""Every rank loads its own slices of a model, and gets the bits that transformers would give it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests.numerics.workers import train

pytestmark = pytest.mark.engine

# Sizes are odd where an architecture allows it, so that the last rank's slice is padded.
_LLAMA = {
    "vocab_size": 101, "hidden_size": 15, "intermediate_size": 21, "num_hidden_layers": 2, "num_attention_heads": 1,
    "head_dim": 4,
}  # fmt: skip
_SMALL = {"vocab_size": 101, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", _LLAMA | {"tie_word_embeddings": False}),
    "sharded": ("llama", _LLAMA | {"tie_word_embeddings": False}),
    "tied": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "tied, and both in the file": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "gpt-neox": ("gpt_neox", _SMALL | {"intermediate_size": 24}),
    "opt": ("opt", _SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 12}),
    "of the base model": ("gpt2", {"vocab_size": 101, "n_embd": 12, "n_layer": 2, "n_head": 2}),
    "gpt-neo": ("gpt_neo", _SMALL | {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2}),
    "with a buffer": ("llama", _LLAMA),
    "mixture of experts": ("mixtral", _LLAMA | {"num_local_experts": 2, "num_key_value_heads": 1}),
    "without a weight": ("llama", _LLAMA | {"tie_word_embeddings": False}),
    "copies that differ": ("llama", _LLAMA | {"tie_word_embeddings": False}),
}  # fmt: skip
LEFT_TO_TRANSFORMERS = {"mixture of experts", "copies that differ"}


class LlamaWithBuffer(LlamaForCausalLM):
    """Llama with a buffer that is saved."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("steps", torch.zeros(3, 5))


def class_of(name: str) -> Any:
    return LlamaWithBuffer if name == "with a buffer" else AutoModelForCausalLM


def write_model(folder: Path, name: str, seed: int) -> None:
    family, shape = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **shape)
    model = LlamaWithBuffer(config) if name == "with a buffer" else AutoModelForCausalLM.from_config(config)
    for tensor in model.state_dict().values():
        tensor.normal_()
    saved = model.base_model if name == "of the base model" else model
    saved.save_pretrained(folder, max_shard_size="4KB" if name == "sharded" else "1GB")
    file = folder / "model.safetensors"
    if name == "tied, and both in the file":
        weights = load_file(file)
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    if name == "without a weight":
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, {"format": "pt"})


def compare(raw: dict[str, Any], _: str, __: int) -> None:
    """Load every model by transformers alone, by slices and for a checkpoint; compare them."""
    from transformers.integrations import HfDeepSpeedConfig

    from plad_dist.compat.deepspeed import parameters_not_broadcast
    from plad_dist.compat.pretrained import BuiltModel, weights_loaded_by
    from plad_dist.training.model.loading import load_weights

    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    for name, folder in raw["models"].items():
        for dtype in (torch.float32, torch.bfloat16):
            load = partial(class_of(name).from_pretrained, f"{folder}/{dist.get_rank()}", dtype=dtype)
            is_loaded: list[bool] = []

            def own_load(built: BuiltModel, from_checkpoint: bool, is_loaded: list[bool] = is_loaded) -> Any:
                names = load_weights(built, from_checkpoint=from_checkpoint)
                is_loaded.append(names is not None)
                return names

            torch.manual_seed(4)
            expected = load()
            for from_checkpoint in (False, True):
                torch.manual_seed(4)
                with parameters_not_broadcast(), weights_loaded_by(partial(own_load, from_checkpoint=from_checkpoint)):
                    actual = load()
                assert_same(name, expected, actual, weights=not from_checkpoint)
            assert is_loaded == [name not in LEFT_TO_TRANSFORMERS, name != "copies that differ"], name
    del zero3


def assert_same(name: str, expected: Any, actual: Any, *, weights: bool) -> None:
    from plad_dist.compat.deepspeed import own_partition

    assert [key for key, _ in actual.named_parameters()] == [key for key, _ in expected.named_parameters()], name
    for (key, wanted), parameter in zip(expected.named_parameters(), actual.parameters(), strict=True):
        (shape, start, elements), own = own_partition(wanted), own_partition(parameter)
        assert (own.shape, own.start, own.elements.dtype) == (shape, start, elements.dtype), (name, key)
        assert not weights or torch.equal(own.elements, elements), (name, key)
        assert parameter.requires_grad == wanted.requires_grad
    assert [key for key, _ in actual.named_buffers()] == [key for key, _ in expected.named_buffers()], name
    for (key, wanted), buffer in zip(expected.named_buffers(), actual.buffers(), strict=True):
        assert buffer.dtype == wanted.dtype, (name, key)
        assert torch.equal(buffer, wanted), (name, key)
    assert len(actual._weight_conversions) == len(expected._weight_conversions), name


def test_slices_are_bit_identical_with_what_transformers_loads(tmp_path: Path) -> None:
    """Names, shapes, ties, buffers and missing weights are those of transformers, at two ranks."""
    models = {name: str(tmp_path / str(number)) for number, name in enumerate(MODELS)}
    for name, folder in models.items():
        for rank in (0, 1):
            write_model(Path(folder, str(rank)), name, seed=rank if name == "copies that differ" else 0)
    assert len(list(Path(models["sharded"], "0").glob("*.safetensors"))) > 2
    train(tmp_path, {"models": models}, "", 2, work=compare)
