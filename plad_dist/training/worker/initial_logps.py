"""Log-likelihoods of the pairs' responses by the student before calibration, once, as columns beside the pairs.

Losses that compare with the starting student (`dpo`, `ipo`) read them; a second model is never in memory.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from plad_dist.data.dataset import Dataset
from plad_dist.data.models import model_identity
from plad_dist.data.parts import Part
from plad_dist.data.schemas import INITIAL_LOGPS
from plad_dist.fingerprint import fingerprint
from plad_dist.training.batches.groups import DataSpec, fit, group_counts, open_groups
from plad_dist.training.batches.micro_batch import Group
from plad_dist.training.batches.packing import collate
from plad_dist.training.batches.schedule import assign_groups
from plad_dist.training.job import PhaseJob


@torch.no_grad()
def write_initial_logps(spec: DataSpec, job: PhaseJob, engine: Any, device: torch.device) -> DataSpec:
    """Make the columns that are not there yet, on all ranks together, while the engine still has the starting weights.

    They are a dataset of their own beside the pairs, a part for each part of the pairs, so that an interrupted pass goes on.

    Returns the spec with the dataset in it.
    """
    pairs = spec.dataset(job.storage)
    manifest = pairs.require("pair")
    input_fingerprint = fingerprint(
        "initial logps",
        pairs=manifest.contents,
        start=model_identity(job.start, job.settings),
        dtype=job.dtype,
        context=spec.context,
        longest=spec.max_group_tokens,
        shares=spec.shares_prompts,
        over_long=spec.over_long,
    )
    initial_logps = Dataset(job.storage, f"{spec.path}/initial-logps-{input_fingerprint[:12]}", INITIAL_LOGPS)
    spec = replace(spec, initial_logps=initial_logps.path)
    first = dist.get_rank() == 0
    todo: list[Any] = [None]
    if first and initial_logps.manifest() is None:
        there = initial_logps.committed()
        todo = [[block for block in range(len(manifest.parts)) if block not in there]]
    dist.broadcast_object_list(todo, src=0)
    if todo[0] is None:
        return spec
    plain = replace(spec, kind="pairs", initial_logps="", over_long="keep")  # row for row of the pairs
    source = open_groups(plain, job.storage, job.start, job.settings)
    counts = group_counts(plain, manifest.parts)
    ends = np.cumsum([0, *counts])
    engine.eval()
    written: list[Part] = []
    for block in todo[0]:
        groups = source.take(np.arange(ends[block], ends[block + 1]))
        fitted = [fit(group, spec) for group in groups]
        values = _logps([group for group in fitted if group is not None], job, engine, device)
        if first:
            table = _table(groups, fitted, values)
            written.append(
                initial_logps.commit(block, table, fingerprint=input_fingerprint, attempt=uuid.uuid4().hex)[0]
            )
    if first:
        initial_logps.finish(len(manifest.parts), fingerprint=input_fingerprint, facts={}, known_parts=written)
    dist.barrier()
    return spec


def _logps(groups: Sequence[Group], job: PhaseJob, engine: Any, device: torch.device) -> list[list[float]]:
    """Log-likelihoods of the responses of every group, on all ranks; each rank computes its share."""
    layout = engine.module.attention.layout
    shares = assign_groups([layout.tokens(group) for group in groups], job.micro_batch_tokens, dist.get_world_size())
    mine: dict[int, list[float]] = {}
    for share in shares[dist.get_rank()]:
        batch = collate([groups[index] for index in share], filler=0, layout=layout).to(device)
        logps = engine(batch).tolist()
        for index in share:
            count = len(groups[index].responses)
            mine[index], logps = logps[:count], logps[count:]
    found: list[dict[int, list[float]]] = [{} for _ in shares]
    dist.all_gather_object(found, mine)
    together = {index: values for part in found for index, values in part.items()}
    return [together[index] for index in range(len(groups))]


def _table(groups: Sequence[Group], fitted: Sequence[Group | None], values: list[list[float]]) -> pa.Table:
    """A row for every pair of the block, in its order; NaN for groups that are not trained on."""
    left = iter(values)
    rows: list[tuple[str, float, float]] = []
    for group, used in zip(groups, fitted, strict=True):
        logps = next(left) if used is not None else [math.nan] * len(group.responses)
        rows += [(group.prompt_id, logps[chosen], logps[rejected]) for chosen, rejected, _ in group.pairs]
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), INITIAL_LOGPS, strict=True)]
        if rows
        else [pa.array([], field.type) for field in INITIAL_LOGPS],
        schema=INITIAL_LOGPS,
    )
