"""Low-rank adapters of linear layers and of stacked experts, and how they are merged.

transformers stacks the experts of a mixture in parameters ``[experts, out, in]`` or ``[experts, in,
out]``, whose layer computes with all of them at once. peft adds the product of the adapter's
matrices to such a parameter during each forward pass of its layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plad_dist.config import Lora
from plad_dist.errors import UserError
from plad_dist.training.model.experts import is_routed

_ADAPTER = "default"


def add_adapters(model: Any, lora: Lora, seed: int) -> None:
    """Add low-rank adapters to a model in place, and freeze all other parameters.

    The adapters start with the same weights on every rank.

    Raises:
        UserError: see :func:`adapter_targets`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    targets = adapter_targets(model, lora)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets,
        target_parameters=lora.target_parameters,
    )  # fmt: skip
    # In a module without a transformers config. Otherwise peft would take some names, such as
    # `gate_proj`, for those of experts, which had such layers before transformers 5.
    inject_adapter_in_model(config, nn.ModuleDict({"model": model}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapter_targets(model: Any, lora: Lora) -> list[str]:
    """Return the names of the layers that get adapters.

    Raises:
        UserError: a target is not a linear layer of the model, or is its output layer; a target
            parameter does not stack experts; nothing is adapted; or peft could not load the saved
            adapter.
    """
    from plad_dist.compat.peft import targets_read_as_experts  # not at the top: importing peft takes seconds

    stacked = stacked_experts(model)
    if unknown := [target for target in lora.target_parameters if not any(_is_named(name, target) for name in stacked)]:
        known = sorted({".".join(name.split(".")[-2:]) for name in stacked})
        raise UserError(
            f"training.lora.target_parameters: {', '.join(unknown)}: expected names of parameters that stack experts; "
            f"the model has {', '.join(known) or 'none'}"
        )
    head = model.get_output_embeddings()
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    linear = {name for name, module in modules if _is_linear(module) and module is not head}
    targets = sorted(linear) if lora.target_modules == "all-linear" else lora.target_modules
    choice = f"linear layers of the model other than its output layer; it has {', '.join(sorted(linear)) or 'none'}"
    if unknown := sorted(set(targets) - linear):
        raise UserError(f"training.lora.target_modules: {', '.join(unknown)}: expected names of {choice}")
    if not targets and not lora.target_parameters:
        raise UserError(f"training.lora.target_modules: must not be empty without target_parameters; name {choice}")
    if lora.save_adapter and (misread := targets_read_as_experts(targets, model)):
        raise UserError(
            f"training.lora.save_adapter: peft would load the adapters of {', '.join(misread)} as those of experts; "
            "set false, or leave them out of target_modules"
        )
    return targets


def stacked_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that stack the weights of experts, by name."""
    shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in model.named_parameters()}
    return {name: shape for name, shape in shapes.items() if is_routed(name) and len(shape) == 3}


def adapted_shapes(stacked: dict[str, tuple[int, ...]], lora: Lora) -> list[tuple[int, ...]]:
    """Return the shapes of the stacked experts that get adapters."""
    targets = lora.target_parameters
    return [shape for name, shape in stacked.items() if any(_is_named(name, target) for target in targets)]


def adapted_parameters(model: nn.Module) -> dict[str, Any]:
    """Return the module with the adapter of each adapted parameter, by the parameter's name."""
    adapted = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            base, path = module, name
            while hasattr(base, "base_layer"):  # several parameters of a layer nest their adapters
                base, path = base.base_layer, f"{path}.base_layer"
            adapted[f"{path}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return adapted


def adapted_layers(model: nn.Module) -> list[str]:
    """Return the names of the adapted linear layers, in peft's format."""
    modules = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return sorted({name for name, module in modules if hasattr(module, "lora_A") and not _adapts_experts(module)})


def low_rank_matrices(module: Any) -> list[nn.Parameter]:
    """Return the parameters of an adapter."""
    return [module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight]


def merged(weight: Tensor, module: Any) -> Tensor:
    """Return ``W + scale * B A`` of a weight and its adapter, computed in float32."""
    if _adapts_experts(module):
        left, right, scale = module.get_delta_factors(_ADAPTER)
    else:
        right, left = low_rank_matrices(module)
        scale = module.scaling[_ADAPTER]
    low_rank = left.detach().to(weight.device).float() @ right.detach().to(weight.device).float()
    return (weight.float() + scale * low_rank).to(weight.dtype)


def unadapted_name(name: str) -> str:
    """Return the name that a parameter has in the model without adapters."""
    return name.replace("base_layer.", "")


def _adapts_experts(module: Any) -> bool:
    """Return True for an adapter of a parameter, False for one of a linear layer."""
    return hasattr(module, "parameter_name")


def _is_named(name: str, target: str) -> bool:
    """Return True if peft finds a parameter by a target: its name ends in the target's parts."""
    return f".{name}".endswith(f".{target}")


def _is_linear(module: nn.Module) -> bool:
    """Return True for linear layers, but not for routers that are more than a product."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
