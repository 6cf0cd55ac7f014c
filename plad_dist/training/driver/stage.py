"""Stage `train`: plan the phases, train those without a model, report why training stopped.

Ray Train and DeepSpeed are imported only when something must be trained, so that a finished run is
skipped quickly.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace

from plad_dist.config import Config
from plad_dist.data.models import model_fingerprint, model_marker
from plad_dist.data.prompts import train_prompts
from plad_dist.errors import RunFailed, UserError
from plad_dist.phases import TEACHER, WARMUP
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.training.plan import phase_inputs, plan_phase


def are_trained(names: Sequence[str], config: Config, run: RunDir) -> bool:
    """Return True if all phases have their models.

    Raises:
        UserError: a model was trained by another config, or from another model or other data.
    """
    markers = {name: model_marker(run.model(name)) for name in names}
    for name, marker in markers.items():
        trained_from = marker["facts"].get("inputs") if marker is not None else None
        if trained_from is not None and phase_inputs(name, config, run) not in (None, trained_from):
            raise UserError(
                f"{run.model(name)}: trained by another config, or from another model or other data. Nothing was "
                "changed; restore them, or use another run.dir"
            )
    return None not in markers.values()


def require_inputs(names: Sequence[str], config: Config, run: RunDir) -> None:
    """Raise :class:`UserError` if the training data of a phase is missing."""
    if set(names) - {TEACHER, WARMUP}:
        run.pairs().require("pair")
    else:
        train_prompts(run.storage).require("prepare")
    if WARMUP in names and config.training.warmup is not None and config.training.warmup.data == "teacher":
        run.samples("teacher").require("sample")


def train_phases(names: Sequence[str], config: Config, run: RunDir, progress: Progress) -> None:
    """Train phases to their ends and export their models, in order.

    Phases that have their models are skipped.

    Raises:
        UserError: inputs are missing, or belong to another config.
        RunFailed: training failed more often than allowed, or must not continue.
    """
    jobs = [plan_phase(name, config, run) for name in names]
    launch = uuid.uuid4().hex[:12]
    jobs = [replace(job, launch=launch) for job in jobs if model_fingerprint(run.model(job.name)) != job.fingerprint]
    if jobs:
        from plad_dist.training.driver.launch import fit

        jobs[0].checkpoints.check_writable()
        fit(jobs, config, run, progress)
    for job in jobs:
        stop = run.storage.read_json(job.stopped_key)
        if stop is not None:
            run.storage.delete(job.stopped_key)
            raise (UserError if stop["by_user"] else RunFailed)(stop["message"])
