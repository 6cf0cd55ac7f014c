"""What the driver knows and says of a worker group: which worker died first, what is waited for, that it is about to be resized."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
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
from ray.train.v2.api.exceptions import PreemptionError

from plad_dist.errors import RunFailed, UserError

_SAY_EVERY_S = 30.0
_DEATHS = (RayActorError, WorkerHealthCheckTimeoutError)
_SILENCE = (ActorUnavailableError, WorkerHealthCheckTimeoutError)
_SUSPECT_S = 30.0


class ProgressMailbox:
    """An actor beside the driver: takes messages of the workers and the controller, and asks the workers to yield."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._group = self._asked = self._yielded = 0
        self._steps = False

    def post(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self._steps |= message["kind"] == "step"

    def drain(self) -> list[dict[str, Any]]:
        messages, self._messages = self._messages, []
        return messages

    def new_group(self) -> None:
        """Another group of workers is about to be started."""
        self._group += 1
        self._asked, self._steps = 0, False

    def takes_steps(self) -> bool:
        """Whether the present group has taken its first step."""
        return self._steps

    def ask_to_yield(self) -> None:
        self._asked = self._group

    def wants_yield(self) -> int:
        """Number of the group that is asked to yield, 0 for none."""
        return self._asked

    def yielded(self, group: int) -> None:
        self._yielded = group

    def has_yielded(self) -> bool:
        return self._yielded == self._group


class WorkerGroupCallbacks(ControllerCallback, WorkerGroupCallback):
    """Runs in Ray Train's controller: says what happens to the worker group, and lets it write a checkpoint before it is resized.

    Args:
        what: is trained, for messages.
        fewest, most: workers of the group.
        patience: seconds that a group of one size waits for its resources; elastic ones wait for ever.
    """

    def __init__(self, mailbox: Any, what: str, fewest: int, most: int, patience: float) -> None:
        self._mailbox, self._what, self._fewest, self._most, self._patience = mailbox, what, fewest, most, patience
        self._group: Any = None
        # Nodes that do not answer, which Ray has not found dead yet, and since when.
        self._suspects: dict[str, float] = {}
        self._waits_since = self._said = time.monotonic()
        self._starts_anew = self._asked = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller's process, before it decides anything."""
        self._waits_since = self._said = time.monotonic()
        count_what_is_free(self._staying, self._workers_on)
        let_them_save(self._takes_steps, self._ask_to_yield, self._have_yielded)

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group, self._asked = worker_group, False

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._group = None

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._group = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called after every turn of the controller, whether the state is another or not."""
        match current_state:
            case RunningState():
                if self._starts_anew and self._group is not None:
                    self._say(f"goes on with {len(self._group)} workers")
                self._starts_anew = False
                self._waits_since = self._said = time.monotonic()
            case RestartingState() if not isinstance(previous_state, RestartingState):
                self._starts_anew, self._waits_since = True, time.monotonic()
                self._suspect(current_state.training_failed_error)
                self._say(f"{first_death(current_state.training_failed_error)}; the workers are started anew")
            case ResizingState():
                self._starts_anew = True
            case SchedulingState():
                self._call(self._mailbox.new_group.remote())
            case InitializingState() | RestartingState() | ReschedulingState():
                self._say_what_is_waited_for()

    def _ask_to_yield(self, size: int) -> None:
        """Ask the workers to commit a checkpoint and to stand still."""
        self._asked = True
        self._say(f"the cluster has room for {size} workers now; a checkpoint first")
        self._call(self._mailbox.ask_to_yield.remote())

    def _have_yielded(self) -> bool | None:
        """Whether the workers stand still; None where they were not asked to."""
        return bool(self._call(self._mailbox.has_yielded.remote())) if self._asked else None

    def _suspect(self, error: Any) -> None:
        """Take note of nodes whose workers cannot be reached: to count with them costs a start that cannot succeed."""
        workers = self._group.get_workers() if self._group is not None else []
        for rank, failure in (getattr(error, "worker_failures", None) or {}).items():
            if isinstance(innermost(failure), _SILENCE) and rank < len(workers):
                self._suspects[workers[rank].metadata.node_id] = time.monotonic()

    def _staying(self) -> dict[str, dict[str, float]]:
        """What is free on nodes that answer and stay."""
        recent = {node for node, since in self._suspects.items() if time.monotonic() - since < _SUSPECT_S}
        return {node: free for node, free in free_resources().items() if node not in recent}

    def _workers_on(self, nodes: set[str]) -> int:
        workers = self._group.get_workers() if self._group is not None else []
        return sum(worker.metadata.node_id in nodes for worker in workers)

    def _takes_steps(self) -> bool:
        return bool(self._call(self._mailbox.takes_steps.remote()))

    def _say_what_is_waited_for(self) -> None:
        """Raises :class:`RunFailed` where a group of one size has waited too long."""
        now = time.monotonic()
        waited = now - self._waits_since
        size = f"{self._fewest} workers" if self._fewest == self._most else f"{self._fewest} to {self._most} workers"
        there = ray.cluster_resources()
        told = f"room for {size}; the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs in all"
        if self._fewest == self._most and waited > self._patience:
            raise RunFailed(
                f"waited {waited:.0f} s (cluster.start_timeout_s) for {told}. Add nodes, or set fewer workers"
            )
        if now - self._said >= _SAY_EVERY_S:
            self._said = now
            self._say(f"waits for {told}; since {waited:.0f} s")

    def _say(self, text: str) -> None:
        self._mailbox.post.remote({"phase": self._what, "kind": "say", "text": text})

    def _call(self, answer: Any) -> Any:
        """What the mailbox says; None where it says nothing, for training does not depend on it."""
        try:
            return ray.get(answer, timeout=10)
        except ray.exceptions.RayError:
            return None


def count_what_is_free(staying: Callable[[], dict[str, dict[str, float]]], held: Callable[[set[str]], int]) -> None:
    """Let Ray Train's elastic policy, in this process, count what is really free, or held by its own workers.

    By itself it counts all that the nodes have, also what other jobs hold and what nodes have that are about to leave; so it ends
    a healthy group for a size that cannot be started, and after a death tries sizes that are not there any more.

    Args:
        staying: what is free on every node that may be counted with.
        held: how many workers the group has on some nodes, which ends before the next one begins.
    """
    count = ElasticScalingPolicy._count_possible_workers

    def possible(self: Any, reserved_resources: Any) -> int:
        wanted = self.scaling_config._resources_per_worker_not_none
        free = staying()
        room = sum(_room(resources, wanted) for resources in free.values())
        return min(count(self, reserved_resources), room + held(set(free)))

    ElasticScalingPolicy._count_possible_workers = possible


def let_them_save(
    takes_steps: Callable[[], bool], ask: Callable[[int], None], yielded: Callable[[], bool | None]
) -> None:
    """Let Ray Train's elastic policy, in this process, resize a group only when that has committed a checkpoint and stands still.

    By itself it ends a group at once, with all steps since its latest checkpoint. The controller goes on in between, so that a
    group which ends or dies first is seen as ever. A group is not resized either before it has taken a step, or nodes that come one by
    one would never let it.

    Args:
        takes_steps: whether the running group does.
        ask: asks it to yield, for a group of another size.
        yielded: whether it has; None where it was not asked.
    """
    decide = ElasticScalingPolicy.make_decision_for_running_worker_group

    def decision(self: Any, worker_group_state: Any, worker_group_status: Any) -> Any:
        stands_still = yielded()
        if stands_still:
            reserved = self._get_reserved_resources()
            size = self._count_possible_workers(reserved) if reserved is not None else 0
            # It has to be started anew in any case, as it was where the room is gone again.
            return self._get_resize_decision(
                size if size >= self.scaling_config.min_workers else worker_group_state.num_workers
            )
        if stands_still is None:
            found = decide(self, worker_group_state, worker_group_status)
            if not isinstance(found, NoopDecision) and takes_steps():
                ask(found.num_workers)
        return NoopDecision()

    ElasticScalingPolicy.make_decision_for_running_worker_group = decision


def free_resources() -> dict[str, dict[str, float]]:
    """What is free on every node that is alive and stays."""
    leaving = set(ray._private.state.state.get_draining_nodes() or {})
    staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return {node: free.get(node, {}) for node in staying}


def _room(free: dict[str, float], wanted: dict[str, float]) -> int:
    """How many workers fit."""
    return int(min((free.get(name, 0.0) // amount for name, amount in wanted.items() if amount > 0), default=0))


def first_death(error: Any) -> str:
    """The cause of a failed worker group, in words: a worker that died rather than those whose connections broke with it."""
    if isinstance(error, PreemptionError):
        return "a node has left as it had announced"
    failures = {rank: innermost(failure) for rank, failure in (getattr(error, "worker_failures", None) or {}).items()}
    if not failures:
        return f"the workers could not be started: {_last_line(innermost(error))}"
    deaths = {rank: cause for rank, cause in failures.items() if isinstance(cause, _DEATHS)}
    rank, cause = min((deaths or failures).items(), key=lambda item: item[0])
    if isinstance(cause, RayActorError):
        return f"worker {rank} died: {_death(cause)}"
    if isinstance(cause, WorkerHealthCheckTimeoutError):
        return f"worker {rank} does not answer (training.worker_timeout_s)"
    return f"worker {rank} failed: {_last_line(cause)}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:400] if lines else ''}"


def _death(error: RayActorError) -> str:
    """How an actor died and where, without Ray's explanations of what such deaths may be caused by."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ip:", "pid:")) or "node" in line or "died" in line]
    return "; ".join(told[:4] or lines[:1])[:400]


def innermost(error: BaseException) -> BaseException:
    """The exception that began it; what the user did is not looked behind."""
    while not isinstance(error, (UserError, RunFailed)):
        named = (getattr(error, name, None) for name in ("health_check_failure", "controller_failure", "cause"))
        inner = next((found for found in named if isinstance(found, BaseException)), None) or error.__cause__
        if inner is None:
            break
        error = inner
    return error
