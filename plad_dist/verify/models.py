"""Check of models and checkpoints by their checksums, and of figures by their sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from plad_dist.catalog import ModelEntry
from plad_dist.data.models import DamagedModel, model_marker, model_problems
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.evaluation.document import SystemRow, load_metrics
from plad_dist.phases import round_phase
from plad_dist.rundir import RunDir
from plad_dist.training.checkpoints.store import Checkpoint, CheckpointStore, DamagedCheckpoint, step_name
from plad_dist.verify.result import CheckpointsResult


def check_models(run: RunDir, models: Iterable[ModelEntry]) -> Iterator[str]:
    """Yield the problems of every finished model, whose files are read in full.

    Raises:
        RunFailed: the file system failed.
    """
    root = run.storage.local_root
    for model in models:
        try:
            is_finished = root is not None and model_marker(root / model.path) is not None
            problems = model_problems(root / model.path) if root is not None and is_finished else []
        except DamagedModel as error:
            yield str(error).removeprefix(f"{root}/")
            continue
        for problem in problems:
            yield (
                f"{model.path}: {problem}. Delete {model.path} and run again: the model is rebuilt, a trained one from "
                "its last checkpoint"
            )


def check_figures(run: RunDir, rounds: int) -> Iterator[str]:
    """Yield problems of figures: unreadable files, and missing responses and models behind them."""
    for number in range(rounds):
        at_round = run.at_round(number)
        try:
            metrics = load_metrics(at_round)
        except RunFailed:
            yield (
                f"{at_round.metrics}: not valid JSON, or no figures. Delete it and run `plad evaluate` again, which "
                "rebuilds it from the samples"
            )
            continue
        for path in _missing_sources(at_round, metrics.systems) if metrics is not None else ():
            yield (
                f"{path}: missing, though {at_round.metrics} was made from it. Restore it from a copy; or delete "
                f"{at_round.metrics} and run again, which rebuilds both"
            )


def _missing_sources(run: RunDir, rows: Sequence[SystemRow]) -> Iterator[str]:
    """Yield the paths of missing responses and models that the rows of the figures refer to."""
    for row in rows:
        path = run.system_samples(row.system, row.decoding).path
        if not run.storage.sizes(path):
            yield path
    phase = round_phase(run.round)
    if rows and not _is_finished(run.model(phase)):
        yield f"models/{phase}"


def _is_finished(folder: Path) -> bool:
    """Return True if a model is complete or its marker is damaged, which is reported as such."""
    try:
        return model_marker(folder) is not None
    except DamagedModel:
        return True


def check_checkpoints(storage: Storage, phases: Iterable[str]) -> Iterator[CheckpointsResult]:
    """Check committed checkpoints by checksums, and yield a result for each phase that has any."""
    for phase in phases:
        store = CheckpointStore(storage, phase, None)
        result = CheckpointsResult(path=store.folder, command="train", state="complete", phase=phase)
        for step in store.steps():
            checkpoint, problem = _check_checkpoint(store, step)
            if problem is not None and store.is_committed(step):  # not pruned in the meantime
                name = step_name(step)
                result.add_problem(name, f"{name}: {problem}. Training skips it and resumes from the one before")
            elif checkpoint is not None:
                result.parts, result.rows = result.parts + 1, max(result.rows, step)
        if result.problems:
            result.state = "damaged"
        if result.parts or result.problems:
            yield result


def is_damaged(store: CheckpointStore, step: int) -> bool:
    """Return True if a checkpoint is committed and damaged."""
    return _check_checkpoint(store, step)[1] is not None


def _check_checkpoint(store: CheckpointStore, step: int) -> tuple[Checkpoint | None, str | None]:
    """Return the checkpoint of a step, if it can be read, and its problem, if it has one."""
    try:
        checkpoint = store.at(step)
    except DamagedCheckpoint as error:
        return None, str(error)
    if checkpoint is None:
        return None, None
    return checkpoint, store.size_problem(checkpoint) or store.checksum_problem(checkpoint)
