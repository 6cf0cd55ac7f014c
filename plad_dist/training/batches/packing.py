"""Groups into micro-batches: every prompt computed once, nothing padded but row ends.

A *group* is a prompt and its responses. In a row, a group's tokens are the prompt's, then each response's but its last
(which predicts nothing). A response sees the prompt and itself, never its siblings or other groups (the tree mask), and
its positions go on from the prompt's end, so that its log-likelihood is that of the sequence standing alone. For models
whose attention a tree mask cannot express, every response has its own copy of the prompt (:class:`Layout`).

Shapes: R rows, T tokens of a row, N predicted tokens, B groups, S responses of all groups, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plad_dist.training.losses import Pairs


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its responses, as token ids, and which of them are compared.

    Attributes:
        pairs: (chosen, rejected, ranks between them), by the places of the responses.
        anchored: places of the responses that the anchor raises.
        scores, initial_logps, sampled: of each response: its score, its log-likelihood by the starting student and as the
            engine reported it; empty where there are none, NaN for one that has none.
        name: for messages.
        prompt_id: of the prompt.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    pairs: Sequence[tuple[int, int, int]] = ()
    anchored: Sequence[int] = (0,)
    scores: Sequence[float] = ()
    initial_logps: Sequence[float] = ()
    sampled: Sequence[float] = ()
    name: str = ""
    prompt_id: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the model computes where the responses share the prompt."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)

    @property
    def tokens_apart(self) -> int:
        """Tokens that the model computes where every response has its own copy of the prompt."""
        return sum(len(self.prompt) + len(response) - 1 for response in self.responses)


def plain_pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Group:
    """A group of one pair."""
    return Group(prompt, [chosen, rejected], pairs=[(0, 1, 1)])


@dataclass(frozen=True)
class Layout:
    """How groups may lie in rows.

    Attributes:
        shares: responses share one pass over their prompt. Otherwise each stands by itself.
        packs: a row may hold several of what stands by itself.
        row_tokens: rows are filled up to so many tokens; with dense masks, attention over a row costs its length squared.
        multiple: rows are padded to a multiple of so many tokens.
        piecewise: attention goes piece by piece where pieces have so many tokens on average: all then lie in one row, without
            padding. None for never.
        longest_row: most tokens that a row may have, None for any.
    """

    shares: bool = True
    packs: bool = True
    row_tokens: int = 128
    multiple: int = 1
    piecewise: int | None = None
    longest_row: int | None = None

    def tokens(self, group: Group) -> int:
        """Tokens that the model computes for a group."""
        return group.tokens if self.shares else group.tokens_apart


TREE = Layout()
_WIDTHS = 4  # of rows that are tried


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass of one worker takes.

    Attributes:
        input_ids_RT, position_ids_RT: the rows.
        begins_RT: place in its row where a token's prompt begins; -1 for padding.
        ends_RT: where that prompt ends (exclusive), for tokens of responses; elsewhere there is no prompt before a token's own
            branch, and it equals `begins_RT`.
        branches_RT: where its branch begins: its response, or the prompt for tokens of a prompt. A token sees its branch up to
            itself, and the places from `begins_RT` to `ends_RT`.
        predictors_N: flat index into ``R * T`` of the position that predicts each response token.
        targets_N: the predicted tokens.
        responses_N, places_N: which response each predicted token is of, and its place in it.
        lengths_S: response tokens.
        initial_logps_S, sampled_S: log-likelihoods by the starting student and as the engine reported them, NaN without.
        pairs: what is compared.
        pieces: of a row that holds all: tokens of each prompt and of each response beside it; else empty.
        longest: tokens of the longest response.
        groups: B; 0 for a micro-batch that only keeps the ranks in step.
        tokens: tokens computed, padding left out; `tokens_apart` were those without sharing.
    """

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    begins_RT: Tensor
    ends_RT: Tensor
    branches_RT: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    responses_N: Tensor
    places_N: Tensor
    lengths_S: Tensor
    initial_logps_S: Tensor
    sampled_S: Tensor
    pairs: Pairs
    pieces: tuple[tuple[int, tuple[int, ...]], ...]
    longest: int
    groups: int
    tokens: int
    tokens_apart: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def step_groups(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices of the groups of one global step: a pure function of (seed, epoch, step), whatever the number of workers.

    An epoch is a permutation of all groups; its last step takes what is left.
    """
    per_epoch = steps_per_epoch(count, batch)
    epoch, position = divmod(step, per_epoch)
    return _epoch_order(count, seed, epoch)[position * batch : (position + 1) * batch]


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(np.arange(count, dtype=np.uint32))


def steps_per_epoch(count: int, batch: int) -> int:
    """Global steps that see every group once."""
    return -(-count // batch)


def share_out(tokens: Sequence[int], budget: int, workers: int) -> list[list[list[int]]]:
    """Indices of the groups of each worker's micro-batches, ``[worker][micro-batch]``.

    All workers get the same number of micro-batches, since ZeRO-3's collectives must match; some may be empty. No
    micro-batch exceeds `budget` tokens, unless a single group does. Groups of like length come together, so that little is
    padded, and the micro-batches that the workers do at the same time are of like size.

    Args:
        tokens: of each group.
    """
    order = sorted(range(len(tokens)), key=lambda index: (-tokens[index], index))
    rounds = max(1, -(-sum(min(size, budget) for size in tokens) // (budget * workers)))
    while (bins := _fill(order, tokens, budget, rounds * workers)) is None:
        rounds += 1
    return [bins[worker::workers] for worker in range(workers)]


def _fill(order: list[int], tokens: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """`order` cut into so many runs of like size, None where a run exceeds the budget."""
    bins: list[list[int]] = [[] for _ in range(count)]
    left, number, load = sum(tokens), 0, 0
    for index in order:
        # What is left is spread evenly over the runs that are left.
        even = (load + left) / (count - number)
        if load and number < count - 1 and (load + tokens[index] / 2 > even or load + tokens[index] > budget):
            number, load = number + 1, 0
        bins[number].append(index)
        load += tokens[index]
        left -= tokens[index]
        if load > budget and len(bins[number]) > 1:
            return None
    return bins


# ------------------------------------------------------------------------------------------------------------- packing


@dataclass(slots=True)
class _Piece:
    """What lies together in a row: a prompt and some of its responses, with their numbers among all."""

    prompt: Sequence[int]
    responses: list[tuple[int, Sequence[int]]]

    @property
    def inner(self) -> tuple[int, ...]:
        """Tokens of each response but its last, which predicts nothing."""
        return tuple(len(response) - 1 for _, response in self.responses)

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(self.inner)


def collate(groups: Sequence[Group], filler: int, layout: Layout = TREE) -> MicroBatch:
    """Pack groups into rows, first fit. Without groups, a row of a `filler` token keeps the ranks in step."""
    real = bool(groups)
    groups = groups or [Group([filler], [[filler]])]
    pieces, number = [], 0
    for group in groups:
        numbered = list(enumerate(group.responses, start=number))
        number += len(numbered)
        parts = [numbered] if layout.shares else [[response] for response in numbered]
        pieces += [_Piece(group.prompt, part) for part in parts]
    enough = layout.piecewise
    one_row = enough is not None and sum(piece.tokens for piece in pieces) >= enough * len(pieces)
    rows = [pieces] if one_row else _rows(pieces, layout)
    return replace(
        _assemble(rows, filler, number, layout.multiple),
        lengths_S=torch.tensor([len(response) for group in groups for response in group.responses]),
        initial_logps_S=_column([group.initial_logps for group in groups], groups),
        sampled_S=_column([group.sampled for group in groups], groups),
        pairs=_pairs(groups),
        pieces=tuple((len(piece.prompt), piece.inner) for piece in pieces) if one_row else (),
        groups=len(groups) if real else 0,
        tokens=sum(layout.tokens(group) for group in groups) if real else 0,
        tokens_apart=sum(group.tokens_apart for group in groups) if real else 0,
    )


def _rows(pieces: list[_Piece], layout: Layout) -> list[list[_Piece]]:
    if not layout.packs:
        return [[piece] for piece in pieces]
    longest = max(piece.tokens for piece in pieces)
    widest = max(longest, min(layout.row_tokens, layout.longest_row or layout.row_tokens))
    # What is computed is as many rows as wide as the widest: of a few widths, the one that pads least, and of those the smallest.
    rooms = sorted({longest + (widest - longest) * part // _WIDTHS for part in range(_WIDTHS + 1)})
    return min((_first_fit(pieces, room) for room in rooms), key=lambda rows: len(rows) * _width(rows, layout.multiple))


def _width(rows: list[list[_Piece]], multiple: int) -> int:
    longest = max(sum(piece.tokens for piece in row) for row in rows)
    return -(-longest // multiple) * multiple


def _first_fit(pieces: list[_Piece], room: int) -> list[list[_Piece]]:
    rows: list[list[_Piece]] = []
    free: list[int] = []
    for piece in pieces:
        row = next((row for row, left in enumerate(free) if left >= piece.tokens), None)
        if row is None:
            rows.append([])
            free.append(room)
            row = len(rows) - 1
        rows[row].append(piece)
        free[row] -= piece.tokens
    return rows


def _assemble(rows: list[list[_Piece]], filler: int, responses: int, multiple: int) -> MicroBatch:
    width = _width(rows, multiple)
    shape = (len(rows), width)
    ids, positions = np.full(shape, filler, np.int64), np.zeros(shape, np.int64)
    # In 32 bits: attention kernels read them for every block.
    begins, ends, branches = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    predictors: list[np.ndarray] = [np.empty(0)] * responses
    targets: list[np.ndarray] = [np.empty(0)] * responses
    for r, row in enumerate(rows):
        at = 0
        for piece in row:
            prompt = len(piece.prompt)
            begins[r, at : at + piece.tokens] = at
            branches[r, at : at + prompt] = ends[r, at : at + prompt] = at
            ends[r, at + prompt : at + piece.tokens] = at + prompt
            ids[r, at : at + prompt] = piece.prompt
            positions[r, at : at + prompt] = np.arange(prompt)
            last_of_prompt = at + prompt - 1
            at += prompt
            for number, response in piece.responses:
                inner = len(response) - 1
                ids[r, at : at + inner] = response[:-1]
                positions[r, at : at + inner] = np.arange(prompt, prompt + inner)
                branches[r, at : at + inner] = at
                flat = r * width + np.arange(at - 1, at + inner)
                flat[0] = r * width + last_of_prompt
                predictors[number], targets[number] = flat, np.asarray(response, np.int64)
                at += inner
        branches[r, at:] = at  # padding sees padding, so that it sees something
    nothing = torch.empty(0)
    return MicroBatch(
        input_ids_RT=torch.from_numpy(ids),
        position_ids_RT=torch.from_numpy(positions),
        begins_RT=torch.from_numpy(begins),
        ends_RT=torch.from_numpy(ends),
        branches_RT=torch.from_numpy(branches),
        predictors_N=torch.from_numpy(np.concatenate(predictors)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        responses_N=torch.from_numpy(np.repeat(np.arange(responses), [len(one) for one in targets])),
        places_N=torch.from_numpy(np.concatenate([np.arange(len(one)) for one in targets])),
        lengths_S=nothing,
        initial_logps_S=nothing,
        sampled_S=nothing,
        pairs=_pairs([]),
        pieces=(),
        longest=max(len(one) for one in targets),
        groups=0,
        tokens=0,
        tokens_apart=0,
    )


def _column(values: Sequence[Sequence[float]], groups: Sequence[Group]) -> Tensor:
    """A figure of every response, NaN where there is none."""
    rows = [given or [float("nan")] * len(group.responses) for given, group in zip(values, groups, strict=True)]
    return torch.tensor([value for row in rows for value in row], dtype=torch.float32)


def _pairs(groups: Sequence[Group]) -> Pairs:
    rows: list[tuple[int, int, int, int, float]] = []
    anchored: list[tuple[int, int]] = []
    first = 0
    for number, group in enumerate(groups):
        for chosen, rejected, steps in group.pairs:
            gap = group.scores[chosen] - group.scores[rejected] if group.scores else float("nan")
            rows.append((first + chosen, first + rejected, number, steps, gap))
        anchored += [(first + place, number) for place in group.anchored]
        first += len(group.responses)
    indices = torch.tensor([row[:4] for row in rows], dtype=torch.int64).view(-1, 4)
    raised = torch.tensor(anchored, dtype=torch.int64).view(-1, 2)
    return Pairs(
        chosen_P=indices[:, 0],
        rejected_P=indices[:, 1],
        group_P=indices[:, 2],
        rank_gap_P=indices[:, 3],
        score_gap_P=torch.tensor([row[4] for row in rows], dtype=torch.float32),
        anchored_A=raised[:, 0],
        group_A=raised[:, 1],
        groups=len(groups),
    )
