"""Replacements in Ray Train's elastic policy, and readers of Ray's internals."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from plad_dist.compat import ray_train
from plad_dist.compat.ray_train import WorkerGroupEvents


class Policy:
    """Ray Train's policy for a group of one worker, with room for two."""

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


@pytest.mark.parametrize(("room_after_yield", "size"), [(2, 2), (0, 1)])
def test_a_group_is_resized_when_it_has_yielded_and_not_before(
    monkeypatch: pytest.MonkeyPatch, room_after_yield: int, size: int
) -> None:
    """A group that has yielded is restarted in any case, even if the room is gone by then."""
    monkeypatch.setattr(ray_train, "ElasticScalingPolicy", Policy)
    state: dict[str, Any] = {"steps": False, "asked": [], "yielded": None}

    def ask(workers: int) -> None:
        state["asked"].append(workers)
        state["yielded"] = False

    monkeypatch.setattr(Policy, "make_decision_for_running_worker_group", Policy.make_decision_for_running_worker_group)
    ray_train.resize_only_after_yield(lambda: state["steps"], ask, lambda: state["yielded"])
    policy, group = Policy(), SimpleNamespace(num_workers=1)

    def decide() -> Any:
        return policy.make_decision_for_running_worker_group(worker_group_state=group, worker_group_status=None)

    assert isinstance(decide(), NoopDecision), "it has taken no step yet"
    assert state["asked"] == []
    state["steps"] = True
    assert isinstance(decide(), NoopDecision)
    assert state["asked"] == [2]
    assert isinstance(decide(), NoopDecision), "it has not committed its checkpoint"
    state["yielded"], policy.room = True, room_after_yield
    assert decide().num_workers == size
    assert state["asked"] == [2]


def test_replaced_methods_take_the_parameters_that_ray_passes_by_name() -> None:
    real = ElasticScalingPolicy
    before = real._count_possible_workers, real.make_decision_for_running_worker_group
    try:
        ray_train.count_only_free_resources(dict, lambda nodes: 0)
        ray_train.resize_only_after_yield(lambda: True, lambda size: None, lambda: None)
        after = real._count_possible_workers, real.make_decision_for_running_worker_group
        for ours, theirs in zip(after, before, strict=True):
            assert ours is not theirs
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    finally:
        real._count_possible_workers = before[0]  # type: ignore[method-assign]
        real.make_decision_for_running_worker_group = before[1]  # type: ignore[method-assign]


def test_room_is_counted_by_free_resources_of_nodes_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
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
    workers = {
        node: ray_train.workers_that_fit(resources, {"CPU": 1.0, "GPU": 1.0})
        for node, resources in ray_train.free_resources().items()
    }
    assert workers == {"stays": 3, "full": 0}


class Recorder(WorkerGroupEvents):
    """Records the names of its events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def on_controller_start(self) -> None:
        self.events.append("controller start")

    def on_group_start(self) -> None:
        self.events.append("group start")

    def on_running(self) -> None:
        self.events.append("running")

    def on_failure(self, error: Any) -> None:
        self.events.append(f"failure {error}")

    def on_resize(self) -> None:
        self.events.append("resize")

    def on_scheduling(self) -> None:
        self.events.append("scheduling")

    def on_waiting(self) -> None:
        self.events.append("waiting")


def test_states_of_the_controller_become_events() -> None:
    recorder = Recorder()
    recorder.after_controller_start(None)
    error = WorkerGroupError("lost", {})
    restarting = RestartingState(error)
    states = [
        InitializingState(), SchedulingState(NoopDecision()), RunningState(), restarting, restarting,
        ReschedulingState(error), ResizingState(NoopDecision()),
    ]  # fmt: skip
    for previous, current in zip([InitializingState(), *states], states, strict=False):
        recorder.after_controller_state_update(previous, current)
    assert recorder.events == [
        "controller start", "waiting", "scheduling", "running", f"failure {error}", "waiting", "waiting", "resize",
    ]  # fmt: skip


def test_nodes_of_workers_are_known_while_their_group_runs() -> None:
    recorder = Recorder()
    assert recorder.node_by_rank == []
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in ("a", "b")]
    recorder.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    assert recorder.node_by_rank == ["a", "b"]
    recorder.after_worker_group_shutdown(None)
    assert recorder.node_by_rank == []
