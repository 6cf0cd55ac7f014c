"""Initial log-probabilities: log-likelihoods of the pairs' responses under the starting student.

Losses that compare with the starting student (`dpo`, `ipo`) read them. All ranks compute them once,
before the first step, so that no second model is ever in memory. They are a dataset beside the
pairs with one part for each part of the pairs, so that an interrupted pass resumes.
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
from plad_dist.training.agreement import from_rank_zero
from plad_dist.training.batches.groups import DataSpec, fit, group_counts, open_groups
from plad_dist.training.batches.micro_batch import Group
from plad_dist.training.batches.packing import collate
from plad_dist.training.batches.schedule import assign_groups
from plad_dist.training.job import PhaseJob


@torch.no_grad()
def write_initial_logps(spec: DataSpec, job: PhaseJob, engine: Any, device: torch.device) -> DataSpec:
    """Compute the initial log-probabilities that are not stored yet, on all ranks together.

    Args:
        engine: engine that still has the starting weights.

    Returns:
        The spec with the dataset of initial log-probabilities.
    """
    pairs = spec.dataset(job.storage)
    manifest = pairs.require("pair")
    parts = manifest.parts
    initial_logps, input_fingerprint = _dataset(spec, job)
    spec = replace(spec, initial_logps=initial_logps.path)
    is_first = dist.get_rank() == 0
    missing_blocks = _missing_blocks(initial_logps, len(parts))
    if missing_blocks is None:
        return spec
    plain = replace(spec, kind="pairs", initial_logps="", over_long="keep")  # row for row the pairs
    source = open_groups(plain, job.storage, job.start, job.settings)
    ends = np.cumsum([0, *group_counts(plain, parts)])
    engine.eval()
    committed: list[Part] = []
    for block in missing_blocks:
        groups = source.take(np.arange(ends[block], ends[block + 1]))
        fitted = [fit(group, spec) for group in groups]
        logps = _logps([group for group in fitted if group is not None], job, engine, device)
        if is_first:
            part, _ = initial_logps.commit(
                block, _table(groups, fitted, logps), fingerprint=input_fingerprint, attempt=uuid.uuid4().hex
            )
            committed.append(part)
    if is_first:
        initial_logps.finish(len(parts), fingerprint=input_fingerprint, facts={}, known_parts=committed)
    dist.barrier()
    return spec


def needs_starting_weights(job: PhaseJob) -> bool:
    """Return True if initial log-probabilities of a phase are not stored yet, on all ranks."""
    specs = [spec for spec in (job.data, job.heldout) if spec is not None and job.phase.loss.needs_initial_logps]
    return from_rank_zero(lambda: any(_dataset(spec, job)[0].manifest() is None for spec in specs))


def _dataset(spec: DataSpec, job: PhaseJob) -> tuple[Dataset, str]:
    """Return the dataset of the initial log-probabilities of pairs, and its fingerprint."""
    input_fingerprint = fingerprint(
        "initial logps",
        pairs=spec.dataset(job.storage).require("pair").contents,
        start=model_identity(job.start, job.settings),
        dtype=job.dtype,
        context=spec.context,
        longest=spec.limit_identity,
        shares=spec.layout.shares_prompts,
        over_long=spec.over_long,
    )
    return Dataset(job.storage, f"{spec.path}/initial-logps-{input_fingerprint[:12]}", INITIAL_LOGPS), input_fingerprint


def _missing_blocks(initial_logps: Dataset, blocks: int) -> list[int] | None:
    """Return the blocks without a part on all ranks, as the first rank sees them.

    Returns:
        None if the dataset is complete.
    """
    outcome: list[list[int] | None] = [None]
    if dist.get_rank() == 0 and initial_logps.manifest() is None:
        committed = initial_logps.committed()
        outcome = [[block for block in range(blocks) if block not in committed]]
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def _logps(groups: Sequence[Group], job: PhaseJob, engine: Any, device: torch.device) -> list[list[float]]:
    """Return the log-likelihoods of every group's responses, on all ranks.

    Each rank computes its share.
    """
    layout, budget = engine.module.attention.layout, job.micro_batch_tokens
    shares = assign_groups(groups, layout, budget, dist.get_world_size())
    own: dict[int, list[float]] = {}
    for indices in shares[dist.get_rank()]:
        batch = collate([groups[index] for index in indices], filler=0, layout=layout, budget=budget).to(device)
        logps = engine(batch).tolist()
        for index in indices:
            count = len(groups[index].responses)
            own[index], logps = logps[:count], logps[count:]
    by_rank: list[dict[int, list[float]]] = [{} for _ in shares]
    dist.all_gather_object(by_rank, own)
    by_group = {index: logps for of_rank in by_rank for index, logps in of_rank.items()}
    return [by_group[index] for index in range(len(groups))]


def _table(groups: Sequence[Group], fitted: Sequence[Group | None], logps: list[list[float]]) -> pa.Table:
    """Return a row for every pair of a block, in order; NaN if its group is not trained on."""
    remaining = iter(logps)
    rows: list[tuple[str, float, float]] = []
    for group, trained in zip(groups, fitted, strict=True):
        of_group = next(remaining) if trained is not None else [math.nan] * len(group.responses)
        rows += [(group.prompt_id, of_group[chosen], of_group[rejected]) for chosen, rejected, _ in group.pairs]
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), INITIAL_LOGPS, strict=True)]
        if rows
        else [pa.array([], field.type) for field in INITIAL_LOGPS],
        schema=INITIAL_LOGPS,
    )
