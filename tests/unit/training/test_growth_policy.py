"""Arithmetic of the scaling policy: room, verdicts, and what the history of a run lets expect."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.training.driver.growth import (
    Choice,
    NodeRoom,
    Outlook,
    Room,
    judge,
    room_in_parts,
    room_on_whole_nodes,
)
from plad_dist.training.driver.history import RunHistory

HOUR = 3600.0
seconds = st.floats(0.0, 1e6)


def room_of(size: int, workers: int, quiet_s: float = HOUR, gap_s: float = math.inf) -> Room:
    """Return room that last grew `quiet_s` ago, and before that `gap_s` earlier."""
    return Room(size, workers, seen_at=0.0, grew_at=-quiet_s, gap_s=gap_s)


@pytest.mark.parametrize(
    ("size", "workers", "undisturbed_s", "left_s", "choice"),
    [
        (8, 12, 119.0, math.inf, Choice.STAY),
        (8, 12, 121.0, math.inf, Choice.GROW),
        (1, 2, 61.0, math.inf, Choice.GROW),
        (64, 65, HOUR, math.inf, Choice.STAY),
        (8, 12, HOUR, 179.0, Choice.STAY),
        (8, 12, HOUR, 181.0, Choice.GROW),
        (8, 8, HOUR, math.inf, Choice.STAY),
        (8, 4, HOUR, math.inf, Choice.STAY),
    ],
)
def test_a_group_grows_if_that_gains_more_than_a_restart_costs(
    size: int, workers: int, undisturbed_s: float, left_s: float, choice: Choice
) -> None:
    """A restart costs 60 s. With 12 workers, 180 s of 8 workers take 120 s, which gains 60 s."""
    assert judge(room_of(size, workers), 64, Outlook(True, 60.0, undisturbed_s, left_s)).choice is choice


def test_a_single_node_is_waited_for_only_as_long_as_costs_a_twentieth_of_a_restart() -> None:
    outlook = Outlook(True, 40.0, HOUR, math.inf)
    assert judge(room_of(8, 9, quiet_s=15.9), 64, outlook).choice is Choice.WAIT
    assert judge(room_of(8, 9, quiet_s=16.1), 64, outlook).choice is Choice.GROW
    assert judge(room_of(1, 2, quiet_s=1.9), 64, outlook).choice is Choice.WAIT
    assert judge(room_of(1, 2, quiet_s=2.1), 64, outlook).choice is Choice.GROW
    assert judge(room_of(1, 2, quiet_s=0.0), 2, outlook).choice is Choice.GROW, "no node could add to the largest size"


def test_a_stream_of_nodes_is_waited_for_while_that_costs_less_than_a_restart() -> None:
    outlook = Outlook(True, 40.0, HOUR, math.inf)
    assert judge(room_of(8, 9, quiet_s=30.0, gap_s=60.0), 64, outlook).choice is Choice.WAIT
    assert judge(room_of(8, 9, quiet_s=121.0, gap_s=60.0), 64, outlook).choice is Choice.GROW, "the stream has ended"
    assert judge(room_of(2, 4, quiet_s=30.0, gap_s=60.0), 64, outlook).choice is Choice.WAIT
    assert judge(room_of(2, 4, quiet_s=5.0, gap_s=60.0), 64, outlook).choice is Choice.GROW, "the next one is too far"
    late = judge(room_of(8, 9, quiet_s=100.0, gap_s=300.0), 64, outlook)
    assert late == (Choice.WAIT, "waits up to 320 s for further nodes, since a restart costs 40 s")
    forgone = Room(8, 12, seen_at=0.0, grew_at=-30.0, gap_s=60.0, forgone_s=26.0)
    assert judge(forgone, 64, outlook).choice is Choice.GROW


@given(
    size=st.integers(1, 100), workers=st.integers(0, 200), most=st.integers(1, 200),
    quiet_s=seconds, gap_s=seconds, forgone_s=seconds, takes_steps=st.booleans(),
    restart_s=st.floats(0.1, 1e4), undisturbed_s=seconds, left_s=seconds,
)  # fmt: skip
def test_growth_is_settled_pays_and_follows_a_step(
    size: int, workers: int, most: int, quiet_s: float, gap_s: float, forgone_s: float, *, takes_steps: bool,
    restart_s: float, undisturbed_s: float, left_s: float,
) -> None:  # fmt: skip
    room = Room(size, workers, seen_at=quiet_s, grew_at=0.0, gap_s=gap_s, forgone_s=forgone_s)
    verdict = judge(room, most, Outlook(takes_steps, restart_s, undisturbed_s, left_s))
    if verdict.choice is Choice.STAY:
        return
    rate = workers / size - 1
    assert takes_steps
    assert workers > size
    assert rate * undisturbed_s > restart_s
    assert rate * left_s * size / workers > restart_s
    has_settled = quiet_s >= min(60.0, 0.05 * restart_s / rate) or workers >= most
    if verdict.choice is Choice.GROW:
        assert has_settled
    else:
        assert not has_settled or forgone_s < restart_s, "waiting never costs more than a restart"


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16), st.integers(0, 16))))
def test_growth_takes_no_parts_of_nodes(counts: list[tuple[int, int, int]]) -> None:
    nodes = [NodeRoom(*count) for count in counts]
    others = sum(max(node.total - node.own, 0) for node in nodes if node.free + node.own >= node.total)
    own = sum(min(node.own, node.total) if node.free + node.own >= node.total else node.own for node in nodes)
    assert room_on_whole_nodes(nodes) == others + own
    assert all(room_in_parts([node]) <= node.total for node in nodes)


def test_a_node_counts_as_a_whole_or_by_the_workers_of_the_group() -> None:
    assert room_on_whole_nodes([NodeRoom(8, 8, 0)]) == 8
    assert room_on_whole_nodes([NodeRoom(8, 3, 0)]) == 0
    assert room_on_whole_nodes([NodeRoom(8, 3, 5)]) == 8
    assert room_on_whole_nodes([NodeRoom(8, 2, 3)]) == 3
    assert room_on_whole_nodes([NodeRoom(8, 8, 8)]) == 8, "Ray reports free resources with a delay"
    assert room_in_parts([NodeRoom(8, 2, 3)]) == 5


def test_forgone_work_counts_from_the_first_step_until_the_room_is_gone() -> None:
    room = Room().seen(0.0, 4, 6, takes_steps=False)
    room = room.seen(100.0, 4, 6, takes_steps=False)
    assert room.forgone_s == 0.0
    room = room.seen(110.0, 4, 6, takes_steps=True)
    room = room.seen(120.0, 4, 8, takes_steps=True)
    assert room.forgone_s == 0.5 * 20
    assert (room.grew_at, room.gap_s) == (120.0, 120.0)
    assert room.seen(130.0, 4, 8, takes_steps=True).forgone_s == 0.5 * 20 + 10
    assert room.seen(130.0, 4, 4, takes_steps=True).forgone_s == 0.0
    assert room.seen(130.0, 8, 8, takes_steps=True).forgone_s == 0.0


def history_of(*groups: tuple[int, float, bool]) -> RunHistory:
    """Return the history of groups by size, seconds, and True if they were disrupted."""
    history, now = RunHistory(), 0.0
    for size, length, is_disrupted in groups:
        history = history.starts(now, size).steps(now + 21, 1.0, None)
        history = history.steps(now + length, 1.0, None)
        now += length
        history = history.ends(now, is_disrupted=is_disrupted)
    return history


def test_a_disruption_an_hour_is_expected_before_any_is_known() -> None:
    assert history_of().undisturbed_s(0.0, 8) == HOUR
    assert 4 * HOUR < history_of((8, HOUR, False)).undisturbed_s(HOUR, 4) < 5 * HOUR


def test_each_disruption_shortens_what_is_expected() -> None:
    expected = [history_of(*[(9, 300.0, True)] * count).undisturbed_s(300.0 * count, 8) for count in range(6)]
    assert expected == sorted(expected, reverse=True)
    assert expected[5] < 500.0


def test_recent_disruptions_count_most() -> None:
    history = history_of(*[(9, 300.0, True)] * 5)
    assert history.undisturbed_s(1500.0, 8) < 500.0
    assert history.undisturbed_s(1500.0 + 24 * HOUR, 8) > 2000.0


def test_a_node_that_disrupts_only_larger_groups_is_not_hidden_by_calm_smaller_ones() -> None:
    flapping = [(9, 300.0, True), (8, 3 * HOUR, False)] * 3
    now = 3 * (300.0 + 3 * HOUR)
    assert history_of(*flapping).undisturbed_s(now, 8) < 1500.0
    assert history_of(*flapping).undisturbed_s(now, 9) == HOUR, "no group was larger than 9"


def test_disruptions_of_smaller_groups_are_expected_of_larger_ones() -> None:
    history = history_of(*[(8, 300.0, True)] * 5)
    assert history.undisturbed_s(1500.0, 8) < 500.0


def test_the_cost_of_a_restart_is_measured_without_the_step_and_the_detection() -> None:
    history = RunHistory().starts(0.0, 2).steps(101.0, 1.0, None)
    assert history.restart_s() == 100.0, "the start of the run, before there was a restart"
    history = history.steps(200.0, 1.0, None).ends(250.0, is_disrupted=True)
    history = history.starts(260.0, 1).steps(281.0, 1.0, None)
    assert history.restart_s() == 20.0, "neither the time until the death was noticed nor the first start"
    history = history.steps(300.0, 1.0, None).starts(310.0, 2).steps(341.0, 1.0, None)
    assert history.restart_s() == pytest.approx((20 + 40) / 2), "with the checkpoint, from the last step on"


def test_the_time_left_follows_the_steps() -> None:
    history = RunHistory().starts(0.0, 2)
    assert not history.outlook(1.0).takes_steps
    history = history.steps(10.0, 2.0, 100)
    assert history.outlook(10.0).left_s == 200.0
    assert history.steps(12.0, 2.0, None).outlook(12.0).left_s == math.inf
    for second in range(100):
        history = history.steps(20.0 + second, 4.0, 50)
    assert history.outlook(120.0).left_s == pytest.approx(200.0, rel=1e-3)
