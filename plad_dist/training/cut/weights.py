"""Weights of a cut model, copied from the safetensors files of the original piece by piece.

The tensors of the kept layers get the new numbers of their layers in their names; the others keep
theirs. transformers decides which layer a name in a file belongs to, because some files have other
names than the model. Tensors that the model does not use are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_dist.data.models import check_weights
from plad_dist.errors import UserError
from plad_dist.training.model.meta import decoder_layers
from plad_dist.training.model.weight_files import StoredTensor, WeightFiles

SHARD_BYTES = 4 << 30


def copy_weights(folder: Path, original: Any, cut: Any, layers: Sequence[int], target: Path) -> None:
    """Write the weights of a cut model.

    Args:
        folder: folder of the original model's files.
        original, cut: both models without weights.
        layers: numbers of the kept layers.
        target: folder of the cut model.

    Raises:
        UserError: the files do not hold the model's weights under names with the layers' numbers.
        RunFailed: a file cannot be read or is too short.
    """
    with WeightFiles([str(folder / name) for name in _file_names(folder)]) as files:
        names = kept_names(list(files.tensors), original, cut, layers)
        shards = list(_shards({new: files.tensors[old] for new, old in names.items()}))
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            of_all = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"model{of_all}.safetensors"
            _write(target / file, shard)
            places |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            size = sum(tensor.size for shard in shards for tensor in shard.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _file_names(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a model.

    Raises:
        UserError: the folder has no complete weights in this format.
    """
    check_weights(str(folder))
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def kept_names(stored: Sequence[str], original: Any, cut: Any, layers: Sequence[int]) -> dict[str, str]:
    """Return the names of the tensors in the files of the cut model, with their names in the
    original's files.

    Raises:
        UserError: the cut model would lack a tensor, or get that of another layer.
    """
    from plad_dist.compat.pretrained import BuiltModel

    prefix, _ = decoder_layers(original)
    new_numbers = {layer: new for new, layer in enumerate(layers)}
    copies: list[tuple[str, str, str]] = []  # old name, new name, new place in the model
    for name, (place, _) in BuiltModel.of(original).names_in_model(stored).items():
        new_name, new_place = name, place
        if place.startswith(f"{prefix}."):
            number, _, rest = place.removeprefix(f"{prefix}.").partition(".")
            if int(number) not in new_numbers:
                continue
            new = new_numbers[int(number)]
            new_name, new_place = _renumbered(name, number, new), f"{prefix}.{new}.{rest}"
        copies.append((name, new_name, new_place))
    built, names = BuiltModel.of(cut), {new_name: name for name, new_name, _ in copies}
    places = {name: place for name, (place, _) in built.names_in_model(sorted(names)).items()}
    wrong = [name for name, new_name, place in copies if places.get(new_name) != place or names[new_name] != name]
    wrong += _missing(built.targets(), set(places.values()))
    if wrong:
        raise UserError(
            f"student.from.path: the files of this {original.config.model_type} model cannot be cut: they lack "
            f"{wrong[0]}, or do not name it by its layer"
        )
    return names


def _renumbered(name: str, number: str, new: int) -> str:
    """Return a name in a file with another number of the layer, which is the first in the name."""
    parts = name.split(".")
    if number in parts:
        parts[parts.index(number)] = str(new)
    return ".".join(parts)


def _missing(targets: Mapping[str, Any], filled: set[str]) -> Iterator[str]:
    """Yield the parameters that no file fills, directly or as tied ones."""
    from torch.nn import Parameter

    tensors = {id(targets[name]) for name in filled}
    return (name for name, target in targets.items() if isinstance(target, Parameter) and id(target) not in tensors)


def _shards(tensors: Mapping[str, StoredTensor]) -> Iterator[dict[str, StoredTensor]]:
    """Divide tensors among files of limited size, in the order of their names."""
    shard: dict[str, StoredTensor] = {}
    size = 0
    for name in sorted(tensors):
        if shard and size + tensors[name].size > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensors[name]
        size += tensors[name].size
    yield shard


def _write(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file; see :mod:`plad_dist.training.model.weight_files` for the format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in tensor.contents():
                file.write(piece)
