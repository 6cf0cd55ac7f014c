"""A set of 64-bit hashes that takes 8 bytes per hash, for filters over a hundred million rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]


class HashSet:
    """Set of hashes in sorted runs, merged like a log-structured merge tree.

    Each run is at least twice as long as the next one. A lookup therefore searches few runs, and a
    hash is merged about `log2(len)` times at most.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def contains(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Return for every hash True if it is in the set."""
        is_member = np.zeros(len(hashes), dtype=bool)
        for run in self._runs:
            positions = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            is_member |= run[positions] == hashes
        return is_member

    def add(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Add hashes. Return for each True if it is new; of equal hashes, only the first is."""
        unique, first_positions = np.unique(hashes, return_index=True)
        is_absent = ~self.contains(unique)
        is_new = np.zeros(len(hashes), dtype=bool)
        is_new[first_positions[is_absent]] = True
        run = unique[is_absent]
        if len(run):
            while self._runs and len(self._runs[-1]) < 2 * len(run):
                run = np.concatenate([self._runs.pop(), run])
                run.sort(kind="stable")  # two sorted runs are merged in one pass
            self._runs.append(run)
        return is_new
