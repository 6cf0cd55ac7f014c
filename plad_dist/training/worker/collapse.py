"""The collapse record of a phase, as a worker reads it."""

from __future__ import annotations

from plad_dist.errors import RunFailed
from plad_dist.training.job import PhaseJob
from plad_dist.training.records.collapse import CollapseRecord, read_collapse_record


def read_record(job: PhaseJob) -> CollapseRecord | None:
    """Return the collapse record of a phase, or None if the phase is not watched or has no record.

    Raises:
        RunFailed: the record cannot be read.
    """
    return None if job.watch is None else read_collapse_record(job.storage, job.name, job.fingerprint)


def read_collapse(job: PhaseJob) -> CollapseRecord | None:
    """Return the record if it reports a collapse. Training continues if it cannot be read."""
    try:
        record = read_record(job)
    except RunFailed:
        return None
    return record if record is not None and record.collapse is not None else None
