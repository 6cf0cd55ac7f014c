"""Mixtures of experts: routing in float32, and the share of the experts that a token uses."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_ROUTER_NAMES = ("gate", "router")
_HALF = (torch.bfloat16, torch.float16)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")


def is_routed(parameter: str) -> bool:
    """Return True if a parameter, given by its name, belongs to experts that tokens choose from."""
    return ".experts." in f".{parameter}"


def is_mixture(model: nn.Module) -> bool:
    """Return True if a model has experts that tokens choose from."""
    return any(is_routed(name) for name, _ in model.named_parameters())


def experts_per_token(text_config: Any) -> int:
    """Return the number of routed experts that a token uses; 1 without experts."""
    return next((int(value) for name in _EXPERTS_PER_TOKEN if (value := getattr(text_config, name, None))), 1)


def routed_share(text_config: Any) -> float:
    """Return the share of its routed experts that a token uses; 1 without experts."""
    experts = next((int(value) for name in _EXPERTS if (value := getattr(text_config, name, None))), 1)
    return min(experts_per_token(text_config) / experts, 1.0)


def route_in_float32(model: nn.Module) -> None:
    """Make the routers of a model compute in float32, whatever the model's data type.

    In half precision, close scores are equal and a token's experts are arbitrary. Parameters and
    their names stay as they are.
    """
    for module in list(model.modules()):
        if not hasattr(module, "experts"):
            continue
        for router in filter(None, (getattr(module, name, None) for name in _ROUTER_NAMES)):
            router.forward = RouterForward(router)


class RouterForward:
    """Forward pass of a router in float32. Its results have the data types that they had before.

    Attributes:
        observe: function of the outputs before they are rounded, which returns them; None for none.
    """

    observe: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None

    def __init__(self, router: nn.Module) -> None:
        self._router = copy.copy(router)  # shares the parameters
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            setattr(self._router, name, OrderedDict())  # those of the router run around this forward pass
        self._dtypes: list[torch.dtype | None] = []

    def __call__(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        if hidden.dtype not in _HALF:
            outputs = self._router(hidden, *arguments, **options)
            return _like(outputs, self._observed(outputs))
        if not self._dtypes:
            with torch.no_grad():
                outputs = self._router(hidden, *arguments, **options)
            self._dtypes = [getattr(output, "dtype", None) for output in _as_tuple(outputs)]
        parameters = {name: parameter.float() for name, parameter in self._router.named_parameters()}
        inputs = tuple(map(_in_float32, (hidden, *arguments)))
        options = {name: _in_float32(value) for name, value in options.items()}
        outputs = torch.func.functional_call(self._router, parameters, inputs, options)
        cast = tuple(
            output.to(dtype) if isinstance(output, Tensor) else output
            for output, dtype in zip(self._observed(outputs), self._dtypes, strict=True)
        )
        return _like(outputs, cast)

    def _observed(self, outputs: Any) -> tuple[Any, ...]:
        return _as_tuple(outputs) if self.observe is None else self.observe(_as_tuple(outputs))


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _like(outputs: Any, changed: tuple[Any, ...]) -> Any:
    """Return changed outputs as the router returns them: a tuple, or its only output."""
    return changed if isinstance(outputs, tuple) else changed[0]
