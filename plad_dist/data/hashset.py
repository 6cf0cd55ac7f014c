"""A set of 64-bit hashes in 8 bytes each, for filters over a hundred million rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]


class HashSet:
    """Hashes in sorted runs, merged as they grow like a log-structured set: each at least twice as long as the next.

    So there are few runs to look into, and every hash is merged only some `log2(len)` times.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def holds(self, hashes: Hashes) -> NDArray[np.bool_]:
        """For every hash, whether it is in the set."""
        found = np.zeros(len(hashes), dtype=bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[at] == hashes
        return found

    def add(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Add hashes; for every one, whether it is new. Of equal ones among them the first is."""
        unique, first = np.unique(hashes, return_index=True)
        fresh = ~self.holds(unique)
        new = np.zeros(len(hashes), dtype=bool)
        new[first[fresh]] = True
        run = unique[fresh]
        if len(run):
            while self._runs and len(self._runs[-1]) < 2 * len(run):
                run = np.concatenate([self._runs.pop(), run])
                run.sort(kind="stable")  # two sorted runs are merged in one pass
            self._runs.append(run)
        return new
