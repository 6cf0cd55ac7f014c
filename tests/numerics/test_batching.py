"""Batches: every group is trained once an epoch, and workers get even shares of the groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.training.batches.micro_batch import Group, Layout
from plad_dist.training.batches.packing import collate
from plad_dist.training.batches.schedule import assign_groups, step_groups, steps_per_epoch
from plad_dist.training.model.attention import _dense_mask

groups_strategy = st.lists(
    st.builds(
        lambda prompt, responses: Group(list(range(3, 3 + prompt)), [list(range(50, 50 + n)) for n in responses]),
        st.integers(1, 40),
        st.lists(st.integers(1, 30), min_size=2, max_size=2),
    ),
    min_size=1,
    max_size=30,
)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 3))
def test_an_epoch_takes_every_group_exactly_once(count: int, batch: int, seed: int, epoch: int) -> None:
    per_epoch = steps_per_epoch(count, batch)
    taken = np.concatenate([step_groups(count, batch, seed, epoch * per_epoch + step) for step in range(per_epoch)])
    assert sorted(taken.tolist()) == list(range(count))


def test_epochs_and_seeds_have_different_orders() -> None:
    assert step_groups(100, 100, 1, 0).tolist() != step_groups(100, 100, 1, 1).tolist()
    assert step_groups(100, 100, 1, 0).tolist() != step_groups(100, 100, 2, 0).tolist()


@given(groups_strategy, st.integers(16, 300), st.integers(1, 5))
def test_every_group_is_assigned_once_and_all_workers_stay_in_step(
    groups: list[Group], budget: int, workers: int
) -> None:
    shares = assign_groups(groups, Layout(), budget, workers)
    assert len(shares) == workers
    assert len({len(share) for share in shares}) == 1, "every rank runs the same number of micro-batches"
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(len(groups)))


LAYOUTS = [
    Layout(),
    Layout(min_piece_tokens=96),
    Layout(row_tokens=2048, row_multiple=128),
    Layout(max_row_tokens=256),
    Layout(shares_prompts=False, max_row_tokens=256),
    Layout(shares_prompts=False, packs_rows=False),
    Layout(decoder_start=0),
    Layout(packs_rows=False, decoder_start=0),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(
    st.lists(
        st.builds(
            lambda prompt, responses: Group([5] * prompt, [[6] * length for length in responses]),
            st.integers(1, 300),
            st.lists(st.one_of(st.integers(1, 40), st.integers(1, 1500)), min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(16, 20_000),
    st.integers(1, 4),
)
def test_the_budget_bounds_the_tokens_that_are_computed_with_their_padding(
    layout: Layout, groups: list[Group], budget: int, workers: int
) -> None:
    """No micro-batch of any layout computes more places than the budget of tokens."""
    held = [group for group in groups if layout.places(group) <= budget]
    for share in assign_groups(held, layout, budget, workers):
        for indices in share:
            batch = collate([held[index] for index in indices], filler=0, layout=layout, budget=budget)
            places = batch.input_ids_RT.numel()
            if batch.encoder is not None:
                places += batch.encoder.input_ids_RE.numel()
            assert places <= budget, f"{tuple(batch.input_ids_RT.shape)} for {batch.tokens} tokens"
            assert places >= batch.tokens


@pytest.mark.parametrize("packs_rows", [True, False])
@given(groups_strategy)
def test_an_encoder_saves_the_copies_of_each_prompt(packs_rows: bool, groups: list[Group]) -> None:
    batch = collate(groups, filler=0, layout=Layout(packs_rows=packs_rows, decoder_start=0))
    copies = sum((len(group.responses) - 1) * len(group.prompt) for group in groups)
    assert batch.tokens_unshared - batch.tokens == copies


@given(groups_strategy)
def test_every_response_token_is_predicted_by_the_token_before_it(groups: list[Group]) -> None:
    batch = collate(groups, filler=0)
    ids = batch.input_ids_RT.flatten()
    assert batch.tokens == sum(group.tokens for group in groups)
    assert (batch.prompt_starts_RT >= 0).sum() == batch.tokens
    owners = batch.responses_N.numpy()
    rebuilt = [batch.targets_N.numpy()[owners == owner].tolist() for owner in range(batch.lengths_S.numel())]
    assert rebuilt == [list(response) for group in groups for response in group.responses]
    for owner, response in enumerate(rebuilt):
        before = ids[batch.predictors_N[batch.responses_N == owner]].tolist()
        assert before[1:] == response[:-1]


@given(groups_strategy)
def test_a_token_sees_only_its_prompt_and_its_own_response(groups: list[Group]) -> None:
    batch = collate(groups, filler=0)
    mask = _dense_mask(batch, None)[:, 0]
    for r in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            prompt_start, branch_start = batch.prompt_starts_RT[r, i], batch.branch_starts_RT[r, i]
            visible = mask[r, i].nonzero().flatten()
            branches = batch.branch_starts_RT[r, visible]
            assert (batch.prompt_starts_RT[r, visible] == prompt_start).all()
            assert ((branches == prompt_start) | (branches == branch_start)).all()
            if prompt_start >= 0:  # it sees as many tokens as its position counts, so none is missing
                assert len(visible) == batch.position_ids_RT[r, i] + 1


def test_a_micro_batch_without_groups_counts_no_groups_and_no_tokens() -> None:
    batch = collate([], filler=0)
    assert (batch.groups, batch.tokens) == (0, 0)
    assert batch.input_ids_RT.numel() == 1


def test_a_group_over_the_budget_gets_a_micro_batch_of_its_own() -> None:
    groups = [Group([1] * 50, [[2] * 50, [3] * 50]), Group([1], [[2], [3]])]
    assert assign_groups(groups, Layout(), 16, 1) == [[[0], [1]]]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_get_even_shares(workers: int) -> None:
    groups = [Group([1] * (n % 7 + 1), [[2] * (n % 11 + 1)]) for n in range(120)]
    shares = assign_groups(groups, Layout(), 10_000, workers)
    loads = [sum(groups[index].tokens for batch in share for index in batch) for share in shares]
    assert max(loads) - min(loads) <= 18


@given(groups_strategy, st.integers(1, 4))
def test_groups_of_similar_length_share_a_micro_batch(groups: list[Group], workers: int) -> None:
    """The micro-batches are runs of the groups sorted by length, so little is padded."""
    sizes = [group.tokens for group in groups]
    shares = assign_groups(groups, Layout(), 300, workers)
    runs = [shares[worker][number] for number in range(len(shares[0])) for worker in range(workers)]
    in_order = [sizes[index] for run in runs for index in run]
    assert in_order == sorted(sizes, reverse=True)


@given(groups_strategy)
def test_without_sharing_every_response_has_its_own_prompt(groups: list[Group]) -> None:
    batch = collate(groups, filler=0, layout=Layout(shares_prompts=False))
    assert batch.tokens == batch.tokens_unshared == sum(group.tokens_unshared for group in groups)
    mask = _dense_mask(batch, None)[:, 0]
    visible = mask.sum(-1)[batch.prompt_starts_RT >= 0]
    assert torch.equal(visible, batch.position_ids_RT[batch.prompt_starts_RT >= 0] + 1)
    unpacked = collate(groups, filler=0, layout=Layout(shares_prompts=False, packs_rows=False))
    assert len(unpacked.input_ids_RT) == sum(len(group.responses) for group in groups)


def test_the_tokens_that_sharing_saves_are_counted() -> None:
    batch = collate([Group([1] * 100, [[2] * 11, [3] * 21])], filler=0)
    assert (batch.tokens, batch.tokens_unshared) == (130, 230)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_a_micro_batch_pads_no_more_than_rows_of_the_longest_group(sizes: list[int]) -> None:
    layout = Layout(row_tokens=2048)
    batch = collate([Group([1] * size, [[2]]) for size in sizes], 0, layout)
    rows, width = batch.input_ids_RT.shape
    assert rows * width <= len(sizes) * max(sizes)
    assert width <= max(2048, *sizes)
    padded = collate([Group([1] * size, [[2]]) for size in sizes], 0, Layout(row_tokens=2048, row_multiple=128))
    assert padded.input_ids_RT.shape[1] % 128 == 0
    assert (padded.prompt_starts_RT >= 0).sum() == sum(sizes)
