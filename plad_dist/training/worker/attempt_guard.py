"""Conditions under which a worker group must end: failures without progress, and a later attempt.

All ranks call these checks together and raise the same exception.
"""

from __future__ import annotations

from plad_dist.data.claims import owner_problem
from plad_dist.errors import RunFailed
from plad_dist.training.agreement import StoppedError, from_rank_zero
from plad_dist.training.checkpoints.attempts import Attempt
from plad_dist.training.checkpoints.saving import Checkpoints
from plad_dist.training.job import PhaseJob

ATTEMPTS = "attempts"  # folder of the claims under events/<phase>/
MAX_STALLS = 5  # failures in a row without a new checkpoint


def stop_if_stalled(job: PhaseJob, attempt: Attempt, step: int | None) -> None:
    """Raise :class:`StoppedError` if attempt after attempt fails before a further checkpoint.

    Args:
        step: step from which this attempt resumes; None before its checkpoint is read.
    """
    failures = from_rank_zero(lambda: attempt.failures_before(step))
    if failures >= MAX_STALLS:
        point = "before they had loaded the model" if step is None else f"before the first checkpoint after step {step}"
        raise StoppedError(
            f"phase {job.name}: {failures} attempts in a row have failed {point}. The lines above and the workers' "
            "logs in Ray's session folder state the causes. If nodes leave that often, lower checkpoint_every or "
            "checkpoint_seconds of the phase. Run again to resume."
        )


def stop_if_superseded(job: PhaseJob, attempt: Attempt, checkpoints: Checkpoints) -> None:
    """End this attempt if the last check of `checkpoints` has found a later one.

    Raises:
        RunFailed: the later attempt belongs to the same command.
        StoppedError: the later attempt belongs to another command.
    """
    launch = from_rank_zero(lambda: checkpoints.superseded)
    if launch == job.launch:
        raise RunFailed(f"phase {job.name}: attempt {attempt.number} ends: a later attempt has started")
    if launch is not None:
        if (problem := from_rank_zero(lambda: owner_problem(job.storage))) is not None:
            raise StoppedError(f"phase {job.name}: {problem}")
        raise StoppedError(
            f"phase {job.name}: another command has started to train in {job.storage.url} and resumes from the latest "
            "checkpoint; this command ends and writes nothing more"
        )
