"""Schedule of the groups: their order over the global steps, and their workers and micro-batches.

Both are pure functions. A global step has the same groups at every number of workers, so an elastic
worker group trains the same student at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


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


def assign_groups(tokens: Sequence[int], budget: int, workers: int) -> list[list[list[int]]]:
    """Assign the groups of a global step to workers and micro-batches.

    All workers have the same number of micro-batches, because the collectives of ZeRO-3 must match.
    Some micro-batches may be empty. None exceeds `budget` tokens unless it holds a single group.
    Groups of similar length share a micro-batch, so that little is padded. Micro-batches that the
    workers compute at the same time have a similar number of tokens.

    Args:
        tokens: computed tokens of each group.
        budget: most tokens of a micro-batch.

    Returns:
        Indices of groups as ``[worker][micro-batch]``.
    """
    longest_first = sorted(range(len(tokens)), key=lambda index: (-tokens[index], index))
    rounds = max(1, -(-sum(min(size, budget) for size in tokens) // (budget * workers)))
    while (micro_batches := _cut(longest_first, tokens, budget, rounds * workers)) is None:
        rounds += 1
    return [micro_batches[worker::workers] for worker in range(workers)]


def _cut(order: Sequence[int], tokens: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Cut `order` into `count` runs of similar size, or return None if one exceeds the budget."""
    runs: list[list[int]] = [[] for _ in range(count)]
    current, load, unassigned = 0, 0, sum(tokens)
    for index in order:
        even_share = (load + unassigned) / (count - current)  # of this run and those after it
        passes_share = load + tokens[index] / 2 > even_share
        if load and current < count - 1 and (passes_share or load + tokens[index] > budget):
            current, load = current + 1, 0
        runs[current].append(index)
        load += tokens[index]
        unassigned -= tokens[index]
        if load > budget and len(runs[current]) > 1:
            return None
    return runs
