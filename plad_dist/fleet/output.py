"""A dataset that fleets fill: what of it is committed, its errors, its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Journal, Manifest, Part
from plad_dist.errors import RunFailed
from plad_dist.fleet.protocol import BlockJob, BlockResult

_EXAMPLES = 3


class OutputDataset:
    """One dataset on its way to completion, possibly by several fleets."""

    def __init__(self, job: BlockJob, units: Sequence[int], storage: Storage) -> None:
        self.job, self.units = job, units
        self.dataset: Dataset = job.dataset(storage)
        self.journal = Journal(self.dataset, job.fingerprint)
        self.parts: dict[int, Part | None] = self.dataset.resume(job.fingerprint)
        self.started = time.monotonic()
        self.examples: list[str] = []
        known = [part for part in self.parts.values() if part is not None]
        self.rows, self.errors = sum(part.rows for part in known), sum(_errors(part) for part in known)

    @property
    def missing(self) -> list[int]:
        return [block for block in range(len(self.units)) if block not in self.parts]

    @property
    def complete(self) -> bool:
        return len(self.parts) >= len(self.units)

    def add(self, block: int, result: BlockResult) -> bool:
        """Note a committed block. False: it was known already."""
        if self.parts.get(block) is not None:
            return False
        self.parts[block] = result.part
        self.rows += result.part.rows
        self.errors += _errors(result.part)
        self.journal.add(result.part)
        if result.first_error and len(self.examples) < _EXAMPLES:
            self.examples.append(result.first_error)
        return True

    def check_errors(self, allowed: float, *, at_end: bool) -> None:
        """Raise :class:`RunFailed` where too many rows are error rows, over all attempts at this dataset."""
        if self.errors > allowed * self.rows and (self.rows >= 100 or at_end):
            worst = max((part for part in self.parts.values() if part), key=_errors).name
            examples = "".join(f"\n  {example}" for example in self.examples)
            raise RunFailed(
                f"{self.job.output}: {self.errors:,} of {self.rows:,} rows are errors, more than sampling.max_error_share={allowed:g}."
                f"{' Examples:' if examples else ''}{examples}\nWhat is committed is kept. Mend the cause and delete the parts "
                f"with errors (such as {worst}) to have them done again, or raise sampling.max_error_share; then run again."
            )

    def finish(self, allowed: float, facts: Callable[[Sequence[Part]], dict[str, Any]]) -> Manifest:
        """Write the manifest. Raises :class:`RunFailed`, and writes none, where all parts together have too many errors."""
        seconds = round(time.monotonic() - self.started, 3)

        def checked(parts: Sequence[Part]) -> dict[str, Any]:
            self.parts = dict(enumerate(parts))  # those that the journal lacked too
            self.rows, self.errors = sum(part.rows for part in parts), sum(map(_errors, parts))
            self.check_errors(allowed, at_end=True)
            return facts(parts) | {"seconds": seconds}

        known = [part for part in self.parts.values() if part is not None]
        return self.dataset.finish(len(self.units), fingerprint=self.job.fingerprint, known=known, facts=checked)


def _errors(part: Part) -> int:
    return part.counts.get("errors", 0)
