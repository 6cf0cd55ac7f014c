"""The entry point `vllm.general_plugins`, which vLLM calls in every process of an engine."""

from __future__ import annotations

# Where vLLM finds the models of this project, by architecture.
MODELS = {"GPTNeoForCausalLM": "plad_dist.sampling.vllm_models.gpt_neo:GPTNeoForCausalLM"}


def register() -> None:
    """Register the model families that vLLM does not include. They are imported on first use."""
    from vllm import ModelRegistry

    for architecture, place in MODELS.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, place)
