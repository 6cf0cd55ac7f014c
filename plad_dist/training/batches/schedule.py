"""Schedule of the groups: their order over the global steps, and their workers and micro-batches.

Both are pure functions. A global step has the same groups at every number of workers, so an elastic
worker group trains the same student at every size.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from plad_dist.training.batches.micro_batch import Group, Layout
from plad_dist.training.batches.placement import place


def step_groups(count: int, batch: int, seed: int, step: int) -> NDArray[np.uint32]:
    """Return the indices of the groups of one global step.

    Every epoch is a permutation of all groups. Its last step takes the remaining groups, which may
    be fewer than `batch`.

    Args:
        count: number of groups of the phase.
        batch: groups per global step.
        seed: seed of the run; the order of an epoch depends on the seed and the epoch.
        step: index of the global step, counted from the start of the phase.
    """
    epoch, position = divmod(step, steps_per_epoch(count, batch))
    return _epoch_order(count, seed, epoch)[position * batch : (position + 1) * batch]


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    return np.random.default_rng([seed, epoch]).permutation(np.arange(count, dtype=np.uint32))


def steps_per_epoch(count: int, batch: int) -> int:
    """Return the number of global steps that take every group once."""
    return -(-count // batch)


def assign_groups(groups: Sequence[Group], layout: Layout, budget: int, workers: int) -> list[list[list[int]]]:
    """Assign the groups of a global step to workers and micro-batches.

    All workers have the same number of micro-batches, because the collectives of ZeRO-3 must match.
    Some micro-batches may be empty. None exceeds the budget unless it holds a single group. Groups
    of similar length share a micro-batch, so that little is padded. Micro-batches that the workers
    compute at the same time have a similar size.

    Args:
        groups: groups of at least one token.
        budget: most places of a micro-batch, padding included.

    Returns:
        Indices of groups as ``[worker][micro-batch]``.
    """
    sizes = [layout.places(group) for group in groups]
    rows = [1 if layout.shares_prompts else len(group.responses) for group in groups]
    longest_first = sorted(range(len(groups)), key=lambda index: (-(sizes[index] // rows[index]), -sizes[index], index))

    def fits(indices: Sequence[int]) -> bool:
        if len(indices) < 2:
            return True
        return place([groups[index] for index in indices], layout, budget).places <= budget

    def fit(rounds: int) -> bool:
        return all(map(fits, _cut(longest_first, sizes, rounds * workers)))

    # The more rounds, the smaller the micro-batches; in the end, each has one group.
    least = most = max(1, -(-sum(min(size, budget) for size in sizes) // (budget * workers)))
    while not fit(most):
        least, most = most + 1, 2 * most
    rounds = least + bisect.bisect_left(range(least, most), True, key=fit)
    micro_batches = _cut(longest_first, sizes, rounds * workers)
    return [micro_batches[worker::workers] for worker in range(workers)]


def _cut(order: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Cut `order` into `count` runs of similar size."""
    runs: list[list[int]] = [[] for _ in range(count)]
    current, load, unassigned = 0, 0, sum(sizes)
    for index in order:
        even_share = (load + unassigned) / (count - current)  # of this run and those after it
        if load and current < count - 1 and load + sizes[index] / 2 > even_share:
            current, load = current + 1, 0
        runs[current].append(index)
        load += sizes[index]
        unassigned -= sizes[index]
    return runs
