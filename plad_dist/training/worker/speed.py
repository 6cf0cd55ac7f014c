"""Speed of a step, compared with the peak of the device."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

import torch

from plad_dist.devices import gpu_of
from plad_dist.training.model.experts import is_routed, routed_share


class Speed:
    """Computes the rates of one worker's steps.

    Args:
        policy: the model; its parameters are counted once.
    """

    def __init__(self, policy: Any, device: torch.device) -> None:
        self._device = device
        head = policy.model.get_output_embeddings().weight
        sizes = {id(parameter): getattr(parameter, "ds_numel", parameter.numel()) for parameter in policy.parameters()}
        embeddings = policy.model.get_input_embeddings().weight
        # FLOPs per parameter and token: 2 forward, 2 for the gradient of the input, and 2 for that
        # of a trained weight. A token uses only some of the routed experts.
        share = routed_share(policy.model.config.get_text_config())
        flops = {
            id(parameter): (6 if parameter.requires_grad else 4) * (share if is_routed(name) else 1)
            for name, parameter in policy.named_parameters()
        }
        self._head = flops[id(head)] * sizes[id(head)]
        # The lookup in the embeddings takes no arithmetic. An encoder computes the prompts, its
        # decoder the responses.
        encoder: set[int] = set()
        if policy.model.config.is_encoder_decoder:
            encoder = {id(parameter) for parameter in policy.model.get_encoder().parameters()}
        body = sizes.keys() - {id(head), id(embeddings)}
        self._encoder = sum(flops[key] * sizes[key] for key in body & encoder)
        self._body = sum(flops[key] * sizes[key] for key in body - encoder)
        self._has_encoder = bool(encoder)
        self._peak = _peak_flops(device)

    def figures(self, sums: Mapping[str, float], seconds: float, workers: int) -> dict[str, float]:
        """Return the rates and the memory of a step.

        Model FLOPs are 6 for each active parameter and computed token (PaLM, Chowdhery et al. 2022,
        arXiv 2204.02311, appendix B), and for each predicted token in the output layer. Attention
        and recomputed activations do not count.

        Args:
            sums: sums of the step over all ranks (:class:`StepTotals`).
            seconds: duration of the step.
        """
        figures = {"tokens_per_s": sums["tokens"] / seconds, "groups_per_s": sums["groups"] / seconds}
        predicted = sums["chosen_tokens"] + sums["rejected_tokens"]
        if self._peak is not None:
            decoded = predicted if self._has_encoder else sums["tokens"]
            flops = self._encoder * (sums["tokens"] - decoded) + self._body * decoded + self._head * predicted
            figures["model_flops_utilisation"] = flops / seconds / (self._peak * workers)
        if self._device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        else:
            figures["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        return figures


def _peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOPs per second of a device, or None if unknown."""
    if device.type != "cuda":
        return None
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None
