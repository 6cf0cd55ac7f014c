"""Datasets that fleets fill: committed parts, error rows, progress, and the manifest at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from plad_dist.data.dataset import Dataset
from plad_dist.data.manifest import Manifest
from plad_dist.data.parts import Part
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.fleet.fleet import Fleet, Task
from plad_dist.fleet.protocol import BlockJob, BlockResult

_MAX_EXAMPLES = 3
_MIN_ROWS_TO_JUDGE = 100  # the share of error rows means nothing before that

ManifestFacts = Callable[[Sequence[Part]], dict[str, Any]]


class OutputDataset:
    """One incomplete dataset, filled by one fleet or several.

    Args:
        units: progress units (samples, prompts) of each block.

    Attributes:
        parts: committed blocks; the part is None if the journal does not know it.
        rows: rows of all known parts.
        errors: error rows among them.
        examples: messages of a few error rows that this driver saw.
    """

    def __init__(self, job: BlockJob, units: Sequence[int], storage: Storage) -> None:
        self.job, self.units = job, units
        self.dataset: Dataset = job.dataset(storage)
        self.journal = self.dataset.journal(job.fingerprint)
        self.parts: dict[int, Part | None] = self.dataset.resume(job.fingerprint)
        self.started = time.monotonic()
        self.examples: list[str] = []
        parts = self._known_parts()
        self.rows, self.errors = sum(part.rows for part in parts), sum(map(_errors, parts))

    @property
    def missing(self) -> list[int]:
        """Blocks that are not committed."""
        return [block for block in range(len(self.units)) if block not in self.parts]

    @property
    def is_complete(self) -> bool:
        """True if every block is committed."""
        return len(self.parts) >= len(self.units)

    def add(self, block: int, result: BlockResult) -> bool:
        """Record a committed block. Return False if it was recorded before."""
        if self.parts.get(block) is not None:
            return False
        self.parts[block] = result.part
        self.rows += result.part.rows
        self.errors += _errors(result.part)
        self.journal.add(result.part)
        if result.first_error and len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(result.first_error)
        return True

    def check_errors(self, max_error_share: float, *, is_final: bool) -> None:
        """Check the share of error rows, which counts the attempts of all drivers at this dataset.

        Args:
            is_final: also judge a dataset with few rows.

        Raises:
            RunFailed: the share is too large.
        """
        if self.errors > max_error_share * self.rows and (self.rows >= _MIN_ROWS_TO_JUDGE or is_final):
            worst = max(self._known_parts(), key=_errors).name
            examples = "".join(f"\n  {example}" for example in self.examples)
            raise RunFailed(
                f"{self.job.output}: {self.errors:,} of {self.rows:,} rows are errors, more than "
                f"sampling.max_error_share={max_error_share:g}.{' Examples:' if examples else ''}{examples}\n"
                "Committed blocks are kept. Fix the cause and delete the parts with errors "
                f"(such as {worst}) to sample them again, or raise sampling.max_error_share; then run again."
            )

    def finish(self, max_error_share: float, facts: ManifestFacts) -> Manifest:
        """Write the manifest.

        Raises:
            RunFailed: all parts together have too many error rows. No manifest is written.
        """
        seconds = round(time.monotonic() - self.started, 3)

        def checked_facts(parts: Sequence[Part]) -> dict[str, Any]:
            self.parts = dict(enumerate(parts))  # now with the parts that the journal did not know
            self.rows, self.errors = sum(part.rows for part in parts), sum(map(_errors, parts))
            self.check_errors(max_error_share, is_final=True)
            return facts(parts) | {"seconds": seconds}

        return self.dataset.finish(
            len(self.units), fingerprint=self.job.fingerprint, known_parts=self._known_parts(), facts=checked_facts
        )

    def _known_parts(self) -> list[Part]:
        return [part for part in self.parts.values() if part is not None]


class OutputDatasets:
    """All incomplete datasets of a stage, by path.

    Args:
        max_error_share: largest share of error rows of a dataset.
        facts: returns a manifest's facts for its parts.
    """

    def __init__(self, fleets: Iterable[Fleet], storage: Storage, max_error_share: float, facts: ManifestFacts) -> None:
        self._max_error_share, self._facts = max_error_share, facts
        self._incomplete: dict[str, OutputDataset] = {}
        for assignment in (assignment for fleet in fleets for assignment in fleet.assignments):
            job = assignment.job
            if job.output not in self._incomplete and job.dataset(storage).complete_as(job.fingerprint) is None:
                self._incomplete[job.output] = OutputDataset(job, assignment.units, storage)

    @property
    def missing_units(self) -> int:
        """Progress units of all blocks that are not committed."""
        return sum(output.units[block] for output in self._incomplete.values() for block in output.missing)

    @property
    def errors(self) -> int:
        """Error rows of all incomplete datasets."""
        return sum(output.errors for output in self._incomplete.values())

    def missing_tasks(self, fleet: Fleet) -> list[Task]:
        """Return the blocks of a fleet that are not committed."""
        tasks = []
        for index, assignment in enumerate(fleet.assignments):
            output = self._incomplete.get(assignment.job.output)
            if output is not None:
                blocks = (block for block in assignment.blocks if block not in output.parts)
                tasks += [Task(index, block, assignment.job.output) for block in blocks]
        return tasks

    def add(self, task: Task, result: BlockResult) -> int | None:
        """Record a committed block.

        Returns:
            Its progress units; None if it was recorded before, or its dataset is complete.
        """
        output = self._incomplete.get(task.output)
        if output is None or not output.add(task.block, result):
            return None
        return output.units[task.block]

    def check_errors(self, path: str) -> None:
        """Raise :class:`RunFailed` if the share of error rows of one dataset is too large."""
        self._incomplete[path].check_errors(self._max_error_share, is_final=False)

    def finish_complete(self) -> None:
        """Write the manifests of all datasets whose blocks are all committed.

        Raises:
            RunFailed: a dataset has too many error rows.
        """
        for path in [path for path, output in self._incomplete.items() if output.is_complete]:
            self._incomplete.pop(path).finish(self._max_error_share, self._facts)

    def keep_journals(self) -> None:
        """Write the last entries of the journals of all incomplete datasets, if storage allows."""
        for output in self._incomplete.values():
            output.journal.try_flush()


def _errors(part: Part) -> int:
    return part.counts.get("errors", 0)
