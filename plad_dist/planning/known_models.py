"""Published configs of models that runs often name, for planning without the hub."""

from __future__ import annotations

from typing import Any


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": context, "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen2(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    # Base models of most sizes have four times the positions of their chat models. The larger
    # number refuses no run that would work.
    return {
        **_llama(hidden, mlp, layers, heads, kv_heads, vocabulary, 131_072), "model_type": "qwen2",
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        **_llama(hidden, mlp, layers, heads, 8, 151_936, 40_960), "model_type": "qwen3", "head_dim": 128,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen3_moe(hidden: int, expert: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **_llama(hidden, 3 * hidden, layers, heads, 4, 151_936, 40_960), "model_type": "qwen3_moe", "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert,
    }  # fmt: skip


def _gpt_neo(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neo", "hidden_size": hidden, "num_layers": layers, "num_heads": heads, "vocab_size": 50_257,
        "max_position_embeddings": 2048, "attention_types": [[["global", "local"], layers // 2]],
    }  # fmt: skip


_QWEN = {
    "0.5B": _qwen2(896, 4864, 24, 14, 2, 151_936, tied=True),
    "1.5B": _qwen2(1536, 8960, 28, 12, 2, 151_936, tied=True),
    "3B": _qwen2(2048, 11_008, 36, 16, 2, 151_936, tied=True),
    "7B": _qwen2(3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "14B": _qwen2(5120, 13_824, 48, 40, 8, 152_064, tied=False),
    "32B": _qwen2(5120, 27_648, 64, 40, 8, 152_064, tied=False),
    "72B": _qwen2(8192, 29_568, 80, 64, 8, 152_064, tied=False),
}
_QWEN3 = {
    "0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "8B": _qwen3(4096, 12_288, 36, 32, tied=False),
    "14B": _qwen3(5120, 17_408, 40, 40, tied=False),
    "32B": _qwen3(5120, 25_600, 64, 64, tied=False),
    "30B-A3B": _qwen3_moe(2048, 768, 48, 32),
    "235B-A22B": _qwen3_moe(4096, 1536, 94, 64),
}
_LLAMA_3 = {
    "8B": _llama(4096, 14_336, 32, 32, 8, 128_256, 131_072),
    "70B": _llama(8192, 28_672, 80, 64, 8, 128_256, 131_072),
}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "EleutherAI/gpt-neo-125m": _gpt_neo(768, 12, 12),
    "EleutherAI/gpt-neo-1.3B": _gpt_neo(2048, 24, 16),
    "EleutherAI/gpt-neo-2.7B": _gpt_neo(2560, 32, 20),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11_008, 32, 32, 32, 32_000, 4096),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 13_824, 40, 40, 40, 32_000, 4096),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 28_672, 80, 64, 8, 32_000, 4096),
    **{f"meta-llama/Llama-3.1-{size}{kind}": shape for size, shape in _LLAMA_3.items() for kind in ("", "-Instruct")},
    **{f"Qwen/Qwen3-{size}": shape for size, shape in _QWEN3.items()},
    **{f"Qwen/Qwen2.5-{size}": shape for size, shape in _QWEN.items()},
    **{f"Qwen/Qwen2.5-{size}-Instruct": shape | {"max_position_embeddings": 32_768} for size, shape in _QWEN.items()},
}
