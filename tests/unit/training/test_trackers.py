"""Experiment trackers: which run of a tracker a phase writes to."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from plad_dist.training.worker.trackers import open_tracker


class FakeMlFlow:
    """Runs by number, each with its tags and steps."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.active: dict[str, Any] = {}

    def search_runs(self, filter_string: str, **_: Any) -> list[Any]:
        numbers = [
            number
            for number, run in enumerate(self.runs)
            if filter_string == f"tags.`plad.phase` = '{run['identity']}'"
        ]
        return [SimpleNamespace(info=SimpleNamespace(run_id=number)) for number in reversed(numbers)]

    def start_run(self, run_id: int | None = None, run_name: str = "", tags: dict[str, str] | None = None) -> None:
        if run_id is None:
            self.runs.append({"name": run_name, "identity": (tags or {})["plad.phase"], "steps": []})
        self.active = self.runs[-1 if run_id is None else run_id]

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        self.active["steps"].append(step)

    def end_run(self) -> None:
        self.active = {}


def test_a_resumed_phase_continues_its_run_and_one_that_restarts_opens_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeMlFlow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    for run, resumes, steps in (
        ("/a/it's one", False, [1, 2]),
        ("/b/it's one", False, [1]),
        ("/a/it's one", True, [2, 3]),
        ("/a/it's one", False, [1]),
        ("/a/it's one", True, [2]),
    ):
        tracker = open_tracker("mlflow", run, "round-0", resumes=resumes)
        for step in steps:
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    assert [(run["name"], run["steps"]) for run in fake.runs] == [
        ("it's one/round-0", [1, 2, 2, 3]), ("it's one/round-0", [1]), ("it's one/round-0", [1, 2]),
    ]  # fmt: skip
    assert not any("'" in run["identity"] or "/" in run["identity"] for run in fake.runs)
