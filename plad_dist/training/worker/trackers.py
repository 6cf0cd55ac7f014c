"""Experiment trackers beside TensorBoard, by packages that are installed only where they are wanted."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from plad_dist.errors import UserError
from plad_dist.fingerprint import fingerprint

_TAG = "plad.phase"
_NOT_IN_IDS = re.compile(r"[/\\#?%:']")


class Tracker(Protocol):
    """Takes figures."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _WeightsAndBiases:
    """One run of W&B for each phase; project, entity and key come from its own environment variables."""

    def __init__(self, run: str, phase: str, *, goes_on: bool) -> None:
        wandb: Any = importlib.import_module("wandb")
        # Without `resume`, a run of this id is overwritten.
        resume = "allow" if goes_on else None
        self._run = wandb.init(name=_name(run, phase), id=_identity(run, phase), resume=resume)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class _MlFlow:
    """One run of MLflow for each phase; server and experiment come from its own environment variables."""

    def __init__(self, run: str, phase: str, *, goes_on: bool) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        identity = _identity(run, phase)
        wanted = f"tags.`{_TAG}` = '{identity}'"
        if goes_on and (earlier := self._mlflow.search_runs(filter_string=wanted, max_results=1, output_format="list")):
            self._mlflow.start_run(run_id=earlier[0].info.run_id)
        else:
            self._mlflow.start_run(run_name=_name(run, phase), tags={_TAG: identity})

    def log(self, figures: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _name(run: str, phase: str) -> str:
    return f"{run.rstrip('/').rpartition('/')[2]}/{phase}"


def _identity(run: str, phase: str) -> str:
    """By which a phase that goes on finds what it has written before: runs of one name lie in other folders."""
    return f"{_NOT_IN_IDS.sub('-', _name(run, phase))}-{fingerprint('tracker run', run=run)[:8]}"


_TRACKERS: dict[str, Callable[..., Tracker]] = {"wandb": _WeightsAndBiases, "mlflow": _MlFlow}


def check_trackers(names: Iterable[str]) -> None:
    """Raise :class:`UserError` for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.trackers: {name}: the package is not installed; install it, or leave it out")


def open_tracker(name: str, run: str, phase: str, *, goes_on: bool) -> Tracker:
    """The tracker of a phase, of which steps were taken before where it `goes_on`. `run`: where the run lies."""
    return _TRACKERS[name](run, phase, goes_on=goes_on)
