"""Log-probabilities of given tokens from hidden states, without ever holding ``[tokens, vocabulary]``.

Shapes: N predicted tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_ELEMENTS = 1 << 25


class LogprobHead(nn.Module):
    """Takes the place of a model's output layer: hidden states and targets in, log-probabilities of the targets out.

    It is a module of its own, called once per micro-batch on every rank, so that ZeRO-3 gathers its weight for exactly
    as long as it is needed. The parameters are those of the layer it replaces, tied or not.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        return _TargetLogprobs.apply(hidden_NH, self.weight, self.bias, targets_N)


class _TargetLogprobs(torch.autograd.Function):
    """Logits are made chunk by chunk, once forward and once more backward; only the normalisers are kept."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        logps_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        normalisers_N = torch.empty_like(logps_N)
        for part in _chunks(len(targets_N), len(weight_VH)):
            logits_CV = _logits(hidden_NH[part], weight_VH, bias_V)
            normalisers_N[part] = logits_CV.logsumexp(-1)
            logps_N[part] = logits_CV.gather(1, targets_N[part, None]).squeeze(1) - normalisers_N[part]
        ctx.save_for_backward(hidden_NH, targets_N, normalisers_N)
        # Not saved as tensors: ZeRO-3 swaps the storage of parameters between forward and backward.
        ctx.weight, ctx.bias = weight_VH, bias_V
        return logps_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (grad_N,) = grads
        hidden_NH, targets_N, normalisers_N = ctx.saved_tensors
        weight_VH, bias_V = ctx.weight, ctx.bias
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH)
        grad_bias_V = torch.zeros_like(bias_V) if bias_V is not None else None
        for part in _chunks(len(targets_N), len(weight_VH)):
            # d logp / d logits = onehot(target) - softmax(logits)
            logits_CV = _logits(hidden_NH[part], weight_VH, bias_V)
            grad_CV = (logits_CV - normalisers_N[part, None]).exp_().mul_(-grad_N[part, None])
            grad_CV.scatter_add_(1, targets_N[part, None], grad_N[part, None])
            grad_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_NH[part] = grad_CV @ weight_VH
            grad_weight_VH.addmm_(grad_CV.T, hidden_NH[part])
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None


def _logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float()


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
