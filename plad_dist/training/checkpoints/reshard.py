"""ZeRO-3 optimizer states at another number of ranks, read from a native checkpoint's files.

ZeRO-3 flattens each parameter of N elements and gives rank r of W the elements [r P, (r+1) P) with
P = ceil(N / W), padded with zeros at the end. A rank's slices of all parameters of a sub-group
follow each other in one flat tensor, both for the float32 weights and for each state of the
optimizer. So every rank of a new size reads its elements by offsets in the memory-mapped files of
the old one: nothing is converted or gathered, and each byte is read once, by the rank that keeps
it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plad_dist.compat.zero_files import FP32_FLAT_GROUPS, OPTIMIZER_STATES, load_optimizer_file, load_shapes
from plad_dist.errors import RunFailed, UserError


@dataclass(frozen=True)
class FlatSlice:
    """Position of a parameter in the flat tensors of a number of ranks.

    Attributes:
        group: sub-group of the parameter.
        offset: offset of its slice in the flat tensor of every rank.
        length: length of its slice, ceil(numel / ranks).
        numel: number of elements of the whole parameter.
    """

    group: int
    offset: int
    length: int
    numel: int


@dataclass(frozen=True)
class Copy:
    """Elements that a rank of the new size copies from the flat tensor of a rank of the old size.

    Attributes:
        owner: old rank whose file holds the elements.
        source: offset in the flat tensor of the old rank.
        target: offset in the flat tensor of the new rank.
        count: number of elements.
    """

    owner: int
    source: int
    target: int
    count: int


def flat_slices(sub_groups: list[dict[str, int]], ranks: int) -> dict[str, FlatSlice]:
    """Return the position of every parameter by name.

    Args:
        sub_groups: number of elements by parameter, in order, for each sub-group.
    """
    slices = {}
    for group, sizes in enumerate(sub_groups):
        offset = 0
        for name, numel in sizes.items():
            length = -(-numel // ranks)
            slices[name] = FlatSlice(group, offset, length, numel)
            offset += length
    return slices


def copies(old: FlatSlice, new: FlatSlice, rank: int) -> Iterator[Copy]:
    """Yield the copies that fill a new rank's slice of a parameter."""
    start, end = rank * new.length, min((rank + 1) * new.length, new.numel)
    while start < end:
        owner, inside = divmod(start, old.length)
        count = min(end - start, old.length - inside)
        yield Copy(owner, old.offset + inside, new.offset + start - rank * new.length, count)
        start += count


def load_resharded(engine: Any, files: Callable[[int], AbstractContextManager[Path]], ranks: int) -> None:
    """Load a ZeRO-3 checkpoint of another number of ranks into an engine, on all ranks.

    Args:
        files: opens a folder with the files of an old rank, for one rank at a time.
        ranks: number of ranks that wrote the checkpoint.

    Raises:
        UserError: the optimizer keeps states that cannot be divided among another number of ranks.
        RunFailed: the files belong to another model.
    """
    from plad_dist.compat.deepspeed import flat_lengths_of, load_optimizer_state, sub_groups_of

    with files(0) as folder:
        old, layout = flat_slices(_sub_groups(folder), ranks), _read_layout(folder, ranks)
    sub_groups = sub_groups_of(engine)
    new = flat_slices(sub_groups, dist.get_world_size())
    if {name: place.numel for name, place in old.items()} != {name: place.numel for name, place in new.items()}:
        raise RunFailed(f"{folder}: its parameters are not those of the model")
    # All parameters of a new sub-group have the same kinds of states, whatever their old one.
    old_groups = [old[next(iter(sizes))].group for sizes in sub_groups]
    flat = [
        {key: torch.zeros(length) for key in (FP32_FLAT_GROUPS, *layout.flat_states[group])}
        for group, length in zip(old_groups, flat_lengths_of(engine), strict=True)
    ]
    _fill(flat, old, new, files, ranks)
    state = {
        # Copies: an optimizer counts its steps in place, and new sub-groups that share an old one
        # would share its counter.
        index: copy.deepcopy(layout.scalar_states[group])
        | {key: values for key, values in flat[index].items() if key != FP32_FLAT_GROUPS}
        for index, group in enumerate(old_groups)
    }
    loaded = {
        **layout.other,
        FP32_FLAT_GROUPS: [tensors[FP32_FLAT_GROUPS] for tensors in flat],
        OPTIMIZER_STATES: {"state": state, "param_groups": layout.param_groups},
    }
    load_optimizer_state(engine, loaded, dist.get_rank(), dist.get_world_size())


def _fill(
    flat: list[dict[str, Tensor]],
    old: dict[str, FlatSlice],
    new: dict[str, FlatSlice],
    files: Callable[[int], AbstractContextManager[Path]],
    ranks: int,
) -> None:
    """Copy this rank's elements of the weights and flat states from the files of the old ranks.

    Args:
        flat: tensors of this rank by key, for each new sub-group; filled in place.
    """
    plan = [
        _PlannedCopy(old[name].group, place.group, piece)
        for name, place in new.items()
        for piece in copies(old[name], place, dist.get_rank())
    ]
    for owner in range(ranks):
        of_owner = [planned for planned in plan if planned.piece.owner == owner]
        if of_owner:
            with files(owner) as folder:
                _copy_from(load_optimizer_file(folder, owner), of_owner, flat)


@dataclass(frozen=True)
class _PlannedCopy:
    """A copy between an old and a new sub-group."""

    old_group: int
    new_group: int
    piece: Copy


def _copy_from(file: dict[str, Any], plan: list[_PlannedCopy], flat: list[dict[str, Tensor]]) -> None:
    """Carry out copies from the optimizer file of one old rank."""
    for planned in plan:
        piece = planned.piece
        weights = {FP32_FLAT_GROUPS: file[FP32_FLAT_GROUPS][planned.old_group]}
        sources = weights | file[OPTIMIZER_STATES]["state"][planned.old_group]
        for key, target in flat[planned.new_group].items():
            target[piece.target : piece.target + piece.count] = sources[key][piece.source : piece.source + piece.count]


def whole_weights(folder: Path, ranks: int) -> dict[str, Tensor]:
    """Return the trained float32 weights by name, from the files of a ZeRO-3 checkpoint.

    Args:
        ranks: number of ranks that wrote the checkpoint.
    """
    shapes = {name: shape for group in load_shapes(folder) for name, shape in group.items()}
    old, whole = flat_slices(_sub_groups(folder), ranks), flat_slices(_sub_groups(folder), 1)
    weights = {name: torch.empty(place.numel) for name, place in old.items()}
    for owner in range(ranks):
        flat = load_optimizer_file(folder, owner)[FP32_FLAT_GROUPS]
        for name, place in old.items():
            for piece in copies(place, replace(whole[name], offset=0), 0):
                if piece.owner == owner:
                    source = flat[place.group][piece.source : piece.source + piece.count]
                    weights[name][piece.target : piece.target + piece.count] = source
    return {name: weight.view(shapes[name]) for name, weight in weights.items()}


def _sub_groups(folder: Path) -> list[dict[str, int]]:
    """Return the numbers of elements by parameter, for each sub-group of a checkpoint."""
    return [{name: shape.numel() for name, shape in group.items()} for group in load_shapes(folder)]


@dataclass(frozen=True)
class _Layout:
    """Contents of an optimizer file beside the flat tensors.

    Attributes:
        scalar_states: states of one number by key, for each sub-group.
        flat_states: keys of the states with one number for every weight, for each sub-group.
        param_groups: parameter groups of the inner optimizer.
        other: remaining entries of the file.
    """

    scalar_states: list[dict[str, Any]]
    flat_states: list[list[str]]
    param_groups: list[dict[str, Any]]
    other: dict[str, Any]


def _read_layout(folder: Path, ranks: int) -> _Layout:
    """Read the layout of the optimizer file of the first rank.

    Raises:
        UserError: a state is neither one number nor one number for every weight.
    """
    file = load_optimizer_file(folder, 0)
    inner = file[OPTIMIZER_STATES]
    scalar_states: list[dict[str, Any]] = []
    flat_states: list[list[str]] = []
    for group, weights in enumerate(file[FP32_FLAT_GROUPS]):
        scalar_states.append({})
        flat_states.append([])
        for key, value in inner["state"][group].items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                scalar_states[group][key] = value
            elif value.numel() == weights.numel():
                flat_states[group].append(key)
            else:
                raise UserError(
                    f"{folder}: the optimizer's state {key!r} cannot be divided among another number of workers: set "
                    f"training.num_workers={ranks} to resume"
                )
    other = {key: value for key, value in file.items() if key not in (FP32_FLAT_GROUPS, OPTIMIZER_STATES)}
    return _Layout(scalar_states, flat_states, inner["param_groups"], other)
