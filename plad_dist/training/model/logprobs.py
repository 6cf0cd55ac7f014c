"""Log-probabilities of target tokens from hidden states, without a tensor of all logits ``[N, V]``.

Shape suffixes: N predicted tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Logits of one chunk. Every chunk reads the weight and writes its gradient; a GPU needs longer
# chunks to hide that.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_GPU = 1 << 24, 1 << 26


class LogprobHead(nn.Module):
    """Replacement for a model's output layer that returns log-probabilities of targets.

    It is a module of its own, called once for each micro-batch on every rank, so ZeRO-3 gathers its
    weight only while it is needed. It shares the parameters of the layer that it replaces, tied or
    not.

    Args:
        layer: the output layer to replace.
        scale: factor on the logits (Cohere, Granite).
        softcap: logits are ``softcap * tanh(logits / softcap)`` (Gemma); None for uncapped logits.
        bias: constant ``[1, V]`` that is added to the logits of a layer without a bias (BART).
    """

    def __init__(
        self, layer: nn.Linear, scale: float = 1.0, softcap: float | None = None, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias if bias is None else bias.view(-1)
        self.scale, self.softcap = scale, softcap
        self.dtype = layer.weight.dtype  # kept, because reading it from the weight would make ZeRO-3 gather the weight

    def forward(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Return the log-probabilities ``[N]`` of the targets, in float32."""
        return _TargetLogprobs.apply(hidden_NH, self.weight, self.bias, targets_N, self.scale, self.softcap)


class _TargetLogprobs(torch.autograd.Function):
    """Log-probabilities of targets, computed chunk by chunk.

    The backward pass computes the logits of a chunk a second time; the forward pass saves only
    their normalisers. The backward pass skips tokens without a gradient, which are those of
    satisfied pairs.
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
        for chunk in _chunks(targets_N, weight_VH):
            logits_CV = _logits(hidden_NH[chunk], weight_VH, bias_V, scale, softcap)
            normalisers_N[chunk] = logits_CV.logsumexp(-1)
            logps_N[chunk] = logits_CV.gather(1, targets_N[chunk, None]).squeeze(1) - normalisers_N[chunk]
        ctx.save_for_backward(hidden_NH, targets_N, normalisers_N)
        # save_for_backward cannot hold parameters, because ZeRO-3 swaps their storage between the
        # passes.
        ctx.weight, ctx.bias, ctx.scale, ctx.softcap = weight_VH, bias_V, scale, softcap
        return logps_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        hidden_NH, targets_N, normalisers_N = ctx.saved_tensors
        weight_VH, bias_V, scale, softcap = ctx.weight, ctx.bias, ctx.scale, ctx.softcap
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        is_trained = ctx.needs_input_grad[1]
        # Accumulated over many chunks, in which half precision would lose small terms.
        sum_dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=sum_dtype) if is_trained else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=sum_dtype) if is_trained and bias_V is not None else None
        active = grad_N.nonzero().squeeze(1)
        for chunk in _chunks(active, weight_VH):
            tokens_C = active[chunk]
            hidden_CH = hidden_NH[tokens_C]
            logits_CV = _logits(hidden_CH, weight_VH, bias_V, scale, softcap)
            grad_CV = _logit_gradients(
                logits_CV, targets_N[tokens_C], normalisers_N[tokens_C], grad_N[tokens_C], scale, softcap
            )
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_NH[tokens_C] = grad_CV @ weight_VH
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_CV.T, hidden_CH)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        if grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None


def _logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Return the logits of a chunk in float32."""
    if _has_float32_products(weight_VH):  # without rounding the products to half precision first
        logits_CV = torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32)
        if bias_V is not None:
            logits_CV += bias_V
    else:
        logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float()
    if scale != 1.0:
        logits_CV.mul_(scale)
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


def _logit_gradients(
    logits_CV: Tensor, targets_C: Tensor, normalisers_C: Tensor, grad_C: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return the gradient of the logits before scale and soft cap; overwrites `logits_CV`."""
    # The derivative of the soft cap, from the capped logits: 1 - tanh^2.
    slope_CV = 1 - (logits_CV / softcap).square_() if softcap is not None else None
    # d logp / d logits = onehot(target) - softmax(logits)
    grad_CV = logits_CV.sub_(normalisers_C[:, None]).exp_().mul_(-grad_C[:, None])
    grad_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    if scale != 1.0:
        grad_CV.mul_(scale)
    return grad_CV


def _add_product(sum_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """Add ``left @ right`` to a sum, in the precision of the sum."""
    if sum_VH.dtype == left_VC.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    elif _has_float32_products(left_VC):
        torch.addmm(sum_VH, left_VC, right_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        sum_VH += left_VC @ right_CH


def _has_float32_products(tensor: Tensor) -> bool:
    """Return True if torch can multiply half-precision tensors of this device into float32."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _chunks(tokens_N: Tensor, weight_VH: Tensor) -> list[slice]:
    """Return slices of tokens whose logits have a bounded number of elements."""
    elements = _CHUNK_ELEMENTS_GPU if tokens_N.device.type == "cuda" else _CHUNK_ELEMENTS
    size = max(1, elements // len(weight_VH))
    return [slice(start, min(start + size, len(tokens_N))) for start in range(0, len(tokens_N), size)]
