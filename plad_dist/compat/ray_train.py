"""Internals of Ray Train: controller states, worker groups, and failures.

Written for Ray 2.60.0. Relies on:

- `ControllerCallback` and `WorkerGroupCallback`, and the classes of
  `ray.train.v2._internal.execution.controller.state`;
- `WorkerGroup.get_workers()`, whose items have `metadata.node_id`, in the order of ranks;
- the chain of causes of a failure: `WorkerGroupError.worker_failures`,
  `ControllerError.controller_failure`, `WorkerHealthCheckFailedError.health_check_failure`, and
  `cause` of a `RayTaskError`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

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
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from plad_dist.compat.assumptions import Assumptions
from plad_dist.compat.ray_worker_bench import benched_nodes, dismiss_recruits, end_benched_workers
from plad_dist.compat.ray_worker_group import recruit_workers

_assumptions = Assumptions("ray", "2.60.0")
for _owner, _name, _parameters in (
    (ControllerCallback, "after_controller_start", ("self", "train_run_context")),
    (ControllerCallback, "after_controller_state_update", ("self", "previous_state", "current_state")),
    (WorkerGroupCallback, "after_worker_group_start", ("self", "worker_group")),
    (ControllerCallback, "before_controller_shutdown", ("self",)),
    (ControllerCallback, "before_controller_abort", ("self",)),
    (WorkerGroupCallback, "after_worker_group_shutdown", ("self", "worker_group_context")),
    (WorkerGroupCallback, "after_worker_group_abort", ("self", "worker_group_context")),
    (WorkerGroup, "get_workers", ("self",)),
    (RestartingState, "__init__", ("self", "training_failed_error")),
    (WorkerGroupError, "__init__", ("self", "error_message", "worker_failures")),
    (ControllerError, "__init__", ("self", "controller_failure")),
    (WorkerHealthCheckFailedError, "__init__", ("self", "message", "failure")),
    (SchedulingState, "__init__", ("self", "scaling_decision")),
):
    _assumptions.parameters(_assumptions.attribute(_owner, _name), *_parameters)
_assumptions.starts_with_parameters(ResizeDecision.__init__, "self", "num_workers")

_observers: dict[str, WorkerGroupEvents] = {}  # of this process, by key


def _observer(key: str, kind: type[WorkerGroupEvents], arguments: tuple[Any, ...]) -> WorkerGroupEvents:
    """Return the observer of this process with a key; the first call makes it."""
    if key not in _observers:
        _observers[key] = kind(*arguments)
        _observers[key]._key = key
    return _observers[key]


class WorkerGroupEvents(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Base class of observers of a worker group; it runs in the process of Ray Train's controller.

    Ray Train calls its own hooks, which this class translates into the `on_...` methods. It sends
    its callbacks and its scaling policy to the controller one by one, so an observer that both
    contain arrives several times. All these are one object there, without the state of the sender.

    Args:
        arguments: arguments of the subclass.
    """

    def __init__(self, *arguments: Any) -> None:
        self._key, self._arguments = uuid.uuid4().hex, arguments
        self._worker_group: Any = None

    def __reduce__(self) -> Any:
        return _observer, (self._key, type(self), self._arguments)

    @property
    def node_by_rank(self) -> list[str]:
        """Ids of the nodes of the running workers by rank; empty if no group runs."""
        workers = self._worker_group.get_workers() if self._worker_group is not None else []
        return [worker.metadata.node_id for worker in workers]

    @property
    def own_nodes(self) -> list[str]:
        """Ids of the nodes of all workers, including those for the next group."""
        return self.node_by_rank + benched_nodes()

    def recruit(self, nodes: Sequence[str]) -> dict[str, str]:
        """Start a worker for a next group on each node: see :func:`recruit_workers`."""
        return recruit_workers(self._worker_group, nodes)

    def dismiss_recruits(self) -> None:
        """End the workers that were started for a next group."""
        dismiss_recruits()

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

    def on_scheduling(self, workers: int) -> None:
        """Handle the decision to start a group of some size, before its workers start."""

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

    async def before_controller_shutdown(self) -> None:
        end_benched_workers()

    def before_controller_abort(self) -> None:
        end_benched_workers()

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
                self.on_scheduling(current_state.scaling_decision.num_workers)
            case InitializingState() | RestartingState() | ReschedulingState():
                self.on_waiting()


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
