"""Model families: in which rows of tokens their log-likelihoods are exact.

The model types below are tested, packed rows against separate sequences in float64. Any other type
is probed (:mod:`~plad_dist.training.model.probe`) by a small random model of its kind. The driver
does this once; the workers get the result.
"""

from __future__ import annotations

from typing import Any

from plad_dist.training.batches.micro_batch import RowSupport
from plad_dist.training.model.probe import probe

TESTED: dict[str, RowSupport] = {
    **dict.fromkeys(
        (
            "cohere", "cohere2", "deepseek_v3", "exaone4", "gemma", "gemma3", "gemma3_text", "gemma4_text", "glm4",
            "gpt_neo", "gpt_neox", "granite", "llama", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "opt",
            "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "mt5", "t5", "umt5",
        ),
        "tree",
    ),
    "gpt_oss": "scores",
    "gemma2": "scores",
    **dict.fromkeys(("bart", "falcon_h1", "llama4_text", "nemotron_h", "qwen3_5_text", "qwen3_next"), "sequences"),
}  # fmt: skip


# Families of the table in which all layers have the window that the config names.
_WINDOWED = ("mistral", "mixtral", "phi3", "qwen3_moe")


def row_support(config: Any, *, remote: bool) -> RowSupport:
    """Return in which rows the log-likelihoods of a model are exact.

    Args:
        config: transformers config of the model.
        remote: the model may run code of its repository.

    Raises:
        UserError: the model is of an untested type, and its probe fails.
    """
    return tested_support(config) or probe(config, remote=remote)


def tested_support(config: Any) -> RowSupport | None:
    """Return in which rows a model is exact by the table, or None if the tests do not cover it."""
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ())
    has_unknown_window = getattr(text, "sliding_window", None) and not layer_types and text.model_type not in _WINDOWED
    is_known = (
        type(config).__module__.startswith("transformers.")
        and not getattr(text, "use_bidirectional_attention", None)
        and not has_unknown_window
    )
    support = TESTED.get(config.model_type) if is_known else None
    has_plain_layers = layer_types <= {"full_attention", "sliding_attention"}
    return support if support == "sequences" or has_plain_layers else None
