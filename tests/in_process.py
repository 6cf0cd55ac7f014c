"""Pair jobs processed in this process, for tests of pairs and not of fleets."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from plad_dist.config import Config
from plad_dist.data.parts import Part
from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from plad_dist.fleet.protocol import Hints
from plad_dist.pairing.build import pair_worker_args
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.worker import PairJob, PairWorker
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir


def run_pair_jobs(jobs: Sequence[tuple[PairJob, list[int]]], config: Config, run: RunDir, progress: Progress) -> None:
    """Replace the function of the same name in `plad_dist.pairing.build`, which runs a fleet."""
    build_in_process(jobs, PairWorker(*pair_worker_args(config, run)), run.storage, progress)


def build_in_process(
    jobs: Sequence[tuple[PairJob, list[int]]], worker: PairWorker, storage: Storage, progress: Progress
) -> None:
    """Process the missing blocks of every job one after the other, and write the manifests.

    Committed blocks are not read.

    Args:
        jobs: each job with the number of prompts in each of its blocks.

    Raises:
        UserError: the worker cannot start, or the scorer is wrong.
        RunFailed: a block failed, or a job has no pair at all. Committed blocks are kept.
    """
    asyncio.run(_build_all(jobs, worker, storage, progress))


async def _build_all(
    jobs: Sequence[tuple[PairJob, list[int]]], worker: PairWorker, storage: Storage, progress: Progress
) -> None:
    committed = [job.dataset(storage).committed() for job, _ in jobs]
    missing = [
        [(block, prompts) for block, prompts in enumerate(units) if block not in parts]
        for (_, units), parts in zip(jobs, committed, strict=True)
    ]
    if any(missing) and (problem := await worker.start()) is not None:
        raise UserError(problem)
    progress.start("pair", sum(prompts for blocks in missing for _, prompts in blocks), "prompts")
    for (job, units), parts, blocks in zip(jobs, committed, missing, strict=True):
        dataset = job.dataset(storage)
        journal = dataset.journal(job.fingerprint)
        try:
            for block, prompts in blocks:
                result = await worker.work(job, block, uuid.uuid4().hex, Hints())
                journal.add(result.part)
                parts[block] = result.part
                progress.advance(prompts)
        finally:
            journal.flush()
        known_parts = [part for part in parts.values() if part is not None]
        dataset.finish(len(units), fingerprint=job.fingerprint, facts=_facts, known_parts=known_parts)
    await worker.stop()


def _facts(parts: Sequence[Part]) -> dict[str, Any]:
    return PairFacts.from_parts(parts).as_dict()
