"""Mixtures of experts: routing in float32, and the share of the experts that a token uses."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

_ROUTER_NAMES = ("gate", "router")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")


def is_routed(parameter: str) -> bool:
    """Return True if a parameter, given by its name, belongs to experts that tokens choose from."""
    return ".experts." in f".{parameter}"


def routed_share(text_config: Any) -> float:
    """Return the share of its routed experts that a token uses; 1 without experts."""
    experts, per_token = (
        next((int(value) for name in names if (value := getattr(text_config, name, None))), 1)
        for names in (_EXPERTS, _EXPERTS_PER_TOKEN)
    )
    return min(per_token / experts, 1.0)


def route_in_float32(model: nn.Module) -> None:
    """Make the routers of a model compute in float32, whatever the model's data type.

    In half precision, close scores are equal and a token's experts are arbitrary. Parameters and
    their names stay as they are.
    """
    for module in list(model.modules()):
        if not hasattr(module, "experts"):
            continue
        for router in filter(None, (getattr(module, name, None) for name in _ROUTER_NAMES)):
            router.forward = _Float32Forward(router)


class _Float32Forward:
    """Forward pass of a router in float32. Its results have the data types that they had before."""

    def __init__(self, router: nn.Module) -> None:
        self._router = copy.copy(router)  # shares the parameters
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            setattr(self._router, name, OrderedDict())  # those of the router run around this forward pass
        self._dtypes: list[torch.dtype] = []

    def __call__(self, hidden: Tensor) -> Any:
        if hidden.dtype not in (torch.bfloat16, torch.float16):
            return self._router(hidden)
        if not self._dtypes:
            with torch.no_grad():
                self._dtypes = [output.dtype for output in _as_tuple(self._router(hidden[:1]))]
        parameters = {name: parameter.float() for name, parameter in self._router.named_parameters()}
        outputs = torch.func.functional_call(self._router, parameters, (hidden.float(),))
        cast = tuple(output.to(dtype) for output, dtype in zip(_as_tuple(outputs), self._dtypes, strict=True))
        return cast[0] if isinstance(outputs, Tensor) else cast


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
