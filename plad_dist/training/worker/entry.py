"""Entry point of a training worker.

It imports little, because every restart of a group waits for it.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from plad_dist.data.models import model_fingerprint
from plad_dist.training.agreement import from_rank_zero
from plad_dist.training.worker.loop import train_loop

_AFTER_A_DEATH_S = 5.0


def train_jobs(settings: dict[str, Any]) -> None:
    """Train the phases that have no model yet, in order.

    Ray Train calls this on every worker of every attempt.

    Args:
        settings: the jobs of the phases under `jobs`.
    """
    for job in settings["jobs"]:
        if from_rank_zero(partial(model_fingerprint, job.folder("models"))) != job.fingerprint:
            try:
                train_loop(job)
            except RuntimeError:
                # Mostly a connection that broke because another worker died, which must be
                # reported first.
                time.sleep(_AFTER_A_DEATH_S)
                raise
            if from_rank_zero(partial(job.storage.exists, job.stopped_key)):
                return
