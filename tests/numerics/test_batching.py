"""Batches: every group trained once an epoch, shared out evenly, the same at any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.training.batches.packing import Group, Layout, collate, share_out, step_groups, steps_per_epoch
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
def test_an_epoch_sees_every_group_exactly_once(count: int, batch: int, seed: int, epoch: int) -> None:
    per_epoch = steps_per_epoch(count, batch)
    seen = np.concatenate([step_groups(count, batch, seed, epoch * per_epoch + step) for step in range(per_epoch)])
    assert sorted(seen.tolist()) == list(range(count))


def test_epochs_and_seeds_differ_in_order() -> None:
    assert step_groups(100, 100, 1, 0).tolist() != step_groups(100, 100, 1, 1).tolist()
    assert step_groups(100, 100, 1, 0).tolist() != step_groups(100, 100, 2, 0).tolist()


@given(groups_strategy, st.integers(16, 300), st.integers(1, 5))
def test_groups_are_shared_out_once_and_in_step(groups: list[Group], budget: int, workers: int) -> None:
    sizes = [group.tokens for group in groups]
    shares = share_out(sizes, budget, workers)
    assert len(shares) == workers
    assert len({len(share) for share in shares}) == 1, "every rank runs the same number of micro-batches"
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(len(groups)))
    for share in shares:
        for batch in share:
            assert len(batch) <= 1 or sum(sizes[index] for index in batch) <= budget


@given(groups_strategy)
def test_every_response_token_is_predicted_by_the_token_before_it(groups: list[Group]) -> None:
    batch = collate(groups, filler=0)
    ids = batch.input_ids_RT.flatten()
    assert batch.tokens == sum(group.tokens for group in groups)
    assert (batch.begins_RT >= 0).sum() == batch.tokens
    owners = batch.responses_N.numpy()
    rebuilt = [batch.targets_N.numpy()[owners == owner].tolist() for owner in range(batch.lengths_S.numel())]
    assert rebuilt == [list(response) for group in groups for response in group.responses]
    for owner, response in enumerate(rebuilt):
        before = ids[batch.predictors_N[batch.responses_N == owner]].tolist()
        assert before[1:] == response[:-1]


@given(groups_strategy)
def test_a_token_sees_its_prompt_and_its_own_response_alone(groups: list[Group]) -> None:
    batch = collate(groups, filler=0)
    mask = _dense_mask(batch, None)[:, 0]
    for r in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            begin, branch = batch.begins_RT[r, i], batch.branches_RT[r, i]
            seen = mask[r, i].nonzero().flatten()
            assert (batch.begins_RT[r, seen] == begin).all()
            assert ((batch.branches_RT[r, seen] == begin) | (batch.branches_RT[r, seen] == branch)).all()
            if begin >= 0:  # sees as many tokens as it has positions behind it: none is missing
                assert len(seen) == batch.position_ids_RT[r, i] + 1


def test_without_groups_a_micro_batch_weighs_nothing() -> None:
    batch = collate([], filler=0)
    assert (batch.groups, batch.tokens) == (0, 0)
    assert batch.input_ids_RT.numel() == 1


def test_a_group_over_the_budget_gets_a_micro_batch_of_its_own() -> None:
    groups = [Group([1] * 50, [[2] * 50, [3] * 50]), Group([1], [[2], [3]])]
    assert share_out([group.tokens for group in groups], 16, 1) == [[[0], [1]]]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_shares_are_even(workers: int) -> None:
    sizes = [Group([1] * (n % 7 + 1), [[2] * (n % 11 + 1)]).tokens for n in range(120)]
    loads = [sum(sizes[index] for batch in share for index in batch) for share in share_out(sizes, 10_000, workers)]
    assert max(loads) - min(loads) <= 18


@given(groups_strategy, st.integers(1, 4))
def test_groups_that_are_computed_together_are_of_like_length(groups: list[Group], workers: int) -> None:
    """So that rows are padded little: the micro-batches cut the groups, sorted by length, into runs."""
    sizes = [group.tokens for group in groups]
    shares = share_out(sizes, 300, workers)
    runs = [shares[worker][number] for number in range(len(shares[0])) for worker in range(workers)]
    in_order = [sizes[index] for run in runs for index in run]
    assert in_order == sorted(sizes, reverse=True)


@given(groups_strategy)
def test_without_sharing_every_response_has_its_prompt(groups: list[Group]) -> None:
    batch = collate(groups, filler=0, layout=Layout(shares=False))
    assert batch.tokens == batch.tokens_apart == sum(group.tokens_apart for group in groups)
    mask = _dense_mask(batch, None)[:, 0]
    seen = mask.sum(-1)[batch.begins_RT >= 0]
    assert torch.equal(seen, batch.position_ids_RT[batch.begins_RT >= 0] + 1)
    alone = collate(groups, filler=0, layout=Layout(shares=False, packs=False))
    assert len(alone.input_ids_RT) == sum(len(group.responses) for group in groups)


def test_the_tokens_that_sharing_saves_are_counted() -> None:
    batch = collate([Group([1] * 100, [[2] * 11, [3] * 21])], filler=0)
    assert (batch.tokens, batch.tokens_apart) == (130, 230)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_a_micro_batch_pads_no_more_than_rows_of_the_longest_group(sizes: list[int]) -> None:
    layout = Layout(row_tokens=2048)
    batch = collate([Group([1] * size, [[2]]) for size in sizes], 0, layout)
    rows, width = batch.input_ids_RT.shape
    assert rows * width <= len(sizes) * max(sizes)
    assert width <= max(2048, *sizes)
    padded = collate([Group([1] * size, [[2]]) for size in sizes], 0, Layout(row_tokens=2048, multiple=128))
    assert padded.input_ids_RT.shape[1] % 128 == 0
    assert (padded.begins_RT >= 0).sum() == sum(sizes)
