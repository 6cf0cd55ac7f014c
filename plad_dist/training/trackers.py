"""Experiment trackers beside TensorBoard, by packages that are installed only where they are wanted."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from plad_dist.config import fingerprint
from plad_dist.errors import UserError


class Tracker(Protocol):
    """Takes figures."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _WeightsAndBiases:
    """One run of W&B for each phase; project, entity and key come from its own environment variables."""

    def __init__(self, run: str, phase: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        name = run.rstrip("/").rpartition("/")[2]
        identity = f"{name}-{phase}-{fingerprint(run)[:8]}"  # runs of one name lie in other folders
        self._run = wandb.init(name=f"{name}/{phase}", id=identity, resume="allow")

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class _MlFlow:
    """One run of MLflow for each phase; the server comes from its own environment variables."""

    def __init__(self, run: str, phase: str) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=f"{run.rstrip('/').rpartition('/')[2]}/{phase}")

    def log(self, figures: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS: dict[str, Callable[[str, str], Tracker]] = {"wandb": _WeightsAndBiases, "mlflow": _MlFlow}


def check_trackers(names: Iterable[str]) -> None:
    """Raise :class:`UserError` for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.trackers: {name}: the package is not installed; install it, or leave it out")


def open_tracker(name: str, run: str, phase: str) -> Tracker:
    """The tracker of a phase. `run`: where the run lies."""
    return _TRACKERS[name](run, phase)
