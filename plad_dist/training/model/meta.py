"""Models without weights, on PyTorch's meta device, from which shapes and counts are read."""

from __future__ import annotations

from typing import Any

from plad_dist.data.models import model_class

_MAX_LAYERS = 1000


def build_without_weights(config: Any, *, remote: bool) -> Any:
    """Build a model on the meta device, as if it were not quantized.

    Raises:
        ValueError: the config has far too many layers. Model families raise other errors too.
    """
    import torch

    text = config.get_text_config()
    depths = (getattr(text, name, None) for name in ("num_hidden_layers", "num_layers", "n_layer"))
    depth = next((depth for depth in depths if isinstance(depth, int)), 0)
    if depth > _MAX_LAYERS:
        raise ValueError(f"num_hidden_layers: {depth:,}, expected at most {_MAX_LAYERS:,}")
    if getattr(config, "quantization_config", None) is not None:
        config.quantization_config = None
        del config.quantization_config
    with torch.device("meta"):
        return model_class(config).from_config(config, dtype=torch.bfloat16, trust_remote_code=remote)


def decoder_layers(model: Any) -> tuple[str, list[Any]]:
    """Return the name of a model's list of decoder layers, and the layers.

    It is the module list with the most parameters. Without any, the name and the list are empty.
    """
    from torch import nn

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(lists, key=lambda entry: count_parameters(entry[1]), default=("", ()))
    return name, list(layers)


def count_parameters(module: Any) -> int:
    """Return the number of parameters of a module, tied ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
