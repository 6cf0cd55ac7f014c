"""Placement of groups in rows: the pieces of groups, their rows, and the places that they take.

A *piece* is placed as a whole: a group with its shared prompt, or a single response with its own
copy of the prompt. All rows of a micro-batch are padded to one width. A *place* is an element of
``rows x width``, padding included. Activations are proportional to places, so the token budget of a
micro-batch bounds places.

In an encoder-decoder, a piece has tokens in a row of the encoder (the prompt) and in a row of the
decoder (the responses), and the places of both count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plad_dist.training.batches.micro_batch import Group, Layout

_WIDTHS = 4  # steps between the smallest and the largest row width that are tried


@dataclass(frozen=True, slots=True)
class RowPlacement:
    """Rows of a micro-batch.

    Attributes:
        rows: indices of the pieces in each row.
        width: tokens of each row, padding included.
        is_piecewise: all pieces are in one row, and attention is computed for single pieces.
        encoder_rows: number of rows of the encoder, 0 without one.
        encoder_width: tokens of each row of the encoder, padding included.
    """

    rows: list[list[int]]
    width: int
    is_piecewise: bool = False
    encoder_rows: int = 0
    encoder_width: int = 0

    @property
    def places(self) -> int:
        """Tokens that the model computes, padding included."""
        return len(self.rows) * self.width + self.encoder_rows * self.encoder_width


def place(groups: Sequence[Group], layout: Layout, budget: int) -> RowPlacement:
    """Place the pieces of groups in rows of the width, out of a few, with the fewest places.

    Args:
        budget: most places of a micro-batch. Rows are not rounded up to the layout's multiple if
            that would exceed it.
    """
    if layout.decoder_start is not None and not layout.packs_rows:
        prompts = [len(group.prompt) for group in groups]
        responses = [len(response) for group in groups for response in group.responses]
        return RowPlacement(
            _single_rows(len(responses)), max(responses), encoder_rows=len(groups), encoder_width=max(prompts)
        )
    sizes = _piece_sizes(groups, layout)
    tokens = sum(size for size, _ in sizes)
    if layout.min_piece_tokens is not None and tokens >= layout.min_piece_tokens * len(sizes):
        width = _rounded(tokens, 1, layout.row_multiple, budget)
        return RowPlacement([list(range(len(sizes)))], width, is_piecewise=True)
    longest = tuple(map(max, zip(*sizes, strict=True)))
    if not layout.packs_rows:
        return RowPlacement(_single_rows(len(sizes)), longest[0])
    row_tokens = min(layout.row_tokens, layout.max_row_tokens or layout.row_tokens)
    room = [max(0, row_tokens - length) if length else 0 for length in longest]  # none in a missing encoder
    capacities = {
        (longest[0] + room[0] * step // _WIDTHS, longest[1] + room[1] * step // _WIDTHS) for step in range(_WIDTHS + 1)
    }
    placements = [_first_fit(sizes, capacity, layout, budget) for capacity in sorted(capacities)]
    return min(placements, key=lambda placement: placement.places)


def _single_rows(pieces: int) -> list[list[int]]:
    return [[piece] for piece in range(pieces)]


def _piece_sizes(groups: Sequence[Group], layout: Layout) -> list[tuple[int, int]]:
    """Return the tokens of every piece: in the decoder, or a model without an encoder, and in the
    encoder."""
    if layout.decoder_start is not None:
        return [(group.tokens_encoded - len(group.prompt), len(group.prompt)) for group in groups]
    if layout.shares_prompts:
        return [(group.tokens, 0) for group in groups]
    return [(len(group.prompt) + len(response) - 1, 0) for group in groups for response in group.responses]


def _first_fit(
    sizes: Sequence[tuple[int, int]], capacity: tuple[int, int], layout: Layout, budget: int
) -> RowPlacement:
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for piece, (size, encoder_size) in enumerate(sizes):
        fitting = (row for row, (room, encoder) in enumerate(free) if room >= size and encoder >= encoder_size)
        row = next(fitting, None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(piece)
        free[row] = free[row][0] - size, free[row][1] - encoder_size
    width, encoder_width = (most - min(left) for most, left in zip(capacity, zip(*free, strict=True), strict=True))
    if layout.decoder_start is not None:
        return RowPlacement(rows, width, encoder_rows=len(rows), encoder_width=encoder_width)
    return RowPlacement(rows, _rounded(width, len(rows), layout.row_multiple, budget))


def _rounded(width: int, rows: int, multiple: int, budget: int) -> int:
    """Return the width as a multiple, or as it is if the rows would exceed the budget."""
    rounded = -(-width // multiple) * multiple
    return rounded if rounded * rows <= budget else width
