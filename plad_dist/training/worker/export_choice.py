"""Choice of the weights that become the model of a phase."""

from __future__ import annotations

from dataclasses import dataclass

from plad_dist.training.agreement import StoppedError
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.job import PhaseJob
from plad_dist.training.records.collapse import CollapseRecord


@dataclass(frozen=True)
class ExportChoice:
    """Weights to export.

    Attributes:
        step: step of the checkpoint to load first; None for the present weights.
        quality: why that checkpoint is chosen, as an adjective.
    """

    step: int | None
    quality: str


def choose_export(job: PhaseJob, state: TrainState, collapse: CollapseRecord | None) -> ExportChoice:
    """Choose the weights to export.

    After a collapse, export the latest sound checkpoint. Otherwise `export` decides between the
    best checkpoint and the present weights.

    Raises:
        StoppedError: the student has collapsed and no sound checkpoint is left.
    """
    if collapse is None:
        step = state.best_step if job.phase.export == "best" else None
        return ExportChoice(None if step == state.step else step, "best")
    if collapse.sound is None:
        raise StoppedError(
            f"phase {job.name}: the student has collapsed: {collapse.collapse}; no sound checkpoint is left. Set other "
            "bounds in training.watch and run again, or train in another run.dir with a lower optimizer.lr or a larger "
            "loss.mle_weight"
        )
    return ExportChoice(None if collapse.sound == state.step else collapse.sound, "latest sound")
