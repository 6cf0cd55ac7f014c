"""Contract of the scaling policy with Ray Train: classes, calls and copies that it relies on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import RunningState, SchedulingState
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from plad_dist.compat import ray_scaling
from plad_dist.compat.ray_scaling import GroupScalingPolicy, Resources, Trainer
from plad_dist.compat.ray_train import WorkerGroupEvents

ELASTIC = ScalingConfig(num_workers=(2, 6), resources_per_worker={"CPU": 2.0})
FIXED = ScalingConfig(num_workers=4, resources_per_worker={"CPU": 2.0})
RUNNING = WorkerGroupPollStatus({0: WorkerStatus(running=True)})


class Sizes:
    """Sizes by two settings; records what it is asked."""

    def __init__(self) -> None:
        self.has_room_for = 100
        self.next: int | None = None
        self.asked: list[Any] = []

    def room(self, per_worker: Resources) -> int:
        self.asked.append(dict(per_worker))
        return self.has_room_for

    def next_size(self, size: int, per_worker: Resources, granted: Callable[[], int]) -> int | None:
        self.asked.append((size, dict(per_worker), granted()))
        return self.next


class Client:
    """Client of Ray's autoscaling coordinator, which grants the CPUs of two nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requested: list[int] = []
        granted = {"a": {"CPU": 8.0}, "b": {"CPU": 5.0}}
        self.recomputed = 0  # times that the coordinator was asked to look at the cluster again

        def get_reserved_resources(requester: str, recompute: bool = False) -> Any:
            self.recomputed += recompute
            return granted

        call = SimpleNamespace(remote=get_reserved_resources)
        self._autoscaling_coordinator = SimpleNamespace(get_reserved_resources=call)
        monkeypatch.setattr(ray, "get", lambda reply, timeout: reply)

    def maybe_send_resource_request(self, scaling_config: ScalingConfig, num_workers: int) -> None:
        self.requested.append(num_workers)


def policy_with(sizes: Sizes, client: Client) -> GroupScalingPolicy:
    policy = GroupScalingPolicy(ELASTIC, sizes)
    policy._requester_id, policy._coordinator_client = "train-test", client
    return policy


def running(workers: int) -> WorkerGroupState:
    """Return the state of a running group in Ray's own class."""
    return WorkerGroupState(0.0, None, [SimpleNamespace()] * workers, None)  # type: ignore[arg-type, list-item]


def test_a_group_starts_at_the_size_that_both_ray_and_the_cluster_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, client, pauses = Sizes(), Client(monkeypatch), list[float]()
    monkeypatch.setattr(ray_scaling, "time", SimpleNamespace(sleep=pauses.append, monotonic=lambda: 0.0))
    policy = policy_with(sizes, client)
    assert policy.make_decision_for_non_running_worker_group() == ResizeDecision(6, {"CPU": 2.0})
    sizes.has_room_for = 3
    assert policy.make_decision_for_non_running_worker_group() == ResizeDecision(3, {"CPU": 2.0})
    sizes.has_room_for = 1
    assert pauses == []
    assert policy.make_decision_for_non_running_worker_group() == NoopDecision()
    assert len(pauses) == 1, "Ray's controller asks again at once"
    assert sizes.asked == [{"CPU": 2.0}] * 3
    assert client.requested == [6] * 3, "nodes are requested for the largest size"
    assert client.recomputed == 1, "once a second"


def test_a_running_group_is_restarted_only_at_the_size_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, client = Sizes(), Client(monkeypatch)
    policy = policy_with(sizes, client)

    def decide() -> Any:
        return policy.make_decision_for_running_worker_group(worker_group_state=running(3), worker_group_status=RUNNING)

    assert decide() == NoopDecision()
    sizes.next = 5
    assert decide() == ResizeDecision(5, {"CPU": 2.0})
    assert sizes.asked == [(3, {"CPU": 2.0}, 6)] * 2
    assert client.requested == [6] * 2, "the request must be renewed, or it expires"


def test_nothing_is_granted_while_the_coordinator_does_not_respond(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, client = Sizes(), Client(monkeypatch)
    policy = policy_with(sizes, client)

    def fail(reply: Any, timeout: float) -> Any:
        raise TimeoutError

    monkeypatch.setattr(ray, "get", fail)
    assert policy.make_decision_for_running_worker_group(running(3), RUNNING) == NoopDecision()
    assert sizes.asked == [(3, {"CPU": 2.0}, 0)]


@dataclass
class LabelledDecision(ResizeDecision):
    """Decision of a later Ray, with labels of the nodes."""

    label_selectors: list[dict[str, str]] = field(default_factory=list)


def test_fields_that_a_later_ray_adds_to_a_decision_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def labelled(self: ElasticScalingPolicy, num_workers: int) -> ResizeDecision:
        return LabelledDecision(num_workers, {"CPU": 2.0}, [{"zone": "a"}] * num_workers)

    monkeypatch.setattr(ElasticScalingPolicy, "_get_resize_decision", labelled)
    sizes = Sizes()
    policy = policy_with(sizes, Client(monkeypatch))
    sizes.next = 4
    decision = policy.make_decision_for_running_worker_group(running(3), RUNNING)
    assert decision == LabelledDecision(4, {"CPU": 2.0}, [{"zone": "a"}] * 4)
    assert policy.make_decision_for_non_running_worker_group().label_selectors == [{"zone": "a"}] * 6
    scheduled: list[int] = []
    observer = WorkerGroupEvents()
    monkeypatch.setattr(observer, "on_scheduling", scheduled.append)
    observer.after_controller_state_update(RunningState(), SchedulingState(decision))
    assert scheduled == [4]


class Observer(WorkerGroupEvents):
    """Observer with arguments, which also answers a policy."""

    def __init__(self, name: str, limit: int) -> None:
        super().__init__(name, limit)
        self.name, self.limit = name, limit

    def room(self, per_worker: Resources) -> int:
        return self.limit

    def next_size(self, size: int, per_worker: Resources, granted: Callable[[], int]) -> int | None:
        return None


def test_the_policy_and_the_callbacks_meet_one_observer_in_the_controller() -> None:
    """Ray pickles them one by one."""
    observer, other = Observer("first", 1), Observer("second", 2)
    pickled = [ray.cloudpickle.dumps(thing) for thing in (GroupScalingPolicy(ELASTIC, observer), [observer], other)]
    policy, (callback,), another = (ray.cloudpickle.loads(data) for data in pickled)
    assert policy._sizes is callback
    assert (callback.name, another.name) == ("first", "second")
    callback.after_worker_group_start(SimpleNamespace(get_workers=list))
    (copy,) = ray.cloudpickle.loads(ray.cloudpickle.dumps([callback]))
    assert copy is callback


@pytest.mark.parametrize(("scaling", "kind"), [(ELASTIC, GroupScalingPolicy), (FIXED, FixedScalingPolicy)])
def test_the_controller_gets_the_policy(
    monkeypatch: pytest.MonkeyPatch, scaling: ScalingConfig, kind: type[ScalingPolicy]
) -> None:
    passed: list[dict[str, Any]] = []

    def initialize(self: DataParallelTrainer, **arguments: Any) -> Any:
        passed.append(arguments)
        return SimpleNamespace(error=None)

    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", initialize)
    monkeypatch.setattr("ray.train.v2.api.data_parallel_trainer.ObjectRefWrapper", lambda function: function)
    sizes = Sizes()
    Trainer(lambda: None, sizes=sizes, scaling_config=scaling).fit()
    (arguments,) = passed
    policy = arguments["scaling_policy"]
    assert type(policy) is kind
    assert isinstance(policy, ControllerCallback)
    assert policy.scaling_config == scaling
    if kind is GroupScalingPolicy:
        assert policy._sizes is sizes


def test_a_group_of_one_size_restarts_at_that_size_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare node takes the place of a dead one; Ray waits for room as long as there is none."""
    policy = FixedScalingPolicy(FIXED)
    policy._coordinator_client = Client(monkeypatch)
    assert policy.make_decision_for_non_running_worker_group() == ResizeDecision(4, {"CPU": 2.0})
    assert policy.make_decision_for_running_worker_group(running(4), RUNNING) == NoopDecision()


def test_resources_of_nodes_that_leave_or_are_dead_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ray._private.state
    monkeypatch.setattr(state.state, "get_draining_nodes", lambda: {"leaves": 0})
    free = {
        "leaves": {"CPU": 8.0, "GPU": 8.0},
        "stays": {"CPU": 8.0, "GPU": 3.0},
        "full": {"CPU": 0.5},
        "dead": {"CPU": 8.0},
    }
    nodes = [
        {"NodeID": name, "Alive": name != "dead", "Resources": {"CPU": 8.0, "GPU": 8.0}} for name in [*free, "new"]
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(state, "available_resources_per_node", lambda: free)
    workers = {
        name: tuple(ray_scaling.workers_that_fit(resources, {"CPU": 1.0, "GPU": 1.0}) for resources in node)
        for name, node in ray_scaling.node_resources().items()
    }
    assert workers == {"stays": (8, 3), "full": (8, 0), "new": (8, 0)}


@pytest.mark.parametrize("answers", [True, False])
def test_ctrl_c_ends_a_controller_that_does_not_abort(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """While it waits for resources, its loop gets to nothing else."""
    killed: list[Any] = []
    timeouts: list[float] = []

    def get(reply: Any, timeout: float) -> None:
        timeouts.append(timeout)
        raise ray.exceptions.RayActorError if answers else ray.exceptions.GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", killed.append)
    controller = SimpleNamespace(abort=SimpleNamespace(remote=lambda: None))
    before = signal.getsignal(signal.SIGINT)
    try:
        Trainer._register_sigint_handler(None, controller)  # type: ignore[arg-type]
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (killed, timeouts) == ([controller], [10.0])
