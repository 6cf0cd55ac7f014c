"""What vLLM calls in every process of an engine: the entry point `vllm.general_plugins`."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the families that it has none of; the model is imported when it is used."""
    from vllm import ModelRegistry

    if "GPTNeoForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("GPTNeoForCausalLM", "plad_dist.sampling.vllm_models.gpt_neo:GPTNeoForCausalLM")
