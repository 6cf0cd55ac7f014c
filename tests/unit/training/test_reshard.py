"""Where the parts of ZeRO-3 lie at any number of ranks: what one size wrote, another finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.training.checkpoints.reshard import pieces, places

Sizes = dict[str, int]


def written(values: dict[str, np.ndarray], groups: list[Sizes], ranks: int) -> list[list[np.ndarray]]:
    """The flat arrays of every rank and sub-group, as ZeRO-3 lays them out."""
    flats = []
    for rank in range(ranks):
        of_rank = []
        for sizes in groups:
            parts = []
            for name, numel in sizes.items():
                length = -(-numel // ranks)
                padded = np.zeros(length * ranks)
                padded[:numel] = values[name]
                parts.append(padded[rank * length : (rank + 1) * length])
            of_rank.append(np.concatenate(parts))
        flats.append(of_rank)
    return flats


def grouped(sizes: list[int], cuts: list[int]) -> list[Sizes]:
    """Parameters of these sizes in sub-groups that begin at the cuts."""
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
def test_what_one_number_of_ranks_wrote_another_finds_in_its_place(
    sizes: list[int], old_cuts: list[int], new_cuts: list[int], old_ranks: int, new_ranks: int
) -> None:
    """Sub-groups may be others too: DeepSpeed fills them by the size of the parts."""
    start = 0
    values = {}
    for index, numel in enumerate(sizes):
        values[f"p{index}"] = np.arange(start, start + numel) + 1.0
        start += numel
    old_groups, new_groups = grouped(sizes, old_cuts), grouped(sizes, new_cuts)
    old, new = places(old_groups, old_ranks), places(new_groups, new_ranks)
    there, wanted = written(values, old_groups, old_ranks), written(values, new_groups, new_ranks)
    for rank in range(new_ranks):
        found = [np.zeros_like(flat) for flat in wanted[rank]]
        for name, place in new.items():
            for owner, source, target, count in pieces(old[name], place, rank):
                found[place.group][target : target + count] = there[owner][old[name].group][source : source + count]
        for mine, expected in zip(found, wanted[rank], strict=True):
            np.testing.assert_array_equal(mine, expected)
