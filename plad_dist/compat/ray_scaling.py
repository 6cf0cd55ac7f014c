"""Scaling policy for Ray Train: its elastic policy, with sizes that the cluster has and that pay.

Written for Ray 2.60.0. Relies on:

- the methods of `ElasticScalingPolicy` that the subclass overrides or calls;
- `ScalingConfig._resources_per_worker_not_none` and `elasticity_enabled`;
- `DataParallelTrainer`, which has no public name, and its `_initialize_and_run_controller`, which
  takes the arguments of `TrainController` and is the only place to pass another policy;
- its `_register_sigint_handler`, which waits for `TrainController.abort` without limit, although a
  controller that waits for resources never gets to it;
- the actor behind `_autoscaling_coordinator`, whose `get_reserved_resources` looks at the cluster
  again with `recompute=True`, and otherwise every 20 s;
- `ray._private.state`: `state.get_draining_nodes()` and `available_resources_per_node()`.

Ray's policy counts all that the nodes have, including the resources of other jobs and of leaving
nodes, and restarts a healthy group for every other count, without a checkpoint.

Decisions are made by `_get_resize_decision`, so that fields which a later Ray adds are set.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import ray
from ray._private import state as ray_state
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy, NoopDecision
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from plad_dist.compat.assumptions import Assumptions

Resources: TypeAlias = Mapping[str, float]

_PAUSE_S = 0.2
_RECOMPUTE_EVERY_S = 1.0  # as often as Ray's policy asks for the resources
_ABORT_TIMEOUT_S = 10.0

_assumptions = Assumptions("ray", "2.60.0")
for _owner, _name, _parameters in (
    (ElasticScalingPolicy, "_count_possible_workers", ("self", "reserved_resources")),
    (
        ElasticScalingPolicy,
        "make_decision_for_running_worker_group",
        ("self", "worker_group_state", "worker_group_status"),
    ),
    (ElasticScalingPolicy, "make_decision_for_non_running_worker_group", ("self",)),
    (ElasticScalingPolicy, "_get_reserved_resources", ("self",)),
    (ElasticScalingPolicy, "_maybe_send_resource_request", ("self",)),
    (DataParallelTrainer, "_initialize_and_run_controller", ("self", "controller_init_kwargs")),
    (DataParallelTrainer, "_register_sigint_handler", ("self", "controller")),
    (_AutoscalingCoordinatorActor, "get_reserved_resources", ("self", "requester_id", "recompute")),
    (type(ray_state.state), "get_draining_nodes", ("self",)),
    (ray_state, "available_resources_per_node", ()),
):
    _assumptions.parameters(_assumptions.attribute(_owner, _name), *_parameters)
_assumptions.starts_with_parameters(ElasticScalingPolicy._get_resize_decision, "self", "num_workers")
_assumptions.starts_with_parameters(
    TrainController.__init__, "self", "train_fn_ref", "train_run_context", "scaling_policy"
)
for _name in ("_resources_per_worker_not_none", "elasticity_enabled"):
    _assumptions.attribute(ScalingConfig, _name)


class GroupSizes(Protocol):
    """Sizes of a worker group that are possible and that pay."""

    def room(self, per_worker: Resources) -> int:
        """Return how many workers could start now if the group's own ended."""

    def next_size(self, size: int, per_worker: Resources, granted: Callable[[], int]) -> int | None:
        """Return the size to restart the running group at now, or None to let it run.

        Args:
            granted: returns how many workers Ray would start, by what the nodes have in total.
        """


class GroupScalingPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Elastic policy that starts and restarts a group only at sizes that `sizes` allows."""

    def __init__(self, scaling_config: ScalingConfig, sizes: GroupSizes) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes
        self._recomputed_at = -_RECOMPUTE_EVERY_S

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        granted = int(super()._count_possible_workers(reserved_resources))
        return min(granted, self._sizes.room(self.scaling_config._resources_per_worker_not_none))

    def _get_reserved_resources(self) -> Any:
        now = time.monotonic()
        if now - self._recomputed_at >= _RECOMPUTE_EVERY_S:
            self._recomputed_at = now
            self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        return super()._get_reserved_resources()

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_PAUSE_S)  # Ray's controller asks again at once, and would keep a core busy
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()
        per_worker = self.scaling_config._resources_per_worker_not_none
        size = self._sizes.next_size(worker_group_state.num_workers, per_worker, self._granted)
        return NoopDecision() if size is None else self._get_resize_decision(size)

    def _granted(self) -> int:
        """Return how many workers Ray would start; 0 if its coordinator does not respond."""
        reserved = self._get_reserved_resources()
        return 0 if reserved is None else int(super()._count_possible_workers(reserved))


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer with the scaling policy above.

    A group of one size keeps Ray's `FixedScalingPolicy`, which restarts it at that size wherever
    the cluster has room.
    """

    def __init__(self, train_loop_per_worker: Any, *, sizes: GroupSizes, **options: Any) -> None:
        super().__init__(train_loop_per_worker, **options)
        self._sizes = sizes

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Any:
        elastic = self.scaling_config.elasticity_enabled
        policy = (
            GroupScalingPolicy(self.scaling_config, self._sizes) if elastic else FixedScalingPolicy(self.scaling_config)
        )
        return super()._initialize_and_run_controller(**controller_init_kwargs | {"scaling_policy": policy})

    def _register_sigint_handler(self, controller: Any) -> None:
        """Let SIGINT end the group and this process, also while the controller waits for nodes."""

        def abort(*_: Any) -> None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=_ABORT_TIMEOUT_S)
            ray.kill(controller)
            sys.exit(0)

        signal.signal(signal.SIGINT, abort)


class NodeResources(NamedTuple):
    """Resources of a node: all that it has, and those that are free."""

    total: Resources
    free: Resources


def node_resources() -> dict[str, NodeResources]:
    """Return the resources of every node that is alive and not about to leave, by node id."""
    leaving = set(ray_state.state.get_draining_nodes() or {})
    free: dict[str, dict[str, float]] = ray_state.available_resources_per_node()
    return {
        node["NodeID"]: NodeResources(node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    }


def workers_that_fit(resources: Resources, per_worker: Resources) -> int:
    """Return how many workers fit into some resources of a node."""
    return int(
        min((resources.get(name, 0.0) // amount for name, amount in per_worker.items() if amount > 0), default=0)
    )
