"""Config of a cut model, and the check that each of its layers is the one it was cut from.

A transformers config describes layers by lists with an entry for each layer, by lists of layer
numbers, and by counts and periods. Those that are known are changed so that each kept layer stays
what it was. Whether that is exact for the model's family is not assumed but checked: the original
and the cut model are built without weights, and compared layer by layer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from plad_dist.config import Pretrained
from plad_dist.data.models import load_model_config, resolve_model
from plad_dist.errors import UserError, first_line
from plad_dist.training.model.meta import build_without_weights, decoder_layers

_NUMBERS = ("mlp_only_layers", "moe_layers")  # numbers of some of the layers
_FIRST = ("first_k_dense_replace", "max_window_layers")  # how many of the first layers differ from the others
_PREDICTION = ("num_mtp_layers", "num_nextn_predict_layers")  # after the decoder, for speculative decoding
# Attributes of modules that decide nothing: the place of a layer, and where its config comes from.
_UNCOMPARED = ("layer_id", "layer_idx", "layer_index", "layer_number", "name_or_path")


def chosen_layers(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the numbers of the layers to keep of a model with `depth` layers, from 0.

    Args:
        layers: a number of layers: the first two and the last, and evenly spaced ones between; or
            the layers themselves.

    Raises:
        UserError: the model has fewer layers.
    """
    if isinstance(layers, int):
        if layers > depth:
            raise UserError(f"student.from.layers: {layers}: the model has only {depth} layers")
        steps, span = layers - 2, depth - 2  # from the second layer to the last
        return (0, *(1 + (2 * step * span + steps) // (2 * steps) for step in range(steps + 1)))
    if layers[-1] >= depth:
        raise UserError(f"student.from.layers: {layers[-1]}: the model has the layers 0 to {depth - 1}")
    return tuple(layers)


def depth_of(config: Any) -> int:
    """Return the number of decoder layers by a transformers config.

    Raises:
        UserError: the config does not state it, or the model has an encoder too.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"student.from.path: a {config.model_type} model is an encoder-decoder, of which no layers can be cut"
        )
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UserError(f"student.from.path: a {config.model_type} model has no plain list of layers to choose from")
    return depth


def config_of(source: Pretrained) -> Any:
    """Return the transformers config of a pretrained model, or of the layers kept of it.

    Raises:
        UserError: the config cannot be loaded or cut.
    """
    config = load_model_config(resolve_model(source.settings), source.settings)
    return config if source.layers is None else cut_config(config, chosen_layers(source.layers, depth_of(config)))


def cut_config(config: Any, layers: Sequence[int]) -> Any:
    """Return the config of a model with only some of the layers, as it is read from its file.

    Raises:
        UserError: the config cannot be cut.
    """
    changed = copy.deepcopy(config)
    try:
        _keep(changed.get_text_config(), layers)
        return type(changed).from_dict(json.loads(changed.to_json_string()))
    except Exception as error:  # noqa: BLE001 - config classes raise their own errors for bad values
        raise UserError(f"student.from.path: a {config.model_type} model cannot be cut: {first_line(error)}") from None


def _keep(text: Any, layers: Sequence[int]) -> None:
    """Change the entries of a config that depend on the layers."""
    depth = text.num_hidden_layers
    entries = {name: _kept(name, value, layers, depth) for name, value in vars(text).items()}
    changes = {name: value for name, value in entries.items() if value is not None}
    period = getattr(text, "decoder_sparse_step", None)
    if isinstance(period, int) and isinstance(dense := getattr(text, "mlp_only_layers", None), list):
        # A layer has experts if its number fits the period and is not in the list.
        dense = [new for new, layer in enumerate(layers) if layer in dense or (layer + 1) % period]
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if hasattr(text, "attention_types"):  # of GPT-Neo: kinds with repetitions
        changes["attention_types"] = [[[text.attention_layers[layer] for layer in layers], 1]]
    for name, value in changes.items():
        setattr(text, name, value)
    text.num_hidden_layers = len(layers)


def _kept(name: str, value: Any, layers: Sequence[int], depth: int) -> Any:
    """Return an entry of a config for the kept layers, or None if it does not depend on layers."""
    if isinstance(value, list | tuple):
        if name in _NUMBERS:
            return [new for new, layer in enumerate(layers) if layer in value]
        if len(value) == depth and not name.endswith(("token_id", "token_ids")):
            return [value[layer] for layer in layers]
    if isinstance(value, int) and not isinstance(value, bool):
        if name in _FIRST:
            return sum(layer < value for layer in layers)
        if name in _PREDICTION:
            return 0
    return None


def check_cut(source: Pretrained) -> None:
    """Raise :class:`UserError` if the layers of a model cannot be cut exactly."""
    assert source.layers is not None
    config = load_model_config(resolve_model(source.settings), source.settings)
    built_exactly(config, chosen_layers(source.layers, depth_of(config)), remote=source.settings.trust_remote_code)


def built_exactly(config: Any, layers: Sequence[int], *, remote: bool) -> tuple[Any, Any, Any]:
    """Return the config of a cut model, and the original and the cut model without weights.

    Raises:
        UserError: the layers cannot be cut exactly.
    """
    changed = cut_config(config, layers)
    original, cut = _built(config, remote=remote), _built(changed, remote=remote)
    check_same_layers(original, cut, layers)
    return changed, original, cut


def _built(config: Any, *, remote: bool) -> Any:
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "student.from.path: the model is quantized, and no student of it can be trained; name the original"
        )
    try:
        return build_without_weights(config, remote=remote)
    except Exception as error:  # noqa: BLE001 - model families raise all kinds of errors
        raise UserError(f"student.from.path: a {config.model_type} model cannot be cut: {first_line(error)}") from None


def check_same_layers(original: Any, cut: Any, layers: Sequence[int]) -> None:
    """Compare the kept layers and all that surrounds the layers of two models without weights.

    Raises:
        UserError: they differ in more than the numbers of the layers.
    """
    family = original.config.model_type
    (name, before), (_, after) = decoder_layers(original), decoder_layers(cut)
    if len(before) != depth_of(original.config) or len(after) != len(layers):
        raise UserError(f"student.from.path: a {family} model has no plain list of layers to choose from")
    pairs = [(original, cut, name), *((before[layer], after[new], None) for new, layer in enumerate(layers))]
    for number, (old, new, left_out) in zip(("the rest", *layers), pairs, strict=True):
        facts, new_facts = dict(_facts(old, left_out)), dict(_facts(new, left_out))
        facts = {key: _of_layers(value, layers, len(before)) for key, value in facts.items()}
        differing = [key for key in facts.keys() | new_facts.keys() if facts.get(key) != new_facts.get(key)]
        if differing:
            place = number if left_out else f"layer {number}"
            raise UserError(
                f"student.from.layers: cannot be cut out of a {family} model: {place} would differ in "
                f"{min(differing)}, which depends on the place of a layer or on the number of layers"
            )


def _facts(root: Any, left_out: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the facts that decide what a module computes: classes, plain attributes and shapes.

    Args:
        left_out: name of a part to leave out.
    """
    for path, module in root.named_modules():
        if left_out is not None and f"{path}.".startswith(f"{left_out}."):
            continue
        yield path or "its class", type(module).__qualname__
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in _UNCOMPARED and _is_plain(value):
                yield f"{path}.{name}".lstrip("."), value
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{path}.{name}".lstrip("."), tuple(tensor.shape)


def _of_layers(value: Any, layers: Sequence[int], depth: int) -> Any:
    """Return a fact, of which a list with an entry for each layer has those of the kept layers."""
    has_entries = isinstance(value, list | tuple) and len(value) == depth
    return type(value)(value[layer] for layer in layers) if has_entries else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
