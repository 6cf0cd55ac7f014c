"""Weights of a model that ZeRO-3 partitions while it is built.

- At a first start every rank reads its own elements of each parameter from the safetensors files.
  transformers would let one rank read all of them, and broadcast one parameter after the other.
- At a resume the parameters come from the checkpoint, so only the buffers are read.
- Weights that the config ties, but that differ in the files, stay apart (output layer of T5 1.1).
  transformers compares them too, but finds partitioned ones equal.
- transformers loads a model whose files do not hold its tensors one to one, such as some mixtures
  of experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from plad_dist.compat.deepspeed import OwnPartition, own_partition
from plad_dist.compat.pretrained import BuiltModel
from plad_dist.errors import UserError
from plad_dist.training.model.weight_files import StoredTensor, WeightFiles

logger = logging.getLogger("plad")


def load_weights(built: BuiltModel, *, from_checkpoint: bool) -> set[str] | None:
    """Fill a model from its files, on all ranks together.

    Args:
        from_checkpoint: leave out the parameters, which a checkpoint will fill.

    Returns:
        Names of the tensors that are in the files; None if transformers must load the model.
    """
    targets = built.targets()
    if not all(target.requires_grad for target in targets.values() if isinstance(target, Parameter)):
        from_checkpoint = False  # a checkpoint of another number of ranks lacks frozen parameters
    with WeightFiles(built.files) as files:
        names = built.names_in_model(files.tensors)
        sources = {
            target: files.tensors[name]
            for name, (target, _) in names.items()
            if not (from_checkpoint and isinstance(targets[target], Parameter))
        }
        reasons = [f"{name}: is converted" for name, is_converted in names.values() if is_converted and name in sources]
        reasons += filter(None, (_mismatch(name, targets[name], source) for name, source in sources.items()))
        reason = _agreed_reason(reasons, files.digest)
        stored = {target: files.tensors[name] for name, (target, _) in names.items()}
        differing = _differing_ties(built, stored)
        if reason is not None:
            if differing:
                raise UserError(
                    f"{built.files[0]}: {min(differing)} differs from the weight that it is tied to, which would be "
                    f"lost, because transformers must load the weights ({reason})"
                )
            logger.debug("transformers loads the weights: %s", reason)
            return None
        built.untie(differing)
        for name, source in sources.items():
            _fill(targets[name], source)
    return {target for target, _ in names.values()}


def _agreed_reason(reasons: list[str], digest: str) -> str | None:
    """Return the first reason of any rank to let transformers load, or None.

    If the nodes have copies of different models, slices of several models would be mixed.
    """
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (reasons[:1], digest))
    if len({digest for _, digest in outcomes}) > 1:
        return "the files differ between the ranks"
    return next((first[0] for first, _ in outcomes if first), None)


def _differing_ties(built: BuiltModel, stored: Mapping[str, StoredTensor]) -> set[str]:
    """Return the names of the weights that the config ties to others with different values.

    Args:
        stored: places of the tensors in the files, by their names in the model.
    """
    targets = built.targets()
    pairs = {name: source for name, source in built.ties.items() if name in stored and source in stored}
    own = {name for name, source in pairs.items() if _differ(targets[name], stored[name], stored[source])}
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, own)
    return set().union(*outcomes)


def _differ(target: Tensor, left: StoredTensor, right: StoredTensor) -> bool:
    """Return True if two stored tensors differ, at least in the elements that this rank keeps."""
    if (left.kind, left.shape) != (right.kind, right.shape):
        return True
    own = _own_elements(target)
    if own is None or left.dtype is None:
        return any(map(memoryview.__ne__, left.contents(), right.contents()))
    pieces = (tensor.pieces(own.start, own.start + len(own.elements)) for tensor in (left, right))
    return any(not torch.equal(one, other) for (_, one), (_, other) in zip(*pieces, strict=True))


def _mismatch(name: str, target: Tensor, source: StoredTensor) -> str | None:
    """Return the reason why a tensor cannot be filled from its file by offsets, or None."""
    own = _own_elements(target)
    if own is None:
        return f"{name}: is not divided evenly"
    if source.dtype is None or source.shape != own.shape:
        return f"{name}: the file has another shape or data type"
    return None


@torch.no_grad()
def _fill(target: Tensor, source: StoredTensor) -> None:
    """Copy this rank's elements of a parameter, or a whole buffer, from its file."""
    own = _own_elements(target)
    assert own is not None
    for first, piece in source.pieces(own.start, own.start + len(own.elements)):
        own.elements[first - own.start :][: len(piece)].copy_(piece)


def _own_elements(target: Tensor) -> OwnPartition | None:
    """Return the elements of a tensor that this rank keeps; None if they are no plain slice."""
    if isinstance(target, Parameter):
        return own_partition(target)
    return OwnPartition(target.shape, 0, target.view(-1)) if target.is_contiguous() else None
