"""Worker groups of Ray Train whose Ray workers outlive them.

Ray Train restarts a group by killing all of its workers and starting new ones. Each is a new Python
process, whose imports alone take seconds. Here, workers that still respond wait on the bench of
`ray_worker_bench` for the next group, and only those that it lacks are started. Recruits for a
larger group start while the present one runs.

:func:`keep_workers` makes Ray Train's controller use such groups. All of this runs in the
controller's process, except :func:`group_id` and `_end_training`, which run in a worker.

Written for Ray 2.60.0. Relies on:

- `TrainController.worker_group_cls`, the class whose `create` makes a group, after the controller
  has called `shutdown` of the group before;
- `WorkerGroup.shutdown`, which calls `shutdown` of its `_worker_group_state` and then clears it;
- `WorkerGroup._start_impl`, which calls `_create_placement_group`, waits for the handle that this
  returns, calls `_create_workers`, and calls the handle's `shutdown` if any of it fails;
- `RayTrainWorker.init_train_context`, which may be called again once the training function has
  ended. It replaces the context, with its `training_thread_runner` and `synchronization_actor`, but
  not the process's pool for uploads, which only `ray.train.report` uses;
- the label `ray.io/node-id` of each node;
- `WorkerGroup.get_latest_poll_status`, whose statuses hold the error of each rank.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from plad_dist.compat.assumptions import Assumptions
from plad_dist.compat.ray_scaling import node_resources
from plad_dist.compat.ray_worker_bench import (
    PATIENCE_S,
    Member,
    Recruit,
    Reservation,
    bench,
    on_staying_nodes,
    true_in_time,
)

_RECRUIT_TIMEOUT_S = 120.0
_NODE_LABEL = "ray.io/node-id"

_assumptions = Assumptions("ray", "2.60.0")
for _owner, _name, _parameters in (
    (WorkerGroup, "shutdown", ("self",)),
    (WorkerGroup, "_create_placement_group", ("self", "scaling_config", "worker_group_context")),
    (WorkerGroup, "_get_worker_runtime_env", ("custom_runtime_env",)),
    (WorkerGroup, "get_latest_poll_status", ("self",)),
    (WorkerGroupState, "shutdown", ("self",)),
):
    _assumptions.parameters(_assumptions.attribute(_owner, _name), *_parameters)
_assumptions.parameters(bundle_to_remote_args, "bundle")
_assumptions.starts_with_parameters(
    WorkerGroup._create_workers, "self", "num_workers", "placement_group", "resources_per_worker"
)
_assumptions.starts_with_parameters(WorkerGroup._assign_worker_ranks, "workers")
_assumptions.attribute(TrainController, "worker_group_cls")


def keep_workers(name: str, ask_to_end: Callable[[], None]) -> None:
    """Let the controller of this process make groups whose workers outlive them.

    What a dead controller has left of groups with this name is removed.

    Args:
        name: differs between trainers, but not between controllers of one.
        ask_to_end: see :class:`Bench`.
    """
    bench.ask_to_end = ask_to_end
    bench.take_over(f"{name}-")
    TrainController.worker_group_cls = LastingWorkerGroup


def group_id() -> str:
    """Return an id of the group of this worker, which no other group has."""
    return str(get_train_context().execution_context.synchronization_actor._actor_id.hex())


def recruit_workers(group: LastingWorkerGroup, nodes: Sequence[str]) -> dict[str, str]:
    """Start workers for a larger group beside the present one.

    Args:
        nodes: node of each worker, besides those that start or have started already.

    Returns:
        Why a worker did not start, by node. Nothing has to be ended there.
    """
    bench.end_leaving()
    bench.recruits += group._recruits([(group._reserve(1, node), 0, node) for node in nodes])
    references = [recruit.facts for recruit in bench.recruits]
    done = set(ray.wait(references, num_returns=len(references), timeout=0)[0]) if references else set()
    problems: dict[Recruit, str] = {}
    for recruit in bench.recruits:
        if recruit.facts in done:
            try:
                bench.members.append(group._member(recruit, ray.get(recruit.facts)))
            except ray.exceptions.RayError as error:
                problems[recruit] = str(error)
        elif time.monotonic() - recruit.began > _RECRUIT_TIMEOUT_S:
            problems[recruit] = f"it has not started for {_RECRUIT_TIMEOUT_S:.0f} s"
    bench.dismiss(list(problems))
    bench.recruits = [recruit for recruit in bench.recruits if recruit.facts not in done]
    return {recruit.node: problem for recruit, problem in problems.items()}


def _end_training(ask_to_end: Callable[[], None]) -> bool:
    """Run in a worker: end its training function. Return False if that does not end in time."""
    runner = get_train_context().execution_context.training_thread_runner
    until = time.monotonic() + PATIENCE_S
    while runner.is_running() and time.monotonic() < until:
        ask_to_end()
        time.sleep(0.02)
    return not runner.is_running()


@dataclass(frozen=True)
class _LastingState(WorkerGroupState):  # type: ignore[misc]
    """State of a group whose workers go to the bench when it ends.

    Attributes:
        unreachable: ranks of workers that did not respond.
    """

    unreachable: frozenset[int] = frozenset()

    def shutdown(self) -> None:
        ray.kill(self.sync_actor)  # frees workers that wait for others there
        for worker in self.workers:
            worker.actor.shutdown.remote()  # tells Ray's callbacks
        reservation: Reservation = self.placement_group_handle
        staying = on_staying_nodes(reservation.members)
        leaving = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - node_resources().keys()
        if any(member.resources.bundle_count > 1 and member.node in leaving for member in reservation.members):
            staying = []  # Ray would leave the bundle on the node
        replies = {
            member.worker.execute_async(_end_training, bench.ask_to_end): member
            for member in staying
            if member.worker.distributed_context.world_rank not in self.unreachable
        }
        reservation.pass_on([replies[reply] for reply in true_in_time(replies)])


class _Starts(NamedTuple):
    """Result of the start of recruits.

    Attributes:
        started: those that have started.
        lost: those that have died, mostly with their nodes.
    """

    started: list[Member]
    lost: list[Recruit]


class LastingWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Worker group that takes its workers from the bench, and leaves them there.

    A group of one size has one placement group: it gets all of its resources or none, and Ray
    places the part of a lost node again. An elastic group has one for each worker, so that it gives
    up what a lost worker had.
    """

    _reservation: Reservation
    _worker_group_state: Any

    def shutdown(self) -> None:
        self._assert_active()
        state, status = self._worker_group_state, self._latest_poll_status
        unreachable = frozenset(rank for rank, error in (status.errors if status else {}).items() if _is_silence(error))
        self._worker_group_state = _LastingState(
            state.start_time, state.placement_group_handle, state.workers, state.sync_actor, unreachable
        )
        super().shutdown()

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Reservation:
        bench.dismiss(bench.recruits)
        if bench.reservation is not None:  # of a group that failed while it started
            bench.reservation.end()
        workers, is_elastic = worker_group_context.num_workers, scaling_config.elasticity_enabled
        kept = bench.take(workers)
        missing = workers - sum(group.bundle_count for group in {member.resources for member in kept})
        sizes = [1] * missing if is_elastic else [missing] * (missing > 0)
        new: list[PlacementGroup] = []
        try:
            new += [self._reserve(size) for size in sizes]
        finally:
            self._reservation = bench.reservation = Reservation(kept, new, workers, is_elastic=is_elastic)
        return self._reservation

    def _reserve(self, workers: int, node: str = "") -> PlacementGroup:
        """Return a placement group for some workers.

        Args:
            node: the only node that may hold it; empty for any.
        """
        context = self._worker_group_context
        labels = [dict(label) for label in context.label_selector[:workers]] if context.label_selector else None
        if node:
            labels = [label | {_NODE_LABEL: node} for label in labels or [{}] * workers]
        return placement_group(
            [context.resources_per_worker] * workers,
            strategy=context.placement_strategy,
            name=f"{bench.name}{uuid.uuid4().hex}",
            bundle_label_selector=labels,
        )

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **_: Any
    ) -> list[Worker]:
        reservation = self._reservation
        until = time.monotonic() + _RECRUIT_TIMEOUT_S
        recruits = self._recruits((group, bundle, "") for group, bundle in reservation.free)
        try:
            started, lost = self._first_starts(recruits, until)
            if lost:  # their nodes have just died, so Ray now looks for other places
                reservation.wait(max(0.0, until - time.monotonic()))
                others = self._recruits((recruit.resources, recruit.bundle, "") for recruit in lost)
                recruits += others
                started += [self._started(recruit, until) for recruit in others]
        except ray.exceptions.RayError as error:
            for recruit in recruits:
                ray.kill(recruit.actor)
            raise WorkerGroupStartupFailedError(f"a worker did not start: {error}") from error
        reservation.members = [*reservation.kept, *started]
        return list(self._assign_worker_ranks([member.worker for member in reservation.members]))

    def _first_starts(self, recruits: Iterable[Recruit], until: float) -> _Starts:
        """Wait for recruits. Raise RayError if one is late or cannot start, but not if one dies."""
        started, lost = list[Member](), list[Recruit]()
        for recruit in recruits:
            try:
                started.append(self._started(recruit, until))
            except ray.exceptions.RayActorError:
                lost.append(recruit)
        return _Starts(started, lost)

    def _started(self, recruit: Recruit, until: float) -> Member:
        """Wait for a recruit. Raise RayError if it is late, cannot start or dies."""
        return self._member(recruit, ray.get(recruit.facts, timeout=max(0.0, until - time.monotonic())))

    def _recruits(self, places: Iterable[tuple[PlacementGroup, int, str]]) -> list[Recruit]:
        """Start a worker in each bundle of a placement group, on a node."""
        runtime_env = self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)
        resources = bundle_to_remote_args(self._worker_group_context.resources_per_worker)
        actor_class = ray.remote(runtime_env=runtime_env, **resources)(self._worker_cls)
        recruits = []
        for group, bundle, node in places:
            actor = actor_class.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle)).remote()
            facts = actor.get_metadata.remote()
            recruits.append(Recruit(actor, facts, group, bundle, node, time.monotonic()))
        return recruits

    def _member(self, recruit: Recruit, facts: Any) -> Member:
        """Return a recruit that has started as a member."""
        resources = self._worker_group_context.resources_per_worker
        worker = Worker(recruit.actor, facts, resources, placement_group_bundle_index=recruit.bundle)
        return Member(worker, recruit.resources)


def _is_silence(error: Any) -> bool:
    return isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
