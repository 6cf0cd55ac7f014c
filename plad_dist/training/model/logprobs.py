"""Log-probabilities of given tokens from hidden states, without ever holding ``[tokens, vocabulary]``.

Shapes: N predicted tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Of one chunk's logits. For every chunk the weight is read and its gradient written, which takes a GPU longer chunks to hide.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_GPU = 1 << 24, 1 << 26


class LogprobHead(nn.Module):
    """Takes the place of a model's output layer: hidden states and targets in, log-probabilities of the targets out.

    It is a module of its own, called once per micro-batch on every rank, so that ZeRO-3 gathers its weight for exactly
    as long as it is needed. The parameters are those of the layer it replaces, tied or not.

    Args:
        scale: factor on the logits (Cohere, Granite).
        softcap: the logits are ``softcap * tanh(logits / softcap)`` (Gemma); None for none.
    """

    def __init__(self, layer: nn.Linear, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.scale, self.softcap = scale, softcap
        self.dtype = layer.weight.dtype  # asking the weight for it from outside would make ZeRO-3 gather it there

    def forward(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        return _TargetLogprobs.apply(hidden_NH, self.weight, self.bias, targets_N, self.scale, self.softcap)


class _TargetLogprobs(torch.autograd.Function):
    """Logits are made chunk by chunk, once forward and once more backward; only the normalisers are kept.

    Tokens whose log-probability has no gradient, those of pairs that the hinge already satisfies, are left out backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        logps_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        normalisers_N = torch.empty_like(logps_N)
        for part in _chunks(targets_N, weight_VH):
            logits_CV = _logits(hidden_NH[part], weight_VH, bias_V, scale, softcap)
            normalisers_N[part] = logits_CV.logsumexp(-1)
            logps_N[part] = logits_CV.gather(1, targets_N[part, None]).squeeze(1) - normalisers_N[part]
        ctx.save_for_backward(hidden_NH, targets_N, normalisers_N)
        # Not saved as tensors: ZeRO-3 swaps the storage of parameters between forward and backward.
        ctx.weight, ctx.bias, ctx.scale, ctx.softcap = weight_VH, bias_V, scale, softcap
        return logps_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        hidden_NH, targets_N, normalisers_N = ctx.saved_tensors
        weight_VH, bias_V, scale, softcap = ctx.weight, ctx.bias, ctx.scale, ctx.softcap
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        learns = ctx.needs_input_grad[1]
        # Sums over many chunks: in half precision small terms would be lost.
        exact = torch.promote_types(weight_VH.dtype, torch.float32)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=exact) if learns else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=exact) if learns and bias_V is not None else None
        active = grad_N.nonzero().squeeze(1)
        for part in _chunks(active, weight_VH):
            rows = active[part]
            hidden_CH, targets_C1, grad_C1 = hidden_NH[rows], targets_N[rows, None], grad_N[rows, None]
            logits_CV = _logits(hidden_CH, weight_VH, bias_V, scale, softcap)
            # d tanh-capped / d uncapped, from the capped value
            slope_CV = 1 - (logits_CV / softcap).square_() if softcap is not None else None
            # d logp / d logits = onehot(target) - softmax(logits)
            grad_CV = logits_CV.sub_(normalisers_N[rows, None]).exp_().mul_(-grad_C1)
            grad_CV.scatter_add_(1, targets_C1, grad_C1)
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            if scale != 1.0:
                grad_CV.mul_(scale)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_NH[rows] = grad_CV @ weight_VH
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_CV.T, hidden_CH)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        if grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None


def _logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    if _widens(weight_VH):  # as the sums are made, without rounding them to half precision first
        logits_CV = torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32)
        if bias_V is not None:
            logits_CV += bias_V
    else:
        logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float()
    if scale != 1.0:
        logits_CV.mul_(scale)
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


def _add_product(sum_AB: Tensor, left_AC: Tensor, right_CB: Tensor) -> None:
    """``sum += left @ right`` in the sum's precision."""
    if sum_AB.dtype == left_AC.dtype:
        sum_AB.addmm_(left_AC, right_CB)
    elif _widens(left_AC):
        torch.addmm(sum_AB, left_AC, right_CB, out_dtype=sum_AB.dtype, out=sum_AB)
    else:
        sum_AB += left_AC @ right_CB


def _widens(tensor: Tensor) -> bool:
    """Whether products of such tensors can be had in float32."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _chunks(tokens_N: Tensor, weight_VH: Tensor) -> list[slice]:
    elements = _CHUNK_ELEMENTS_GPU if tokens_N.device.type == "cuda" else _CHUNK_ELEMENTS
    size = max(1, elements // len(weight_VH))
    return [slice(start, min(start + size, len(tokens_N))) for start in range(0, len(tokens_N), size)]
