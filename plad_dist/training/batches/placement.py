"""Placement of groups in rows: the pieces of groups, their rows, and the places that they take.

A *piece* is placed as a whole: a group with its shared prompt, or a single response with its own
copy of the prompt. All rows of a micro-batch are padded to one width. A *place* is an element of
``rows x width``, padding included. Activations are proportional to places, so the token budget of a
micro-batch bounds places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """

    rows: list[list[int]]
    width: int
    is_piecewise: bool = False

    @property
    def places(self) -> int:
        """Tokens that the model computes, padding included."""
        return len(self.rows) * self.width


def piece_sizes(groups: Iterable[Group], layout: Layout) -> list[int]:
    """Return the tokens of every piece of some groups."""
    if layout.shares_prompts:
        return [group.tokens for group in groups]
    return [len(group.prompt) + len(response) - 1 for group in groups for response in group.responses]


def place(sizes: Sequence[int], layout: Layout, budget: int) -> RowPlacement:
    """Place pieces in rows of the width, out of a few, at which the fewest tokens are computed.

    Args:
        sizes: tokens of each piece.
        budget: most places of a micro-batch. Rows are not rounded up to the layout's multiple if
            that would exceed it.
    """
    if layout.min_piece_tokens is not None and sum(sizes) >= layout.min_piece_tokens * len(sizes):
        width = _rounded(sum(sizes), 1, layout.row_multiple, budget)
        return RowPlacement([list(range(len(sizes)))], width, is_piecewise=True)
    longest = max(sizes)
    if not layout.packs_rows:
        return RowPlacement([[piece] for piece in range(len(sizes))], longest)
    widest = max(longest, min(layout.row_tokens, layout.max_row_tokens or layout.row_tokens))
    capacities = sorted({longest + (widest - longest) * step // _WIDTHS for step in range(_WIDTHS + 1)})
    placements = [_first_fit(sizes, capacity, layout.row_multiple, budget) for capacity in capacities]
    return min(placements, key=lambda placement: placement.places)


def _first_fit(sizes: Sequence[int], capacity: int, multiple: int, budget: int) -> RowPlacement:
    rows: list[list[int]] = []
    free: list[int] = []
    for piece, size in enumerate(sizes):
        row = next((row for row, tokens in enumerate(free) if tokens >= size), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(piece)
        free[row] -= size
    return RowPlacement(rows, _rounded(capacity - min(free), len(rows), multiple, budget))


def _rounded(width: int, rows: int, multiple: int, budget: int) -> int:
    """Return the width as a multiple, or as it is if the rows would exceed the budget."""
    rounded = -(-width // multiple) * multiple
    return rounded if rounded * rows <= budget else width
