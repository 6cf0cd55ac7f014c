"""Small random models of every tested family, and their log-likelihoods of separate sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from plad_dist.data.models import model_class
from plad_dist.training.batches.micro_batch import Group, single_pair

GROUPS = [
    single_pair([5, 6, 7, 8, 9], [10, 11, 12, 2], [20, 21, 2]),
    single_pair([4], [30, 2], [31, 32, 33, 34, 2]),
    Group([9, 8, 7], [[40], [41, 42], [43, 44, 45], [46, 2]], pairs=[(0, 2, 1), (1, 3, 1)], anchored=(0, 1)),
    single_pair(list(range(3, 40)), list(range(40, 60)), list(range(50, 62))),
]
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97, "intermediate_size": 48,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97, "ffn_dim": 48,
    "max_position_embeddings": 128, "word_embed_proj_dim": 16,
}  # fmt: skip
NEO = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 97, "intermediate_size": 48,
    "max_position_embeddings": 128,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "vocab_size": 97,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 97,
    "max_position_embeddings": 64, "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GEMMA4 = {
    "global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 97,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SHAPE),
    "llama, untied, biased": ("llama", SHAPE | {"tie_word_embeddings": False, "attention_bias": True}),
    "mistral": ("mistral", SHAPE | {"sliding_window": None}),
    "mistral with a sliding window": ("mistral", SHAPE | {"sliding_window": 6}),
    "ministral3": (
        "ministral3",
        SHAPE | {"rope_parameters": {"type": "yarn", "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0,
                                     "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.5}},
    ),
    "mixtral": ("mixtral", SHAPE | EXPERTS | {"sliding_window": 6}),
    "qwen2": ("qwen2", SHAPE),
    "qwen2 with a sliding window": ("qwen2", SHAPE | SLIDING | {"use_sliding_window": True}),
    "qwen3": ("qwen3", SHAPE),
    "qwen2_moe": ("qwen2_moe", SHAPE | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("qwen3_moe", SHAPE | EXPERTS),
    "gemma": ("gemma", SHAPE),
    "gemma2": ("gemma2", SHAPE | SLIDING | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", SHAPE | SLIDING),
    "gemma3, multimodal": (
        "gemma3",
        {"text_config": SHAPE | SLIDING, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "gemma4": ("gemma4_text", SHAPE | SLIDING | GEMMA4),
    "gemma4 with shared keys and inputs per layer": (
        "gemma4_text",
        SHAPE | SLIDING | GEMMA4 | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                                    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    ),
    "gemma4, mixture": (
        "gemma4_text",
        SHAPE | SLIDING | GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                    "moe_intermediate_size": 16},
    ),
    "phi3": ("phi3", SHAPE | {"sliding_window": 6}),
    "olmo2": ("olmo2", SHAPE),
    "olmo3": ("olmo3", SHAPE | SLIDING),
    "smollm3": ("smollm3", SHAPE | {"no_rope_layers": [1, 0]}),
    "granite": ("granite", SHAPE | {"logits_scaling": 4.0}),
    "cohere": ("cohere", SHAPE | {"logit_scale": 0.25}),
    "cohere2": ("cohere2", SHAPE | SLIDING | {"logit_scale": 0.25}),
    "gpt_neox": ("gpt_neox", SHAPE),
    "gpt_neo": ("gpt_neo", NEO | {"attention_types": [[["global"], 2]]}),
    "gpt_neo, local": ("gpt_neo", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 100}),
    "gpt_neo, windows shorter than rows": (
        "gpt_neo", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "opt": ("opt", OPT),
    "glm4": ("glm4", SHAPE),
    "exaone4": ("exaone4", SHAPE | SLIDING | {"sliding_window_pattern": 2}),
    "gpt_oss": ("gpt_oss", SHAPE | SLIDING | EXPERTS),
    "deepseek_v3": ("deepseek_v3", SHAPE | LATENT),
    "qwen3_5": ("qwen3_5_text", SHAPE | LINEAR),
    "qwen3_next": ("qwen3_next", SHAPE | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "falcon_h1": (
        "falcon_h1",
        SHAPE | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
                 "mamba_chunk_size": 16},
    ),
    "nemotron_h": (
        "nemotron_h",
        SHAPE | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
                 "layers_block_type": ["mamba", "attention"]},
    ),
    "llama4": (
        "llama4_text",
        SHAPE | EXPERTS | {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16,
                           "intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "floor_scale": 8},
    ),
    "t5": ("t5", T5),
    "t5, untied, gated": ("t5", T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", T5),
    "umt5": ("umt5", T5),
    "bart": ("bart", BART),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97}),
}  # fmt: skip


def config_of(name: str) -> Any:
    """Return the transformers config of a small model."""
    model_type, shape = FAMILIES[name]
    return AutoConfig.for_model(model_type, **shape)


def make(name: str, implementation: str | None = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Return a small random model whose logits are large enough for soft caps to matter."""
    torch.manual_seed(0)
    config = config_of(name)
    text = config.get_text_config()
    text.initializer_range = config.initializer_range = 0.3
    config.init_std = 0.3  # BART
    if dtype == torch.float64:
        text._experts_implementation = "eager"  # the others have no float64
    model = model_class(config).from_config(config, dtype=torch.float32, attn_implementation=implementation)
    if config.model_type == "bart":
        model.final_logits_bias.normal_()
    return model.to(dtype).eval()


def separate_logps(model: Any, groups: list[Group]) -> Tensor:
    """Return the log-likelihood of every response, from forward passes of separate sequences."""
    sums = []
    for group in groups:
        for response in group.responses:
            if model.config.is_encoder_decoder:
                decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
                logits = model(torch.tensor([group.prompt]), decoder_input_ids=decoder_ids, use_cache=False).logits[0]
            else:
                ids = torch.tensor([[*group.prompt, *response]])
                logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
            sums.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)
