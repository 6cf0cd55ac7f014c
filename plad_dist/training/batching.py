"""Groups into micro-batches: every prompt computed once, nothing padded but row ends.

A *group* is a prompt and its responses. In a row, a group's tokens are the prompt's, then each response's but its last
(which predicts nothing). A response sees the prompt and itself, never its siblings or other groups (the tree mask), and
its positions go on from the prompt's end, so that its log-likelihood is that of the sequence standing alone.

Shapes: R rows, T tokens of a row, N predicted tokens, B groups, K responses per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Attention over a row costs the square of its length, so short groups go into several shorter rows.
_ROW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its responses, as token ids. The first response is the chosen one."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Tokens that the model computes."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass of one worker takes.

    Attributes:
        input_ids_RT, position_ids_RT: the rows.
        segments_RT: which group a token belongs to; -1 is padding.
        branches_RT: 0 for prompt tokens, k for tokens of the k-th response.
        predictors_N: flat index into ``R * T`` of the position that predicts each response token.
        targets_N: the predicted tokens.
        responses_N: flat index into ``B * K`` of the response of each predicted token.
        lengths_BK: response tokens.
        groups: B; 0 for a micro-batch that only keeps the ranks in step.
        tokens: tokens computed, padding left out.
    """

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    segments_RT: Tensor
    branches_RT: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    responses_N: Tensor
    lengths_BK: Tensor
    groups: int
    tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        moved = {name: getattr(self, name) for name in self.__slots__}
        return MicroBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


def tree_mask(segments_RT: Tensor, branches_RT: Tensor) -> Tensor:
    """Which position sees which: boolean ``[R, 1, T, T]``, True where attention is allowed."""
    same_group = segments_RT[:, :, None] == segments_RT[:, None, :]
    prompt_or_own = (branches_RT[:, None, :] == 0) | (branches_RT[:, :, None] == branches_RT[:, None, :])
    causal = torch.ones(segments_RT.shape[1], segments_RT.shape[1], dtype=torch.bool, device=segments_RT.device).tril()
    return (same_group & prompt_or_own & causal)[:, None]


def step_groups(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices of the groups of one global step: a pure function of (seed, epoch, step), whatever the number of workers.

    An epoch is a permutation of all groups; its last step takes what is left.
    """
    per_epoch = steps_per_epoch(count, batch)
    epoch, position = divmod(step, per_epoch)
    return _epoch_order(count, seed, epoch)[position * batch : (position + 1) * batch]


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def steps_per_epoch(count: int, batch: int) -> int:
    """Global steps that see every group once."""
    return -(-count // batch)


def share_out(groups: Sequence[Group], budget: int, workers: int) -> list[list[list[int]]]:
    """Indices of the groups of each worker's micro-batches, ``[worker][micro-batch]``, as even as can be.

    All workers get the same number of micro-batches, since ZeRO-3's collectives must match; some may be empty. No
    micro-batch exceeds `budget` tokens, unless a single group does. The longest groups are placed first, each in the
    emptiest micro-batch.
    """
    total = sum(min(group.tokens, budget) for group in groups)
    rounds = max(1, -(-total // (budget * workers)))
    order = sorted(range(len(groups)), key=lambda index: (-groups[index].tokens, index))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * workers)]
        loads = [0] * len(bins)
        for index in order:
            target = min(range(len(bins)), key=loads.__getitem__)
            bins[target].append(index)
            loads[target] += groups[index].tokens
        if all(load <= budget or len(items) == 1 for load, items in zip(loads, bins, strict=True)):
            return [bins[worker::workers] for worker in range(workers)]
        rounds += 1


def collate(groups: Sequence[Group], filler: int) -> MicroBatch:
    """Pack groups into rows, first fit. Without groups, a row of two `filler` tokens keeps the ranks in step."""
    if not groups:
        return _assemble([[Group([filler], [[filler]])]], filler, real=False)
    longest = max(group.tokens for group in groups)
    room = max(_ROW_TOKENS, longest)
    rows: list[list[Group]] = []
    free: list[int] = []
    for group in groups:
        row = next((row for row, left in enumerate(free) if left >= group.tokens), None)
        if row is None:
            rows.append([])
            free.append(room)
            row = len(rows) - 1
        rows[row].append(group)
        free[row] -= group.tokens
    return _assemble(rows, filler, real=True)


def _assemble(rows: list[list[Group]], filler: int, *, real: bool) -> MicroBatch:
    width = max(sum(group.tokens for group in row) for row in rows)
    shape = (len(rows), width)
    ids, positions = np.full(shape, filler, np.int64), np.zeros(shape, np.int64)
    segments, branches = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    lengths: list[list[int]] = []
    owner = 0
    for r, row in enumerate(rows):
        at = 0
        for group in row:
            prompt = len(group.prompt)
            end = at + group.tokens
            segments[r, at:end] = len(lengths)
            ids[r, at : at + prompt] = group.prompt
            positions[r, at : at + prompt] = np.arange(prompt)
            last_of_prompt = at + prompt - 1
            at += prompt
            for branch, response in enumerate(group.responses, start=1):
                inner = len(response) - 1
                ids[r, at : at + inner] = response[:-1]
                positions[r, at : at + inner] = np.arange(prompt, prompt + inner)
                branches[r, at : at + inner] = branch
                flat = r * width + np.arange(at - 1, at + inner)
                flat[0] = r * width + last_of_prompt
                predictors.append(flat)
                targets.append(np.asarray(response, np.int64))
                owners.append(np.full(inner + 1, owner))
                owner += 1
                at += inner
            lengths.append([len(response) for response in group.responses])
    return MicroBatch(
        input_ids_RT=torch.from_numpy(ids),
        position_ids_RT=torch.from_numpy(positions),
        segments_RT=torch.from_numpy(segments),
        branches_RT=torch.from_numpy(branches),
        predictors_N=torch.from_numpy(np.concatenate(predictors)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        responses_N=torch.from_numpy(np.concatenate(owners)),
        lengths_BK=torch.tensor(lengths),
        groups=len(lengths) if real else 0,
        tokens=sum(group.tokens for row in rows for group in row) if real else 0,
    )
