"""What is heeded and said of a worker group: who died first, when nodes leave, what room there is."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from plad_dist.errors import RunFailed, UserError
from plad_dist.training.driver import elastic
from plad_dist.training.driver.elastic import ProgressMailbox, first_death, innermost
from plad_dist.training.worker import notices
from plad_dist.training.worker.notices import PreemptionNotices


def broken_connection() -> RuntimeError:
    return RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.3]:1234")


def test_the_death_is_named_and_not_those_whose_connections_broke_with_it() -> None:
    death = WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())
    error = WorkerGroupError("failed", {0: broken_connection(), 1: death})
    assert first_death(error).startswith("worker 1 died: ")
    assert "Connection closed" not in first_death(error)


def test_a_worker_that_does_not_answer_is_named_with_the_key_that_says_how_long() -> None:
    error = WorkerGroupError("failed", {0: broken_connection(), 1: WorkerHealthCheckTimeoutError("late")})
    assert first_death(error) == "worker 1 does not answer (training.worker_timeout_s)"


def test_a_failure_without_a_death_is_told_in_its_own_words() -> None:
    error = WorkerGroupError("failed", {1: ValueError("line one\nno space left on device")})
    assert first_death(error) == "worker 1 failed: ValueError: no space left on device"


def test_a_node_that_left_with_notice_is_no_death() -> None:
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert first_death(PreemptionError(preemption_info=info)) == "a node has left as it had announced"


def test_what_the_controller_was_told_to_end_with_is_found() -> None:
    told = RunFailed("waited 600 s for room for 4 workers")
    assert innermost(ControllerError(told)) is told
    assert innermost(ControllerError(UserError("x"))).args == ("x",)
    assert "waited 600 s" in first_death(ControllerError(told))


class Clock:
    """Both clocks of a module, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now, sleep=lambda seconds: None)
        monkeypatch.setattr(notices, "time", fake)


def leaves(node: str, at: float | None) -> Any:
    return SimpleNamespace(deadline_ms=None if at is None else at * 1000, preempted_node_to_ranks={node: [0]})


@pytest.fixture
def heeding(monkeypatch: pytest.MonkeyPatch) -> tuple[PreemptionNotices, Clock]:
    monkeypatch.setattr(PreemptionNotices, "_ask_whether_to_yield", lambda self: None)
    clock = Clock(monkeypatch)
    return PreemptionNotices(object()), clock


def test_a_notice_asks_for_a_checkpoint_now_and_for_the_last_one_in_time(
    heeding: tuple[PreemptionNotices, Clock],
) -> None:
    """Two steps and three commits before the node leaves, and a margin."""
    found, clock = heeding
    assert not found.heed(None, None)
    assert found.heed(leaves("a", 1300.0), None)
    assert not found.heed(leaves("a", 1300.0), None), "it is the same notice"
    clock.now = 1300.0 - (15 + 3 * 5 + 2 * 40) - 1
    assert not found.wishes(5.0, 40.0)["leave"]
    clock.now += 1
    assert found.wishes(5.0, 40.0)["leave"]


def test_a_second_node_that_leaves_sooner_counts(heeding: tuple[PreemptionNotices, Clock]) -> None:
    found, _ = heeding
    assert found.heed(leaves("a", 3000.0), None)
    assert not found.wishes(0.0, 0.0)["leave"]
    assert found.heed(leaves("b", 1010.0), None)
    assert found.wishes(0.0, 0.0)["leave"]


def test_a_node_that_leaves_sooner_than_it_said_first_counts(heeding: tuple[PreemptionNotices, Clock]) -> None:
    found, _ = heeding
    assert found.heed(leaves("a", 3000.0), None)
    assert not found.heed(leaves("a", 1010.0), None), "no other node leaves"
    assert found.wishes(0.0, 0.0)["leave"]


def test_a_node_that_does_not_say_when_it_leaves_is_taken_to_leave_at_once(
    heeding: tuple[PreemptionNotices, Clock],
) -> None:
    found, _ = heeding
    assert found.heed(leaves("a", None), None)
    assert found.wishes(0.0, 0.0)["leave"]


def test_it_is_looked_once_a_second(heeding: tuple[PreemptionNotices, Clock]) -> None:
    found, clock = heeding
    assert not found.wishes(0.0, 0.0)["look"]
    clock.now += 1
    assert found.wishes(0.0, 0.0)["look"]
    assert not found.wishes(0.0, 0.0)["look"]


def test_a_late_answer_of_an_earlier_group_is_no_answer() -> None:
    mailbox = ProgressMailbox()
    mailbox.new_group()
    mailbox.ask_to_yield()
    early = mailbox.wants_yield()
    mailbox.new_group()
    assert mailbox.wants_yield() == 0
    mailbox.yielded(early)
    mailbox.ask_to_yield()
    assert not mailbox.has_yielded()
    mailbox.yielded(mailbox.wants_yield())
    assert mailbox.has_yielded()


class Policy:
    """Ray Train's policy for a group of one, with room for two."""

    scaling_config = SimpleNamespace(min_workers=1)

    def __init__(self) -> None:
        self.room = 2

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        return self._get_resize_decision(self.room) if self.room != worker_group_state.num_workers else NoopDecision()

    def _get_resize_decision(self, size: int) -> ResizeDecision:
        return ResizeDecision(num_workers=size, resources_per_worker={})

    def _get_reserved_resources(self) -> dict[str, Any]:
        return {}

    def _count_possible_workers(self, reserved: Any) -> int:
        return self.room


@pytest.mark.parametrize(("room_left", "size"), [(2, 2), (0, 1)])
def test_a_group_is_resized_when_it_stands_still_and_not_before(
    monkeypatch: pytest.MonkeyPatch, room_left: int, size: int
) -> None:
    """A group that stands still is started anew in any case, also where the room is gone by then."""
    monkeypatch.setattr(elastic, "ElasticScalingPolicy", Policy)
    state: dict[str, Any] = {"steps": False, "asked": [], "yielded": None}

    def ask(workers: int) -> None:
        state["asked"].append(workers)
        state["yielded"] = False

    monkeypatch.setattr(Policy, "make_decision_for_running_worker_group", Policy.make_decision_for_running_worker_group)
    elastic.let_them_save(lambda: state["steps"], ask, lambda: state["yielded"])
    policy, group = Policy(), SimpleNamespace(num_workers=1)

    def decide() -> Any:
        return policy.make_decision_for_running_worker_group(worker_group_state=group, worker_group_status=None)

    assert isinstance(decide(), NoopDecision), "it has taken no step yet"
    assert state["asked"] == []
    state["steps"] = True
    assert isinstance(decide(), NoopDecision)
    assert state["asked"] == [2]
    assert isinstance(decide(), NoopDecision), "it has not committed its checkpoint"
    state["yielded"], policy.room = True, room_left
    assert decide().num_workers == size
    assert state["asked"] == [2]


def test_the_patched_policy_is_called_as_ray_calls_it() -> None:
    """Ray passes by name: what is put in the place of its methods has the names of its parameters."""
    real = ElasticScalingPolicy
    before = real._count_possible_workers, real.make_decision_for_running_worker_group
    try:
        elastic.count_what_is_free(dict, lambda nodes: 0)
        elastic.let_them_save(lambda: True, lambda size: None, lambda: None)
        after = real._count_possible_workers, real.make_decision_for_running_worker_group
        for ours, theirs in zip(after, before, strict=True):
            assert ours is not theirs
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    finally:
        real._count_possible_workers, real.make_decision_for_running_worker_group = before  # type: ignore[method-assign]


def test_room_is_what_is_free_on_nodes_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ray._private.state
    monkeypatch.setattr(state.state, "get_draining_nodes", lambda: {"leaves": 0})
    free = {
        "leaves": {"CPU": 8.0, "GPU": 8.0},
        "stays": {"CPU": 8.0, "GPU": 3.0},
        "full": {"CPU": 0.5},
        "dead": {"CPU": 8.0},
    }
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": name != "dead"} for name in free])
    monkeypatch.setattr(state, "available_resources_per_node", lambda: free)
    found = {
        name: elastic._room(resources, {"CPU": 1.0, "GPU": 1.0}) for name, resources in elastic.free_resources().items()
    }
    assert found == {"stays": 3, "full": 0}
