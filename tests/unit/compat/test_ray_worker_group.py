"""Workers between two groups: who stays, what is reserved, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckTimeoutError

from plad_dist.compat import ray_worker_bench, ray_worker_group
from plad_dist.compat.ray_worker_bench import Bench, Member, Recruit, Reservation
from plad_dist.compat.ray_worker_group import LastingWorkerGroup


class Reserved:
    """Placement group."""

    def __init__(self, cluster: Cluster, bundle_count: int) -> None:
        self._cluster, self.bundle_count = cluster, bundle_count

    def wait(self, seconds: float) -> bool:
        if self not in self._cluster.reserved:
            raise ValueError("the placement group does not exist")
        return self._cluster.has_room


class Cluster:
    """Nodes, workers and placement groups, in place of Ray's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = {"a", "b", "c"}
        self.leaving: set[str] = set()
        self.silent: set[str] = set()  # actors
        self.broken: dict[str, RayError] = {}  # actors
        self.starts: list[tuple[Any, int]] = []  # placement group and bundle of each recruit
        self.killed: list[str] = []
        self.reserved: list[Reserved] = []
        self.has_room = True
        self.bench = Bench()
        for module in (ray_worker_bench, ray_worker_group):
            monkeypatch.setattr(module, "bench", self.bench)
            monkeypatch.setattr(module, "node_resources", lambda: dict.fromkeys(self.nodes - self.leaving))
        monkeypatch.setattr(ray_worker_bench, "remove_placement_group", self.reserved.remove)
        monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": node, "Alive": True} for node in self.nodes])
        monkeypatch.setattr(ray, "kill", self.killed.append)
        monkeypatch.setattr(ray, "wait", lambda calls, **_: ([call for call in calls if call not in self.silent], []))
        monkeypatch.setattr(ray, "get", self._get)

    def reserve(self, bundles: int) -> Any:
        self.reserved.append(Reserved(self, bundles))
        return self.reserved[-1]

    def group(self, *groups: tuple[Any, list[str]], is_elastic: bool) -> LastingWorkerGroup:
        """Return a running group with a worker on each node, by placement group."""
        members: list[Member] = []
        for resources, nodes in groups:
            for bundle, node in enumerate(nodes):
                members.append(Member(self._worker(node, len(members), bundle), resources))
        reservation = Reservation([], [group for group, _ in groups], len(members), is_elastic=is_elastic)
        reservation.members = members
        self.bench.reservation = reservation
        group = object.__new__(LastingWorkerGroup)
        group._callbacks, group._world_rank_to_ongoing_poll = [], {}
        group._worker_group_context, group._latest_poll_status = None, None
        workers = [member.worker for member in members]
        group._worker_group_state = SimpleNamespace(
            start_time=0.0, placement_group_handle=reservation, workers=workers, sync_actor="sync"
        )
        return group

    def starting_group(self, workers: int) -> LastingWorkerGroup:
        """Return an elastic group whose workers are recruits, and are about to start."""
        group = object.__new__(LastingWorkerGroup)
        group._worker_group_context = SimpleNamespace(resources_per_worker={})
        group._reservation = Reservation([], [self.reserve(1) for _ in range(workers)], workers, is_elastic=True)
        group._recruits, group._assign_worker_ranks = self._recruits, list  # type: ignore[method-assign]
        return group

    def _recruits(self, places: Iterable[tuple[Any, int, str]]) -> list[Recruit]:
        recruits = []
        for resources, bundle, node in places:
            name = f"recruit {len(self.starts)}"
            self.starts.append((resources, bundle))
            recruits.append(Recruit(name, name, resources, bundle, node, 0.0))
        return recruits

    def _get(self, call: str, timeout: float | None = None) -> bool:
        if call in self.broken:
            raise self.broken[call]
        return True

    def _worker(self, node: str, rank: int, bundle: int) -> Any:
        actor = SimpleNamespace(
            shutdown=SimpleNamespace(remote=lambda: None), get_metadata=SimpleNamespace(remote=lambda: f"worker {node}")
        )
        return SimpleNamespace(
            actor=_Named(f"worker {node}", actor),
            metadata=SimpleNamespace(node_id=node),
            distributed_context=SimpleNamespace(world_rank=rank),
            placement_group_bundle_index=bundle,
            execute_async=lambda *_: f"worker {node}",
        )


class _Named(str):
    """Handle of an actor that equals its name."""

    def __new__(cls, name: str, methods: Any) -> _Named:
        handle = super().__new__(cls, name)
        handle.__dict__.update(vars(methods))
        return handle


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def benched(cluster: Cluster) -> list[str]:
    return [member.node for member in cluster.bench.members]


def test_workers_that_respond_on_nodes_that_stay_join_the_next_group(cluster: Cluster) -> None:
    groups = {node: cluster.reserve(1) for node in "abc"}
    group = cluster.group(*((groups[node], [node]) for node in "abc"), is_elastic=True)
    cluster.silent, cluster.leaving = {"worker b"}, {"c"}
    group.shutdown()
    assert benched(cluster) == ["a"]
    assert cluster.killed == ["sync", "worker b", "worker c"]
    assert cluster.reserved == [groups["a"]], "what the others had is free"


def test_a_worker_that_has_missed_its_health_checks_is_not_waited_for(cluster: Cluster) -> None:
    group = cluster.group((cluster.reserve(1), ["a"]), (cluster.reserve(1), ["b"]), is_elastic=True)
    group._latest_poll_status = SimpleNamespace(errors={1: WorkerHealthCheckTimeoutError("late")})
    group.shutdown()
    assert benched(cluster) == ["a"]


def test_a_group_of_one_size_starts_the_lost_worker_in_the_bundle_that_ray_moves(cluster: Cluster) -> None:
    resources = cluster.reserve(3)
    cluster.group((resources, ["a", "b", "c"]), is_elastic=False).shutdown()
    cluster.nodes.remove("b")
    kept = cluster.bench.take(3)
    reservation = Reservation(kept, [], 3, is_elastic=False)
    assert ([member.node for member in kept], reservation.free) == (["a", "c"], [(resources, 1)])
    assert cluster.reserved == [resources]


def test_a_group_of_one_size_leaves_a_node_that_leaves(cluster: Cluster) -> None:
    """Ray would leave its bundle there until the node has gone."""
    group = cluster.group((cluster.reserve(2), ["a", "b"]), is_elastic=False)
    cluster.leaving = {"b"}
    group.shutdown()
    assert (benched(cluster), cluster.reserved) == ([], [])


def test_a_larger_bench_than_the_next_group_gives_back_the_rest(cluster: Cluster) -> None:
    cluster.group(*((cluster.reserve(1), [node]) for node in "abc"), is_elastic=True).shutdown()
    assert len(cluster.bench.take(2)) == 2
    assert (benched(cluster), len(cluster.reserved), cluster.killed[-1]) == ([], 2, "worker c")


@pytest.mark.parametrize(("is_elastic", "kept"), [(True, ["a"]), (False, [])])
def test_a_start_without_room_keeps_only_an_elastic_group_s_workers(
    cluster: Cluster, is_elastic: bool, kept: list[str]
) -> None:
    """Another job may wait for what a group of one size would hold."""
    cluster.group((cluster.reserve(1), ["a"]), is_elastic=is_elastic).shutdown()
    reservation = Reservation(cluster.bench.take(2), [cluster.reserve(1)], 2, is_elastic=is_elastic)
    cluster.bench.reservation, cluster.has_room = reservation, False
    assert not reservation.wait(0)
    reservation.shutdown()
    assert (benched(cluster), len(cluster.reserved)) == (kept, len(kept))
    assert cluster.bench.reservation is None


def test_a_removed_placement_group_is_not_an_error_of_the_controller(cluster: Cluster) -> None:
    reservation = Reservation([], [cluster.reserve(1)], 1, is_elastic=True)
    cluster.reserved.clear()
    assert not reservation.wait(0)


def test_nothing_is_left_at_the_end(cluster: Cluster) -> None:
    cluster.group(*((cluster.reserve(1), [node]) for node in "ab"), is_elastic=True).shutdown()
    cluster.bench.reservation = Reservation([], [cluster.reserve(2)], 2, is_elastic=False)  # its start failed
    ray_worker_bench.end_benched_workers()
    assert (benched(cluster), cluster.reserved, cluster.bench.reservation) == ([], [], None)
    assert cluster.killed == ["sync", "worker a", "worker b"]


def test_a_worker_that_dies_while_it_starts_is_replaced_once_in_its_bundle(cluster: Cluster) -> None:
    """Its node has probably died, and Ray moves the bundle to another one."""
    group = cluster.starting_group(3)
    cluster.broken["recruit 1"] = RayActorError()
    workers = group._create_workers(3, None, {})
    assert [worker.actor for worker in workers] == ["recruit 0", "recruit 2", "recruit 3"]
    assert [member.resources for member in group._reservation.members] == [
        cluster.reserved[number] for number in (0, 2, 1)
    ]
    assert cluster.starts[3:] == [(cluster.reserved[1], 0)]
    assert cluster.killed == []


@pytest.mark.parametrize(
    "broken",
    [
        {"recruit 1": GetTimeoutError("late")},
        {"recruit 0": RayActorError(), "recruit 1": RayActorError(), "recruit 4": RayActorError()},
    ],
    ids=["it is late", "it dies twice"],
)
def test_a_group_whose_worker_cannot_start_ends_the_others(cluster: Cluster, broken: dict[str, RayError]) -> None:
    group = cluster.starting_group(3)
    cluster.broken = broken
    with pytest.raises(WorkerGroupStartupFailedError, match="a worker did not start: "):
        group._create_workers(3, None, {})
    recruits = {f"recruit {number}" for number in range(len(cluster.starts))}
    assert recruits - broken.keys() <= set(cluster.killed)
    assert group._reservation.members == []
