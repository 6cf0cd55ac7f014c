"""Experiment trackers beside TensorBoard.

Their packages are optional and imported when a tracker is opened.
"""

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
    """Receives the figures of a phase."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Log the figures of a step."""

    def close(self) -> None:
        """End the tracker's run."""


class _WeightsAndBiases:
    """One W&B run per phase. Project, entity and key come from W&B's own environment variables."""

    def __init__(self, run: str, phase: str, *, resumes: bool) -> None:
        wandb: Any = importlib.import_module("wandb")
        # Without `resume`, W&B overwrites a run of the same id.
        resume = "allow" if resumes else None
        self._run = wandb.init(name=_name(run, phase), id=_identity(run, phase), resume=resume)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class _MlFlow:
    """One MLflow run per phase. Server and experiment come from MLflow's environment variables."""

    def __init__(self, run: str, phase: str, *, resumes: bool) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        identity = _identity(run, phase)
        query = f"tags.`{_TAG}` = '{identity}'"
        if resumes and (earlier := self._mlflow.search_runs(filter_string=query, max_results=1, output_format="list")):
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
    """Return the id by which a resumed phase finds its run.

    It contains a hash of the URL, because several run directories can have one name.
    """
    return f"{_NOT_IN_IDS.sub('-', _name(run, phase))}-{fingerprint('tracker run', run=run)[:8]}"


_TRACKERS: dict[str, Callable[..., Tracker]] = {"wandb": _WeightsAndBiases, "mlflow": _MlFlow}


def check_trackers(names: Iterable[str]) -> None:
    """Raise :class:`UserError` if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.trackers: {name}: the package is not installed; install it, or remove the entry")


def open_tracker(name: str, run: str, phase: str, *, resumes: bool) -> Tracker:
    """Open the tracker of a phase.

    Args:
        run: URL of the run directory.
        resumes: True if steps of the phase were logged before, to continue the tracker's run.
    """
    return _TRACKERS[name](run, phase, resumes=resumes)
