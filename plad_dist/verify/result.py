"""Results of checking a run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from plad_dist.catalog import DatasetEntry
from plad_dist.data.dataset import Dataset


@dataclass(kw_only=True)
class CheckResult:
    """State of a dataset, or of the checkpoints of a phase.

    Attributes:
        command: `plad` command that completes the product.
        state: complete; incomplete, because a stage was interrupted or bad parts were set aside; or
            damaged.
        parts: number of readable parts. For checkpoints, of sound ones.
        rows: number of rows in the readable parts. For checkpoints, the latest sound step.
        problems: messages, each of which begins with the name of a part.
        bad: names of the parts that are missing or wrong.
        wrong_rows: names of the bad parts that are sound files with unexpected rows.
        unchecked: errors of the storage that kept parts from being checked.
        harmless: damages that change nothing, such as those of the journal, which is rebuilt.
        is_started: an incomplete dataset has a journal or parts that were set aside.
    """

    path: str
    command: str
    state: Literal["complete", "incomplete", "damaged"] = "incomplete"
    parts: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    wrong_rows: set[str] = field(default_factory=set)
    unchecked: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)
    is_started: bool = False

    def add_problem(self, part: str, problem: str) -> None:
        """Record that a part is bad. The message begins with the name of the part."""
        self.problems.append(problem)
        self.bad.add(part)

    def reset(self, state: Literal["complete", "incomplete"]) -> None:
        """Forget the problems once they are repaired."""
        self.problems, self.bad, self.wrong_rows, self.state = [], set(), set(), state


@dataclass(kw_only=True)
class DatasetResult(CheckResult):
    """State of a dataset.

    Attributes:
        entry: entry of the dataset in the catalog; None if the config does not account for it.
    """

    dataset: Dataset
    entry: DatasetEntry | None


@dataclass(kw_only=True)
class CheckpointsResult(CheckResult):
    """State of the checkpoints of a phase."""

    phase: str
