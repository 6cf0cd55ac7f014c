"""Scaling policy of an elastic group on a simulated cluster, through its classes of Ray Train."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from plad_dist.compat.ray_scaling import NodeResources
from plad_dist.training.driver import elastic
from plad_dist.training.driver import resizing as resizing_module
from plad_dist.training.driver.growth import Outlook
from plad_dist.training.driver.resizing import Resizing
from tests.growing_cluster import GrowingCluster, Growth, Handle

HOUR = 3600


def expected_by_the_runbook(growth: Growth) -> float:
    """Return T of the runbook by summing over seconds, where the product integrates."""

    def estimate(runs: list[tuple[int, float, float | None, bool]]) -> float:
        seconds, disruptions = 900.0, 0.25
        for _, began, ended, is_disrupted in runs:
            until = growth.at if ended is None else ended
            seconds += sum(
                math.exp(-(growth.at - second - 0.5) / (6 * HOUR)) for second in range(int(began), int(until))
            )
            disruptions += is_disrupted * math.exp(-(growth.at - until) / (6 * HOUR))
        return seconds / disruptions

    return min(estimate(growth.runs), estimate([run for run in growth.runs if run[0] > growth.size]))


def expect_growths_that_pay(cluster: GrowingCluster) -> None:
    """Check every voluntary restart with the formula of the runbook."""
    for growth in cluster.growths:
        expected_s = min(expected_by_the_runbook(growth), growth.seconds_left * growth.size / growth.room)
        gain = (growth.room / growth.size - 1) * expected_s
        assert gain > 0.9 * cluster.restart_s, growth  # the product measures restarts to a few seconds


def test_the_first_node_that_joins_a_group_of_one_is_used_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (1, 2), restart_s=15)
    cluster.add("a")
    cluster.run(60)
    cluster.add("b")
    cluster.run(8)
    assert len(cluster.growths) == 1
    cluster.run(2)
    assert cluster.group == ["a", "b"]
    assert "the cluster has room for 2 workers; the new ones start beside the present ones" in cluster.log
    assert "resumes with 2 workers" in cluster.log
    expect_growths_that_pay(cluster)


@pytest.mark.parametrize("restart_s", [30, 90])
def test_nodes_that_arrive_each_minute_cause_far_fewer_restarts_than_nodes(
    monkeypatch: pytest.MonkeyPatch, restart_s: int
) -> None:
    """For a steady stream, the number of restarts grows with the root of the number of nodes."""
    nodes = 48
    cluster = GrowingCluster(monkeypatch, (1, 64), restart_s=restart_s)
    for number in range(nodes):
        cluster.add(f"node-{number:02d}")
        cluster.run(60)
    cluster.run(600)
    assert len(cluster.group) == nodes, "it does not wait for ever"
    assert 3 <= len(cluster.growths) <= math.sqrt(2 * 60 / restart_s * nodes) + 4
    assert cluster.forced_restarts() == 0
    expect_growths_that_pay(cluster)


def test_a_stream_of_nodes_does_not_postpone_growth_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (8, 64), restart_s=60)
    for number in range(8):
        cluster.add(f"first-{number}")
    cluster.run(300)
    for number in range(10):
        cluster.add(f"node-{number}")
        cluster.run(60)
    assert len(cluster.group) >= 12
    assert len(cluster.growths) <= 4
    expect_growths_that_pay(cluster)


@pytest.mark.parametrize(("up_s", "down_s"), [(150, 150), (300, 600)])
def test_a_node_that_comes_and_goes_is_soon_left_alone(monkeypatch: pytest.MonkeyPatch, up_s: int, down_s: int) -> None:
    """It gains at most an eighth of the time that it stays, less than a restart costs."""
    cluster = GrowingCluster(monkeypatch, (2, 16), restart_s=60)
    for number in range(8):
        cluster.add(f"stays-{number}")
    cluster.run(600)
    by_hour = []
    for _ in range(6):
        before = len(cluster.growths)
        for _ in range(HOUR // (up_s + down_s)):
            cluster.add("flaps")
            cluster.run(up_s)
            cluster.remove("flaps")
            cluster.run(down_s)
        by_hour.append(len(cluster.growths) - before)
    assert 1 <= sum(by_hour) <= 9
    assert sum(by_hour[-3:]) <= 3
    assert cluster.forced_restarts() == sum(by_hour)
    expect_growths_that_pay(cluster)


def test_the_log_says_once_why_a_group_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (2, 16), restart_s=60)
    for number in range(8):
        cluster.add(f"stays-{number}")
    cluster.run(600)
    for _ in range(10):
        cluster.add("flaps")
        cluster.run(300)
        cluster.remove("flaps")
        cluster.run(600)
    reasons = [line for line in cluster.log if "stays at 8" in line]
    assert len(reasons) == 1
    assert re.fullmatch(
        "the cluster has room for 9 workers; stays at 8: a restart costs 6[0-9] s and would gain 5[0-9] s, because a "
        "disruption is expected in 4[0-9][0-9] s",
        reasons[0],
    )


def test_a_cluster_that_shrinks_causes_no_voluntary_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (1, 16), restart_s=30)
    for number in range(16):
        cluster.add(f"node-{number:02d}")
    cluster.run(300)
    sizes = []
    for number in range(15, 0, -1):
        cluster.remove(f"node-{number:02d}")
        cluster.run(120)
        sizes.append(len(cluster.group))
    assert sizes == list(range(15, 0, -1))
    assert cluster.growths == []
    assert cluster.forced_restarts() == 15


def test_a_group_that_loses_a_worker_without_a_notice_of_the_cluster_is_not_shrunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that Ray no longer lists may still train; its worker dies or it does not."""
    cluster = GrowingCluster(monkeypatch, (1, 4), restart_s=30)
    for name in "abcd":
        cluster.add(name)
    cluster.run(120)
    del cluster.nodes["d"]
    cluster.run(600)
    assert len(cluster.group) == 4
    assert cluster.growths == []


def test_a_part_of_a_node_waits_until_the_node_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (8, 32), restart_s=60)
    cluster.add("a", slots=8)
    cluster.run(300)
    cluster.in_use["b"] = 5
    cluster.add("b", slots=8)
    cluster.run(300)
    assert cluster.growths == []
    cluster.in_use["b"] = 0
    cluster.run(120)
    assert [(growth.size, growth.room) for growth in cluster.growths] == [(8, 16)]
    assert len(cluster.group) == 16


def test_a_group_starts_on_parts_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is better than nothing, and when the rest becomes free, the group grows into it."""
    cluster = GrowingCluster(monkeypatch, (2, 8), restart_s=30)
    cluster.in_use["a"] = 5
    cluster.add("a", slots=8)
    cluster.run(60)
    assert len(cluster.group) == 3
    cluster.in_use["a"] = 0
    cluster.run(120)
    assert len(cluster.group) == 8


def test_growth_stops_when_the_phase_is_about_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (4, 8), restart_s=60, steps=2400)
    for name in "abcd":
        cluster.add(name)
    cluster.run(60 + 500)
    for name in "efgh":
        cluster.add(name)
    cluster.run(60)
    assert cluster.growths == [], "100 s at 4 workers are 50 s at 8, and a restart costs 60 s"
    reason = "stays at 4: a restart costs 60 s and would gain 4[0-9] s, because training would end 4[0-9] s after it"
    assert re.search(reason, "\n".join(cluster.log))


def test_a_group_that_has_yielded_is_restarted_even_if_the_room_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (1, 4), restart_s=20)
    cluster.add("a")
    cluster.run(60)
    cluster.add("b")
    while not cluster.growths:
        cluster.run(1)
    cluster.remove("b")
    cluster.run(30)
    assert len(cluster.runs) == 2
    assert cluster.group == ["a"]


def test_a_group_that_has_yielded_keeps_its_size_if_there_is_room_for_fewer_than_the_smallest() -> None:
    mailbox = SimpleNamespace(
        outlook=lambda: Outlook(True, 10.0, float(HOUR), math.inf), ask_to_yield=lambda: None, has_yielded=lambda: True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", lambda reply, timeout: reply)
        resizing = Resizing(Handle(mailbox), lambda line: None, fewest=3, most=5, check_every=5.0)
        assert resizing.next_size(4, lambda: 5, lambda size: True, lambda: None) is None
        assert resizing.next_size(4, lambda: 2, lambda size: True, lambda: None) == 4
        assert resizing.next_size(4, lambda: 3, lambda size: True, lambda: None) == 3, (
            "it waits, and a smaller group can start now"
        )


def test_a_group_yields_once_the_larger_one_could_start_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    outlooks: list[Outlook | None] = [Outlook(True, 10.0, float(HOUR), math.inf)]
    mailbox = SimpleNamespace(
        outlook=lambda: outlooks[0], ask_to_yield=lambda: events.append("asked"), has_yielded=lambda: False
    )
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ray, "get", lambda reply, timeout: reply)
    monkeypatch.setattr(resizing_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    resizing = Resizing(Handle(mailbox), lambda line: None, fewest=1, most=5, check_every=5.0)

    def turn(room: int, *, is_ready: bool = False) -> list[Any]:
        def prepare(size: int) -> bool:
            events.append(size)
            return is_ready

        clock.now += 1.0
        events.clear()
        resizing.next_size(4, lambda: room, prepare, lambda: events.append("given up"))
        return events

    assert turn(5) == [5]
    assert turn(5) == [5], "it looks at every turn"
    outlooks[0] = None
    assert turn(5) == [], "nothing changes because a reply is late"
    outlooks[0] = Outlook(True, 10.0, float(HOUR), math.inf)
    assert turn(4, is_ready=True) == ["given up"], "the room is gone"
    clock.now += 5.0
    assert turn(9, is_ready=True) == [5, "asked"]


def test_a_group_that_grows_asks_for_the_nodes_of_the_cluster_once_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (1, 2), restart_s=15)
    cluster.add("a")
    cluster.run(60)
    cluster.add("b")
    asked_at: list[float] = []
    node_resources = elastic.node_resources

    def count() -> dict[str, NodeResources]:
        asked_at.append(cluster.now)
        return node_resources()

    monkeypatch.setattr(elastic, "node_resources", count)
    while not cluster.growths:
        cluster.run(1)
    assert asked_at[-1] == cluster.now
    assert len(set(asked_at)) == len(asked_at)


def test_new_workers_start_only_on_nodes_without_other_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (2, 8), restart_s=60)
    cluster.add("a", 2)
    cluster.run(200)
    cluster.in_use["shared"] = 5
    cluster.add("shared", 8)
    cluster.add("free", 2)
    cluster.run(300)
    assert [(growth.size, growth.room) for growth in cluster.growths] == [(2, 4)]
    assert sorted(cluster.group) == ["a", "a", "free", "free"]


def test_a_node_on_which_no_worker_starts_does_not_keep_a_group_from_other_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = GrowingCluster(monkeypatch, (1, 3), restart_s=15)
    cluster.add("a")
    cluster.run(60)
    cluster.broken = {"b"}
    cluster.add("b")
    cluster.run(20)
    assert (cluster.growths, cluster.recruits) == ([], [])
    assert "a worker cannot start on node b: no disk" in cluster.log
    cluster.add("c")
    cluster.run(60)
    assert [(growth.size, growth.room) for growth in cluster.growths] == [(1, 2)]
    assert len([line for line in cluster.log if "cannot start" in line]) < 5, "not tried again at once"


def test_a_group_that_waits_for_further_nodes_looks_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (1, 4), restart_s=40)
    cluster.add("a")
    cluster.run(100)
    cluster.add("b")
    cluster.run(10)
    (growth,) = cluster.growths
    assert 2 <= growth.at - cluster.observer._resizing._room.grew_at <= 3


def test_a_group_without_a_step_is_not_restarted_however_many_nodes_join(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (1, 32), restart_s=600)
    for number in range(10):
        cluster.add(f"node-{number}")
        cluster.run(50)
    assert cluster.growths == []
    assert len(cluster.runs) == 1


def test_one_of_many_nodes_is_used_when_it_returns_after_calm_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = GrowingCluster(monkeypatch, (4, 16), restart_s=120)
    for number in range(16):
        cluster.add(f"node-{number:02d}")
    cluster.run(2 * HOUR)
    cluster.remove("node-15")
    cluster.run(600)
    cluster.add("node-15")
    cluster.run(300)
    assert len(cluster.group) == 16
    expect_growths_that_pay(cluster)
