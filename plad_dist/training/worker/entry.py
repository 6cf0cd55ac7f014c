"""Where a training worker begins. It imports no more than it needs: a group that starts anew waits for it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from plad_dist.data.models import model_fingerprint
from plad_dist.training.agreement import from_rank_zero
from plad_dist.training.worker.loop import train_loop

_AFTER_A_DEATH_S = 5.0


def train_jobs(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every worker, again after every failure."""
    for job in settings["jobs"]:
        if from_rank_zero(partial(model_fingerprint, job.folder("models"))) != job.fingerprint:
            try:
                train_loop(job)
            except RuntimeError:
                # A broken connection, mostly: whoever died broke it, and is to be seen first.
                time.sleep(_AFTER_A_DEATH_S)
                raise
            if from_rank_zero(partial(job.storage.exists, job.stopped_key)):
                return
