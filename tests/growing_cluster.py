"""A simulated cluster of nodes that come and go, with an elastic group on it.

The scaling policy, the observer, the mailbox and their classes of Ray are real. Ray's controller,
the nodes and the clock are simulated: training takes a step a second with one worker, and
proportionally more with several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.scaling_policy import elastic as elastic_of_ray
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2.api.exceptions import WorkerGroupError

from plad_dist.compat import ray_scaling, ray_train
from plad_dist.compat.ray_scaling import GroupScalingPolicy, NodeResources
from plad_dist.training.driver import elastic, mailbox, resizing
from plad_dist.training.driver.elastic import GroupSettings, WorkerGroupCallbacks
from plad_dist.training.driver.growth import Room
from plad_dist.training.driver.mailbox import ProgressMailbox
from plad_dist.training.messages import Began, Said, StepDone

PHASE = "round-0"
RUNNING = WorkerGroupPollStatus({0: WorkerStatus(running=True)})


class Handle:
    """Handle of an actor that lives in this process: a call returns its reply."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(self._state, method))


class Coordinator:
    """Ray's autoscaling coordinator, which grants all that the nodes have."""

    def __init__(self, cluster: GrowingCluster) -> None:
        self._cluster = cluster
        self._autoscaling_coordinator = SimpleNamespace(
            get_reserved_resources=SimpleNamespace(remote=lambda requester, recompute=False: self._reserved())
        )

    def _reserved(self) -> dict[str, dict[str, float]]:
        return {name: {"CPU": float(slots)} for name, slots in self._cluster.nodes.items()}

    def maybe_send_resource_request(self, scaling_config: ScalingConfig, num_workers: int) -> None:
        """Take the request."""


class Growth(NamedTuple):
    """A voluntary restart, when it was decided.

    Attributes:
        room: workers that the cluster had room for.
        seconds_left: seconds of training left at the present size.
        runs: worker groups so far: their size, start, end (None for the present one), and True if
            they were disrupted.
    """

    at: float
    size: int
    room: int
    seconds_left: float
    runs: list[tuple[int, float, float | None, bool]]


class GrowingCluster:
    """The cluster and its group.

    Args:
        sizes: smallest and largest size of the group.
        restart_s: seconds from the start of a group to its first step.
        steps: steps of the phase.

    Attributes:
        recruits: node of each worker that was started beside the group.
        broken: nodes on which no worker can start.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], restart_s: int, steps: int = 10**9
    ) -> None:
        self.now, self.restart_s, self.steps = 10_000.0, restart_s, steps
        self.nodes: dict[str, int] = {}  # workers that fit
        self.in_use: Counter[str] = Counter()  # by other jobs, in workers
        self.group: list[str] = []  # nodes of the workers
        self.recruits: list[str] = []
        self.broken: set[str] = set()
        self.log: list[str] = []
        self.growths: list[Growth] = []
        self.runs: list[tuple[int, float, float | None, bool]] = []
        self._begun = self._step = 0.0
        self._step_credit, self._ready_at, self._yields = 0.0, 0.0, False
        clock = SimpleNamespace(monotonic=lambda: self.now)
        for module in (elastic, mailbox, resizing):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(ray_scaling, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=clock.monotonic))
        monkeypatch.setattr(elastic_of_ray, "time_monotonic", lambda: self.now)
        monkeypatch.setattr(elastic, "node_resources", self._node_resources)
        monkeypatch.setattr(elastic, "keep_workers", lambda name, ask_to_end: None)
        for module in (elastic, ray_train):
            monkeypatch.setattr(module, "benched_nodes", lambda: list(self.recruits))
        monkeypatch.setattr(elastic, "recruits_have_started", lambda: True)
        monkeypatch.setattr(ray_train, "recruit_workers", lambda group, nodes: self._recruit(nodes))
        monkeypatch.setattr(ray_train, "dismiss_recruits", self.recruits.clear)
        monkeypatch.setattr(ray, "get", lambda reply, timeout=None: reply)
        monkeypatch.setattr(ray, "cluster_resources", dict)
        self._mailbox = ProgressMailbox(PHASE, 100)
        handle = Handle(self._mailbox)
        handle._actor_id = b"mailbox"
        self.observer = WorkerGroupCallbacks(handle, GroupSettings(PHASE, *sizes, patience=60.0, check_every=5.0))
        scaling = ScalingConfig(num_workers=sizes, resources_per_worker={"CPU": 1.0})
        self.policy = GroupScalingPolicy(scaling, self.observer)
        self.policy._requester_id, self.policy._coordinator_client = "train-test", Coordinator(self)
        self._state: Any = None
        self.observer.after_controller_start(None)

    def add(self, name: str, slots: int = 1) -> None:
        """Let a node join on which `slots` workers fit."""
        self.nodes[name] = slots

    def remove(self, name: str) -> None:
        """Let a node die, and with it the group if it has a worker there."""
        del self.nodes[name]
        self.recruits[:] = [node for node in self.recruits if node != name]
        if name in self.group:
            self._end_run(is_disrupted=True)
            self._enter(RestartingState(WorkerGroupError("a worker died", {})))

    def run(self, seconds: int) -> None:
        """Let time pass, with a turn of the controller every second."""
        for _ in range(seconds):
            self.now += 1.0
            self._train()
            self._turn()
            self.log += [message.text for message in self._mailbox.drain() if isinstance(message, Said)]

    def forced_restarts(self) -> int:
        return sum(is_disrupted for *_, is_disrupted in self.runs)

    def _turn(self) -> None:
        if not isinstance(self._state, RunningState):
            decision = self.policy.make_decision_for_non_running_worker_group()
            if isinstance(decision, ResizeDecision):
                self._start(decision)
            return
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in self.group]
        state = WorkerGroupState(self._begun, None, workers, None)  # type: ignore[arg-type]
        was_asked = self._mailbox.wants_yield()
        decision = self.policy.make_decision_for_running_worker_group(
            worker_group_state=state, worker_group_status=RUNNING
        )
        if self._mailbox.wants_yield() and not was_asked:
            self._record_growth()
        self._enter(RunningState())
        if isinstance(decision, ResizeDecision):
            self._enter(ResizingState(decision))
            self._start(decision)

    def _start(self, decision: ResizeDecision) -> None:
        """Start a group of what is there of its workers and the recruits, or fail to.

        Others are packed on the nodes with the most room.
        """
        self._end_run(is_disrupted=False)
        self._enter(SchedulingState(decision))
        self.observer.after_worker_group_shutdown(None)
        seats = [name for name in self.group + self.recruits if name in self.nodes]
        self.group = []
        self.recruits.clear()
        kept = Counter(seats)
        free = {name: slots - self.in_use[name] - kept[name] for name, slots in self.nodes.items()}
        seats += [name for name in sorted(free, key=lambda name: (-free[name], name)) for _ in range(free[name])]
        if len(seats) < decision.num_workers:
            self._enter(ReschedulingState(WorkerGroupError("no room", {})))
            return
        self.group = seats[: decision.num_workers]
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in self.group]
        self.observer.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
        self._begun, self._ready_at, self._yields, self._step_credit = self.now, self.now + self.restart_s, False, 0.0
        self.runs.append((len(self.group), self.now, None, False))
        self._mailbox.post(Began(PHASE, self.steps, "starts"))
        self._enter(RunningState())

    def _recruit(self, nodes: Sequence[str]) -> dict[str, str]:
        self.recruits += [node for node in nodes if node not in self.broken]
        return {node: "no disk" for node in nodes if node in self.broken}

    def _train(self) -> None:
        """Take the steps of a second, or yield."""
        if not isinstance(self._state, RunningState) or self.now < self._ready_at or self._yields:
            return
        if asked := self._mailbox.wants_yield():
            self._mailbox.yielded(asked)
            self._yields = True
            return
        self._step_credit += len(self.group)
        while self._step_credit >= 1 and self._step < self.steps:
            self._step, self._step_credit = self._step + 1, self._step_credit - 1
            figures = {"loss": 1.0, "seconds": 1 / len(self.group)}
            self._mailbox.post(StepDone(PHASE, int(self._step), 0, 0, len(self.group), figures))

    def _record_growth(self) -> None:
        room: Room = self.observer._resizing._room
        left = (self.steps - self._step) / len(self.group)
        self.growths.append(Growth(self.now, len(self.group), room.workers, left, list(self.runs)))

    def _end_run(self, *, is_disrupted: bool) -> None:
        if self.runs and self.runs[-1][2] is None:
            size, began, _, _ = self.runs[-1]
            self.runs[-1] = (size, began, self.now, is_disrupted)

    def _enter(self, state: Any) -> None:
        previous, self._state = self._state, state
        self.observer.after_controller_state_update(previous, state)

    def _node_resources(self) -> dict[str, NodeResources]:
        own = Counter(self.group + self.recruits)
        return {
            name: NodeResources({"CPU": float(slots)}, {"CPU": max(float(slots - own[name] - self.in_use[name]), 0.0)})
            for name, slots in self.nodes.items()
        }
