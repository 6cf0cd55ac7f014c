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
            "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
        ),
        "tree",
    ),
    "gpt_oss": "scores",
    "gemma2": "scores",
    **dict.fromkeys(("falcon_h1", "llama4_text", "nemotron_h", "qwen3_5_text", "qwen3_next"), "sequences"),
}  # fmt: skip


def row_support(config: Any) -> RowSupport:
    """Return in which rows the log-likelihoods of a model are exact.

    Args:
        config: transformers config of the model.

    Raises:
        UserError: the model is of an untested type, and its probe fails.
    """
    is_of_transformers = type(config).__module__.startswith("transformers.")
    support = TESTED.get(config.model_type) if is_of_transformers else None
    if support == "tree" and not _has_plain_layers(config):
        support = None
    return support or probe(config)


def _has_plain_layers(config: Any) -> bool:
    """Return True if the layers have full attention or a sliding window, as in the tests."""
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    return set(layer_types) <= {"full_attention", "sliding_attention"}
