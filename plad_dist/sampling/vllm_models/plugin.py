"""The entry point `vllm.general_plugins`, which vLLM calls in every process of an engine."""

from __future__ import annotations


def register() -> None:
    """Register the model families that vLLM does not include. They are imported on first use."""
    from vllm import ModelRegistry

    if "GPTNeoForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("GPTNeoForCausalLM", "plad_dist.sampling.vllm_models.gpt_neo:GPTNeoForCausalLM")
