"""Internals of Ray Train: elastic policy, controller states, failures, free resources.

Written for Ray 2.60.0. Relies on:

- `ElasticScalingPolicy._count_possible_workers` and `make_decision_for_running_worker_group`, which
  are replaced; `_get_resize_decision`, `_get_reserved_resources` and `NoopDecision`;
- `ScalingConfig._resources_per_worker_not_none`, `min_workers`;
- `ControllerCallback` and `WorkerGroupCallback`, and the classes of
  `ray.train.v2._internal.execution.controller.state`;
- `WorkerGroup.get_workers()`, whose items have `metadata.node_id`, in the order of ranks;
- the chain of causes of a failure: `WorkerGroupError.worker_failures`,
  `ControllerError.controller_failure`, `WorkerHealthCheckFailedError.health_check_failure`, and
  `cause` of a `RayTaskError`;
- `ray.train.v2.api.data_parallel_trainer.DataParallelTrainer`, which has no public name;
- `ray._private.state`: `state.get_draining_nodes()` and `available_resources_per_node()`.

Ray Train resizes by what nodes have in total and without a checkpoint
(`ElasticScalingPolicy.make_decision_for_running_worker_group`); the replacements here exist for
that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray._private import state as ray_state
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from plad_dist.compat.assumptions import Assumptions

_assumptions = Assumptions("ray", "2.60.0")
for _owner, _name, _parameters in (
    (ElasticScalingPolicy, "_count_possible_workers", ("self", "reserved_resources")),
    (
        ElasticScalingPolicy,
        "make_decision_for_running_worker_group",
        ("self", "worker_group_state", "worker_group_status"),
    ),
    (ElasticScalingPolicy, "_get_resize_decision", ("self", "num_workers")),
    (ElasticScalingPolicy, "_get_reserved_resources", ("self",)),
    (ControllerCallback, "after_controller_start", ("self", "train_run_context")),
    (ControllerCallback, "after_controller_state_update", ("self", "previous_state", "current_state")),
    (WorkerGroupCallback, "after_worker_group_start", ("self", "worker_group")),
    (WorkerGroupCallback, "after_worker_group_shutdown", ("self", "worker_group_context")),
    (WorkerGroupCallback, "after_worker_group_abort", ("self", "worker_group_context")),
    (WorkerGroup, "get_workers", ("self",)),
    (RestartingState, "__init__", ("self", "training_failed_error")),
    (WorkerGroupError, "__init__", ("self", "error_message", "worker_failures")),
    (ControllerError, "__init__", ("self", "controller_failure")),
    (WorkerHealthCheckFailedError, "__init__", ("self", "message", "failure")),
    (type(ray_state.state), "get_draining_nodes", ("self",)),
    (ray_state, "available_resources_per_node", ()),
):
    _assumptions.parameters(_assumptions.attribute(_owner, _name), *_parameters)
for _name in ("_resources_per_worker_not_none", "min_workers"):
    _assumptions.attribute(ScalingConfig, _name)


class WorkerGroupEvents(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Base class of observers of a worker group; it runs in the process of Ray Train's controller.

    Ray Train calls its own hooks, which this class translates into the `on_...` methods.
    """

    def __init__(self) -> None:
        self._worker_group: Any = None

    @property
    def node_by_rank(self) -> list[str]:
        """Ids of the nodes of the running workers by rank; empty if no group runs."""
        workers = self._worker_group.get_workers() if self._worker_group is not None else []
        return [worker.metadata.node_id for worker in workers]

    def on_controller_start(self) -> None:
        """Handle the start of the controller, before its first decision."""

    def on_group_start(self) -> None:
        """Handle the start of a new worker group."""

    def on_running(self) -> None:
        """Handle a turn of the controller in which the group runs."""

    def on_failure(self, error: Any) -> None:
        """Handle the failure of the group, after which Ray Train restarts it."""

    def on_resize(self) -> None:
        """Handle the decision to restart the group at another size."""

    def on_scheduling(self) -> None:
        """Handle the decision to start a group, before its workers start."""

    def on_waiting(self) -> None:
        """Handle a turn of the controller in which the group waits for resources."""

    def after_controller_start(self, train_run_context: Any) -> None:
        self.on_controller_start()

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._worker_group = worker_group
        self.on_group_start()

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._worker_group = None

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._worker_group = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Translate the state after a turn of the controller, even if it has not changed."""
        match current_state:
            case RunningState():
                self.on_running()
            case RestartingState() if not isinstance(previous_state, RestartingState):
                self.on_failure(current_state.training_failed_error)
            case ResizingState():
                self.on_resize()
            case SchedulingState():
                self.on_scheduling()
            case InitializingState() | RestartingState() | ReschedulingState():
                self.on_waiting()


def count_only_free_resources(
    free_by_node: Callable[[], dict[str, dict[str, float]]], own_workers_on: Callable[[set[str]], int]
) -> None:
    """Let this process's elastic policy count only resources that are free or its own workers'.

    Ray's policy counts all that the nodes have, including the resources of other jobs and of
    leaving nodes. It would end a healthy group for a size that cannot start, and after a death try
    sizes that are no longer available.

    Args:
        free_by_node: returns the free resources of every node that may be used.
        own_workers_on: returns how many workers the group has on some nodes; they end before the
            next group starts.
    """
    original = ElasticScalingPolicy._count_possible_workers

    def count_possible_workers(self: Any, reserved_resources: Any) -> int:
        per_worker = self.scaling_config._resources_per_worker_not_none
        free = free_by_node()
        fitting = sum(workers_that_fit(resources, per_worker) for resources in free.values())
        return min(int(original(self, reserved_resources)), fitting + own_workers_on(set(free)))

    ElasticScalingPolicy._count_possible_workers = count_possible_workers


def resize_only_after_yield(
    takes_steps: Callable[[], bool], ask_to_yield: Callable[[int], None], has_yielded: Callable[[], bool | None]
) -> None:
    """Let this process's elastic policy resize a group only after the group has yielded.

    A group yields when it has committed a checkpoint and waits for its restart.

    Ray's policy ends a group at once, and all steps since its latest checkpoint are lost. The
    controller keeps polling in between, so that a group that finishes or dies first is handled as
    usual. A group that has taken no step is not resized either: nodes that join one by one could
    otherwise keep it from ever taking one.

    Args:
        takes_steps: returns True if the running group has taken a step.
        ask_to_yield: asks the group to yield to one of another size.
        has_yielded: returns True if the group has yielded, None if it was not asked.
    """
    original = ElasticScalingPolicy.make_decision_for_running_worker_group

    def make_decision(self: Any, worker_group_state: Any, worker_group_status: Any) -> Any:
        yielded = has_yielded()
        if yielded:
            reserved = self._get_reserved_resources()
            size = self._count_possible_workers(reserved) if reserved is not None else 0
            # A waiting group must be restarted in any case, at its old size if the room is gone.
            return self._get_resize_decision(
                size if size >= self.scaling_config.min_workers else worker_group_state.num_workers
            )
        if yielded is None:
            decision = original(self, worker_group_state, worker_group_status)
            if not isinstance(decision, NoopDecision) and takes_steps():
                ask_to_yield(decision.num_workers)
        return NoopDecision()

    ElasticScalingPolicy.make_decision_for_running_worker_group = make_decision


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of every node that is alive and not about to leave, by node id."""
    leaving = set(ray_state.state.get_draining_nodes() or {})
    staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving
    free: dict[str, dict[str, float]] = ray_state.available_resources_per_node()
    return {node: free.get(node, {}) for node in staying}


def workers_that_fit(free: dict[str, float], per_worker: dict[str, float]) -> int:
    """Return how many workers fit into the free resources of a node."""
    return int(min((free.get(name, 0.0) // amount for name, amount in per_worker.items() if amount > 0), default=0))


def worker_failures(error: Any) -> dict[int, BaseException]:
    """Return the failures of the workers by rank; empty if the group failed as a whole."""
    return dict(getattr(error, "worker_failures", None) or {})


def root_cause(error: BaseException, stop_at: tuple[type[BaseException], ...]) -> BaseException:
    """Return the exception at the start of a chain of causes, or the first one of `stop_at`."""
    while not isinstance(error, stop_at):
        candidates = (getattr(error, name, None) for name in ("health_check_failure", "controller_failure", "cause"))
        cause = next((value for value in candidates if isinstance(value, BaseException)), None) or error.__cause__
        if cause is None:
            break
        error = cause
    return error


def is_preemption(error: Any) -> bool:
    """Return True if a group ended because a node left as announced."""
    return isinstance(error, PreemptionError)


def is_health_check_timeout(error: Any) -> bool:
    """Return True if a worker did not answer health checks in time."""
    return isinstance(error, WorkerHealthCheckTimeoutError)
