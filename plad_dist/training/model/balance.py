"""Auxiliary loss that balances the experts of a mixture, and the loads of the experts.

The loss of a layer is that of the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961), as
transformers computes it for one layer: ``E * sum(f_E * P_E)``. `f_E` is the number of tokens that
the router sends to each expert, and `P_E` the sum of the softmax of its logits, both divided by the
number of tokens. Without any imbalance it is the number of experts of a token. The loss of a model
is the mean over its layers.

It is computed for each micro-batch over the tokens that the model computes: padding does not count,
and a shared prompt counts once. The gradient of a step is the mean of the gradients of its
micro-batches, weighted by tokens. Since ``f_E * P_E`` is no sum over tokens, it depends slightly on
how a step is divided into micro-batches, as in Megatron and transformers.

Shape suffixes: N tokens of a micro-batch with padding, K experts of a token, E experts, L layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from plad_dist.errors import UserError
from plad_dist.training.batches.micro_batch import MicroBatch
from plad_dist.training.model.experts import RouterForward

KEY = "training.router_aux_loss"
_MAX_ROUNDING = 1e-3  # of the sum of a token's probabilities


class ExpertBalance:
    """Auxiliary loss of the routers of a model, after :func:`~.experts.route_in_float32`.

    The gradient of the loss is added where the router's weights for the experts pass backward.
    Reentrant checkpointing runs a forward pass twice, but only once with gradients, and only that
    one counts.

    Args:
        coefficient: factor of the loss in the objective of a step.

    Raises:
        UserError: transformers does not declare the routers of the model, or not as modules; or the
            model is an encoder-decoder.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        from plad_dist.compat.routers import routers_of  # not at the top: importing transformers takes seconds

        self.coefficient = coefficient
        self.routers, self._logits_index = routers_of(model)
        forwards = [router.forward for router in self.routers if isinstance(router.forward, RouterForward)]
        # The tokens of an encoder are others than those of its decoder.
        if not forwards or len(forwards) < len(self.routers) or model.config.is_encoder_decoder:
            raise _unreadable(model.config.model_type)
        self._family = str(model.config.model_type)
        for layer, forward in enumerate(forwards):
            forward.observe = partial(self._observe, layer, self.routers[layer])
        self._is_token_N: Tensor | None = None  # between begin() and end()
        self._tokens, self._scale = 0, 0.0
        self._gives_probabilities: bool | None = None
        self._loads: dict[int, Tensor] = {}
        self._loss = torch.zeros((), dtype=torch.float64)

    def begin(self, batch: MicroBatch, scale: float) -> None:
        """Add the loss of a micro-batch to the next forward and backward pass.

        Args:
            scale: factor of the loss, weighted by the tokens of the micro-batch, in its gradient.
        """
        self._is_token_N = (batch.prompt_starts_RT.flatten() >= 0) & (batch.tokens > 0)
        self._tokens, self._scale = batch.tokens, scale

    def end(self) -> None:
        """End the micro-batch, after its backward pass."""
        self._is_token_N = None

    def take_sums(self) -> Tensor:
        """Return the sums since the last call: loss times tokens, then tokens of each expert."""
        sums = torch.cat([self._loss[None], *(loads_E for _, loads_E in sorted(self._loads.items()))])
        self._loads, self._loss = {}, torch.zeros_like(self._loss)
        return sums

    def _observe(self, layer: int, router: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the outputs of a router, with the gradient of the loss behind them."""
        if self._is_token_N is None or not torch.is_grad_enabled():
            return outputs
        scores_NE, chosen_NK, carrier = self._read(router, outputs)
        is_token_N = self._is_token_N.to(scores_NE.dtype)
        probabilities_NE = scores_NE if self._gives_probabilities else scores_NE.softmax(-1)
        loads_E = torch.zeros_like(scores_NE[0])
        loads_E.scatter_add_(0, chosen_NK.flatten(), is_token_N.repeat_interleave(chosen_NK.shape[1]))
        loss = len(loads_E) * (loads_E * (is_token_N @ probabilities_NE)).sum() / max(self._tokens, 1) ** 2
        weighted = self._tokens / len(self.routers) * loss
        with torch.no_grad():
            self._loads[layer] = self._loads.get(layer, torch.zeros_like(loads_E, dtype=torch.float64)) + loads_E
            self._loss = self._loss.to(loss.device) + weighted
        carried = _WithLoss.apply(outputs[carrier], self._scale * weighted)
        return (*outputs[:carrier], carried, *outputs[carrier + 1 :])

    def _read(self, router: Any, outputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, int]:
        """Return the logits or probabilities, the chosen experts, and the index of the weights."""
        tensors = [(index, output) for index, output in enumerate(outputs) if isinstance(output, Tensor)]
        chosen = [output for _, output in tensors if not output.is_floating_point()]
        weights = [index for index, output in tensors if output.is_floating_point() and index != self._logits_index]
        top_k = getattr(router, "top_k", None)
        if not weights or not (chosen or isinstance(top_k, int)):
            raise _unreadable(self._family)
        scores_NE = outputs[self._logits_index]
        if self._gives_probabilities is None:  # Gemma 4 does
            sums_N = scores_NE.detach().sum(-1)
            is_normalised = ((sums_N - 1).abs() < _MAX_ROUNDING).all()
            self._gives_probabilities = bool(is_normalised and (scores_NE >= 0).all())
        return scores_NE, chosen[0] if chosen else scores_NE.topk(top_k).indices, weights[0]


class _WithLoss(torch.autograd.Function):
    """Return the tensor unchanged; in the backward pass, give the loss the gradient 1."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        context.like = loss.new_ones(())
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], context.like


def _unreadable(family: str) -> UserError:
    return UserError(f"{KEY}: the routers of {family} models cannot be read; set 0")
