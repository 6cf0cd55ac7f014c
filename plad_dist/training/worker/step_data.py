"""Data of a global step: its groups, shared out among the ranks and packed into micro-batches.

The next step is read and packed in a thread while the current one is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from plad_dist.errors import UserError
from plad_dist.training.agreement import agreed
from plad_dist.training.batches.groups import GroupSource
from plad_dist.training.batches.micro_batch import Group, Layout, MicroBatch
from plad_dist.training.batches.packing import collate
from plad_dist.training.batches.schedule import assign_groups, step_groups
from plad_dist.training.job import PhaseJob


@dataclass(frozen=True)
class StepData:
    """Data of one global step for one rank.

    Attributes:
        micro_batches: micro-batches of this rank, each with the names of its groups.
        group_names: names of the groups of all ranks.
        tokens: tokens that all ranks compute, without padding.
    """

    micro_batches: list[tuple[MicroBatch, list[str]]]
    group_names: list[str]
    tokens: int


class RankShare:
    """Divides groups among the ranks by the token budget, and packs the share of this rank.

    Args:
        budget: most places of a micro-batch, padding included (`training.micro_batch_tokens`).
    """

    def __init__(self, layout: Layout, budget: int, rank: int, world: int) -> None:
        self._layout, self._budget, self._rank, self._world = layout, budget, rank, world

    def micro_batches(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Return the groups of each micro-batch of this rank.

        All ranks get the same number of micro-batches.

        Raises:
            UserError: a group exceeds the token budget.
        """
        sizes = [self._layout.places(group) for group in groups]
        if sizes and max(sizes) > self._budget:
            group = groups[int(np.argmax(sizes))]
            raise UserError(
                f"{group.name}: {self._layout.size_text(group)}, more than "
                f"training.micro_batch_tokens={self._budget:,}. Raise the key and run again: the phase resumes from "
                "its last checkpoint. In a new run, training.max_group_tokens can limit the groups"
            )
        shares = assign_groups(groups, self._layout, self._budget, self._world)
        return [[groups[index] for index in indices] for indices in shares[self._rank]]

    def tokens(self, groups: Sequence[Group]) -> int:
        """Return the number of tokens that the model computes for groups, without padding."""
        return sum(map(self._layout.tokens, groups))

    def pack(self, groups: Sequence[Group]) -> MicroBatch:
        """Pack the groups of a micro-batch."""
        return collate(groups, filler=0, layout=self._layout, budget=self._budget)


class StepLoader:
    """Loads the data of global steps, one step ahead."""

    def __init__(self, job: PhaseJob, groups: GroupSource, share: RankShare) -> None:
        self._job, self._groups, self._share = job, groups, share
        self._executor = ThreadPoolExecutor(1, "groups")
        self._prefetched: tuple[int, Future[StepData]] | None = None

    @property
    def number_of_groups(self) -> int:
        """Groups of the phase's dataset."""
        return len(self._groups)

    @property
    def changed_groups(self) -> Mapping[str, int]:
        """Numbers of groups that were `dropped` or `cut` for their length, or left out for a
        `control_token`."""
        return self._groups.changed

    def load(self, step: int) -> StepData:
        """Return the data of a step and start to prepare the next one.

        Raises:
            StoppedError: a group of the step cannot be trained on.
        """
        if self._prefetched is None or self._prefetched[0] != step:
            self._prefetched = (step, self._executor.submit(self._prepare, step))
        with agreed():
            data = self._prefetched[1].result()
        following = step + 1
        self._prefetched = (
            (following, self._executor.submit(self._prepare, following)) if following < self._job.steps else None
        )
        return data

    def close(self) -> None:
        """Cancel the preparation of the next step."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, step: int) -> StepData:
        job = self._job
        groups = self._groups.take(step_groups(len(self._groups), job.phase.batch_groups, job.seed, step))
        micro_batches = [
            (self._share.pack(members), [group.name for group in members])
            for members in self._share.micro_batches(groups)
        ]
        return StepData(micro_batches, [group.name for group in groups], self._share.tokens(groups))
