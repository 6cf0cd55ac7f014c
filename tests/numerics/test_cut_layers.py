"""A cut model computes what the original computes without the layers that were left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plad_dist.training.cut.config import built_exactly
from plad_dist.training.cut.weights import copy_weights
from plad_dist.training.model.meta import decoder_layers

LAYERS = (0, 1, 3, 5)
_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = {"sliding_window": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": _WINDOW | {"use_sliding_window": True, "max_window_layers": 3},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]], "window_size": 4},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "llama4_text": _EXPERTS | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "pad_token_id": 0},
    "deepseek_v3": _EXPERTS
    | {
        "n_routed_experts": 8, "first_k_dense_replace": 3, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip


def types_of(config: Any) -> list[str] | None:
    """Return the kind of attention of each layer, if the family has several."""
    return getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)


def without_layers(model: Any, kept: tuple[int, ...]) -> Any:
    """Remove layers from a model by hand, and tell those that remain their new places."""
    name, layers = decoder_layers(model)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList([layers[number] for number in kept]))
    for place, number in enumerate(kept):
        for module in layers[number].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number] for number in kept]
        config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_original_without_the_other_layers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_SMALL | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    cut_config, original, built = built_exactly(config, LAYERS, remote=False)
    target = tmp_path / "cut"
    cut_config.save_pretrained(target)
    copy_weights(tmp_path, original, built, LAYERS, target)

    cut, loading = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True, dtype=torch.float32)
    assert not any(loading.values())
    if types := types_of(config):
        assert types_of(cut.config) == [types[number] for number in LAYERS]
    original = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = 3 + torch.arange(24).view(2, 12) * 7 % 90
    logits = cut(ids, use_cache=False).logits
    assert not torch.allclose(logits, original(ids, use_cache=False).logits, atol=1e-3)
    assert torch.equal(logits, without_layers(original, LAYERS)(ids, use_cache=False).logits)
