"""Report of `plad verify`: the table, the summary, the repair and the outcome of the command."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from plad_dist.errors import RunFailed
from plad_dist.untrusted import cell
from plad_dist.verify.repair import repair
from plad_dist.verify.result import CheckResult
from plad_dist.verify.run import verify


class Verification:
    """Result of checking a run directory, as `plad verify` reports and repairs it.

    Attributes:
        datasets: state of every dataset, and of the checkpoints of every phase.

    Raises:
        UserError: the folder is not a run directory.
    """

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self.datasets, self._other_problems = verify(run_dir)

    @property
    def problems(self) -> list[str]:
        """All problems of the run directory, one message each."""
        return [f"{item.path}: {text}" for item in self.datasets for text in item.problems] + self._other_problems

    @property
    def _unchecked(self) -> list[str]:
        """Errors of the storage that kept parts from being checked."""
        return [line for item in self.datasets for line in item.unchecked]

    def summary(self) -> str:
        """Return the problems, or the commands that complete the datasets if there are none."""
        notes = [f"{item.path}: {text}" for item in self.datasets for text in item.harmless]
        harmless = f"\nHarmless:{_indented(notes)}" if notes else ""
        if problems := self.problems:
            plural = "s" * (len(problems) > 1)
            return f"{self._run_dir}: {len(problems)} problem{plural}:{_indented(problems)}{harmless}"
        incomplete = [f"{item.path} (`plad {item.command}`)" for item in self.datasets if item.state == "incomplete"]
        suffix = f"; not complete yet: {', '.join(incomplete)}" if incomplete else ""
        return f"{self._run_dir}: nothing {'else ' if self._unchecked else ''}is wrong{suffix}{harmless}"

    def repair(self) -> str | None:
        """Set bad parts aside and return what was done; None if nothing could be repaired."""
        done = repair(self._run_dir, self.datasets)
        return f"Repaired; run again to redo:{_indented(done)}" if done else None

    def raise_for_problems(self, *, repaired: bool) -> None:
        """Raise :class:`RunFailed` if problems remain or parts could not be checked.

        Args:
            repaired: `repair` was called, so the problems that remain need the user.
        """
        if self._unchecked:
            raise RunFailed(f"{self._run_dir}: could not be checked in full:{_indented(self._unchecked)}")
        if not self.problems:
            return
        if repaired:
            raise RunFailed(f"{self._run_dir}: cannot be repaired here:{_indented(self.problems)}")
        if any(item.bad for item in self.datasets):
            raise RunFailed(
                f"{self._run_dir}: `plad verify {self._run_dir} --repair` sets bad parts aside; the next run redoes "
                "only their blocks"
            )
        raise RunFailed(f"{self._run_dir}: see above")


def _indented(lines: list[str], limit: int = 50) -> str:
    """Return at most `limit` lines, indented, and the number of omitted lines."""
    omitted = [f"and {len(lines) - limit:,} more"] if len(lines) > limit else []
    return "".join(f"\n  {line}" for line in [*lines[:limit], *omitted])


def verify_table(url: str, results: Sequence[CheckResult]) -> Table:
    """Return a table with a line for each dataset and for the checkpoints of each phase."""
    table = Table("dataset", "state", "readable parts", "rows or steps", title=cell(url))
    for result in results:
        table.add_row(cell(result.path), cell(result.state), f"{result.parts:,}", f"{result.rows:,}")
    return table
