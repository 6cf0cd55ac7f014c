"""ZeRO-3 optimizer states at another number of ranks, read straight from the files of a native checkpoint.

ZeRO-3 flattens each parameter of N elements and gives rank r of W the elements [r P, (r+1) P) with P = ceil(N / W), the last ones
filled up with zeros. A rank's parts of all parameters of a sub-group lie one after the other in one flat tensor, for the
float32 weights and for each state of the optimizer alike. So every rank of a new size finds what it needs by offsets in
the memory-mapped files of the old one: nothing is converted, nothing is gathered, and each byte is read once by those who keep it.
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

from plad_dist.errors import RunFailed, UserError

_FP32, _STATES = "fp32_flat_groups", "optimizer_state_dict"  # DeepSpeed's names in its files


@dataclass(frozen=True)
class FlatSlice:
    """Where a parameter lies in the flat tensors of a size.

    Attributes:
        group: its sub-group.
        offset: of its part in the flat tensor of every rank.
        length: of its part, ceil(numel / ranks).
    """

    group: int
    offset: int
    length: int
    numel: int


def places(sub_groups: list[dict[str, int]], ranks: int) -> dict[str, FlatSlice]:
    """The place of every parameter from the numbers of elements in each sub-group, by name and in their order."""
    found = {}
    for group, sizes in enumerate(sub_groups):
        offset = 0
        for name, numel in sizes.items():
            length = -(-numel // ranks)
            found[name] = FlatSlice(group, offset, length, numel)
            offset += length
    return found


def pieces(old: FlatSlice, new: FlatSlice, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """(old rank, offset there, offset in the new flat tensor, elements) of a new rank's part of a parameter."""
    at, end = rank * new.length, min((rank + 1) * new.length, new.numel)
    while at < end:
        owner, inside = divmod(at, old.length)
        count = min(end - at, old.length - inside)
        yield owner, old.offset + inside, new.offset + at - rank * new.length, count
        at += count


def load_resharded(engine: Any, files: Callable[[int], AbstractContextManager[Path]], ranks: int) -> None:
    """Load a native ZeRO-3 checkpoint that another number of ranks wrote into an engine, on all ranks.

    Args:
        files: gives a folder with the files of a rank that wrote, one rank at a time.

    Raises:
        UserError: the optimizer keeps states that cannot be divided otherwise.
        RunFailed: the files are not those of this model.
    """
    optimizer, rank = engine.optimizer, dist.get_rank()
    with files(0) as folder:
        file, old = _load(folder, 0), places(_sub_groups(folder), ranks)
        kinds = [_states_of(file, group, folder, ranks) for group in range(len(file[_FP32]))]
        param_groups = file[_STATES]["param_groups"]
        rest = {key: value for key, value in file.items() if key not in (_FP32, _STATES)}
        del file
    names = [[engine.param_names[parameter] for parameter in group] for group in optimizer.fp16_groups]
    sizes = [
        {name: int(parameter.ds_numel) for name, parameter in zip(group, parameters, strict=True)}
        for group, parameters in zip(names, optimizer.fp16_groups, strict=True)
    ]
    new = places(sizes, dist.get_world_size())
    if {name: place.numel for name, place in old.items()} != {name: place.numel for name, place in new.items()}:
        raise RunFailed(f"{folder}: its parameters are not those of the model")

    lengths = [flat.numel() for flat in optimizer.fp32_partitioned_groups_flat]
    weights = [torch.zeros(length) for length in lengths]
    # The parameters of a sub-group are trained alike, whatever sub-group they were in.
    numbers, names_of_flat = zip(*(kinds[old[group[0]].group] for group in names), strict=True)
    flat = [{key: torch.zeros(n) for key in keys} for keys, n in zip(names_of_flat, lengths, strict=True)]
    for owner in range(ranks):
        wanted = [
            (old[name].group, place.group, source, target, count)
            for name, place in new.items()
            for its_rank, source, target, count in pieces(old[name], place, rank)
            if its_rank == owner
        ]
        if not wanted:
            continue
        with files(owner) as folder:
            found = _load(folder, owner)
            for group, mine, source, target, count in wanted:
                weights[mine][target : target + count] = found[_FP32][group][source : source + count]
                for key, state in flat[mine].items():
                    there = found[_STATES]["state"][group][key]
                    state[target : target + count] = there[source : source + count]
            del found
    optimizer._set_fp32_optimizer_param_groups()
    fresh = optimizer.optimizer.state_dict()["param_groups"]
    optimizer._clear_fp32_optimizer_param_groups()
    groups = [{**before, "params": now["params"]} for before, now in zip(param_groups, fresh, strict=True)]
    loaded = {
        **rest,
        _FP32: weights,
        # Copies: an optimizer counts its steps in place, and sub-groups that were one would count them twice.
        _STATES: {
            "state": {i: copy.deepcopy(numbers[i]) | found for i, found in enumerate(flat)},
            "param_groups": groups,
        },
    }
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([loaded if index == rank else None for index in range(dist.get_world_size())])
    optimizer.checkpoint_event_epilogue()


def whole_weights(folder: Path, ranks: int) -> dict[str, Tensor]:
    """The float32 weights that are trained, by name, from the files of a native ZeRO-3 checkpoint of so many ranks."""
    shapes = {name: shape for group in _shapes(folder) for name, shape in group.items()}
    old, whole = places(_sub_groups(folder), ranks), places(_sub_groups(folder), 1)
    found = {name: torch.empty(place.numel) for name, place in old.items()}
    for owner in range(ranks):
        flat = _load(folder, owner)[_FP32]
        for name, place in old.items():
            for its_rank, source, target, count in pieces(place, replace(whole[name], offset=0), 0):
                if its_rank == owner:
                    found[name][target : target + count] = flat[place.group][source : source + count]
    return {name: weight.view(shapes[name]) for name, weight in found.items()}


def _load(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank wrote of the optimizer, memory-mapped."""
    (file,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    # As DeepSpeed itself does: the files are those of this run, and their checksums are what was committed.
    found: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)[_STATES]
    return found


def _sub_groups(folder: Path) -> list[dict[str, int]]:
    """Numbers of elements by parameter in each sub-group."""
    return [{name: shape.numel() for name, shape in group.items()} for group in _shapes(folder)]


def _shapes(folder: Path) -> list[dict[str, torch.Size]]:
    """Shapes by parameter in each sub-group, as the first rank wrote them."""
    (file,) = folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")
    found: list[dict[str, torch.Size]] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)[
        "param_shapes"
    ]
    return found


def _states_of(file: dict[str, Any], group: int, folder: Path, ranks: int) -> tuple[dict[str, Any], list[str]]:
    """A sub-group's states that are one number, and the names of those that have one for every weight.

    Raises:
        UserError: there are others.
    """
    numbers, flat = {}, []
    for key, value in file[_STATES]["state"][group].items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            numbers[key] = value
        elif value.numel() == file[_FP32][group].numel():
            flat.append(key)
        else:
            raise UserError(
                f"{folder}: the optimizer's state {key!r} cannot be divided among another number of workers: set "
                f"training.num_workers={ranks} to go on"
            )
    return numbers, flat
