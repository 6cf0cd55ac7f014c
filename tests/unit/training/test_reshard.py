"""Positions of ZeRO-3 slices at any number of ranks: what one size wrote, another size reads."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.training.checkpoints.reshard import copies, flat_slices

Sizes = dict[str, int]


def flat_arrays(values: dict[str, np.ndarray], groups: list[Sizes], ranks: int) -> list[list[np.ndarray]]:
    """Return the flat arrays of every rank and sub-group, as ZeRO-3 lays them out."""
    by_rank = []
    for rank in range(ranks):
        by_group = []
        for sizes in groups:
            slices = []
            for name, numel in sizes.items():
                length = -(-numel // ranks)
                padded = np.zeros(length * ranks)
                padded[:numel] = values[name]
                slices.append(padded[rank * length : (rank + 1) * length])
            by_group.append(np.concatenate(slices))
        by_rank.append(by_group)
    return by_rank


def sub_groups(sizes: list[int], cuts: list[int]) -> list[Sizes]:
    """Return parameters of these sizes in sub-groups that begin at the cuts."""
    groups: list[Sizes] = [{}]
    for index, numel in enumerate(sizes):
        if index in cuts and groups[-1]:
            groups.append({})
        groups[-1][f"p{index}"] = numel
    return groups


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.lists(st.integers(1, 7), max_size=3),
    st.lists(st.integers(1, 7), max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_any_number_of_ranks_reads_the_arrays_of_any_other_number(
    sizes: list[int], old_cuts: list[int], new_cuts: list[int], old_ranks: int, new_ranks: int
) -> None:
    """The sub-groups may differ too: DeepSpeed fills them by the size of the slices."""
    start = 0
    values = {}
    for index, numel in enumerate(sizes):
        values[f"p{index}"] = np.arange(start, start + numel) + 1.0
        start += numel
    old_groups, new_groups = sub_groups(sizes, old_cuts), sub_groups(sizes, new_cuts)
    old, new = flat_slices(old_groups, old_ranks), flat_slices(new_groups, new_ranks)
    old_arrays, new_arrays = flat_arrays(values, old_groups, old_ranks), flat_arrays(values, new_groups, new_ranks)
    for rank in range(new_ranks):
        filled = [np.zeros_like(array) for array in new_arrays[rank]]
        for name, place in new.items():
            for piece in copies(old[name], place, rank):
                source = old_arrays[piece.owner][old[name].group]
                filled[place.group][piece.target : piece.target + piece.count] = source[
                    piece.source : piece.source + piece.count
                ]
        for actual, expected in zip(filled, new_arrays[rank], strict=True):
            np.testing.assert_array_equal(actual, expected)
