"""Nurseries follow the nodes of the cluster."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import ray

from plad_dist.errors import RunFailed
from plad_dist.nursery.actor import NurseryPlan, _Keeper


class Cluster:
    """Nodes and failed actors, in place of Ray's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes: dict[str, float] = {}
        self.failed: set[str] = set()
        self.made: list[str] = []
        monkeypatch.setattr(ray, "nodes", self._nodes)
        monkeypatch.setattr(ray, "wait", lambda calls, timeout: (self.failed & set(calls), calls))
        monkeypatch.setattr(ray, "get", self._raise)
        monkeypatch.setattr(_Keeper, "_made_on", lambda keeper, node: self._make(node))

    def _nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node, "Alive": True, "Resources": {"CPU": cpus}} for node, cpus in self.nodes.items()]

    def _make(self, node: str) -> tuple[str, str]:
        self.made.append(node)
        self.failed.discard(node)
        return node, node

    def _raise(self, call: str) -> None:
        raise RunFailed(f"{call}: no folder")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def keeper(most_nodes: int = 10) -> _Keeper:
    return _Keeper(NurseryPlan("test", (), {}, lambda resources: resources.get("CPU", 0) > 0, most_nodes))


def test_every_node_that_can_train_has_a_nursery(cluster: Cluster) -> None:
    nurseries = keeper()
    cluster.nodes = {"head": 0.0, "a": 1.0}
    nurseries.follow_nodes(0.0)
    cluster.nodes["b"] = 1.0
    nurseries.follow_nodes(2.0)
    del cluster.nodes["a"]
    nurseries.follow_nodes(4.0)
    cluster.nodes["a"] = 1.0
    nurseries.follow_nodes(6.0)
    assert cluster.made == ["a", "b", "a"]


def test_a_nursery_that_fails_again_and_again_is_made_at_growing_intervals_and_reported_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    nurseries = keeper()
    cluster.nodes = {"a": 1.0}
    with caplog.at_level(logging.WARNING):
        for second in range(0, 600, 2):
            nurseries.follow_nodes(float(second))
            cluster.failed.add("a")
    assert 8 <= len(cluster.made) <= 14
    assert [record.message for record in caplog.records] == [
        "warm starts are not available on every node: a: no folder"
    ]


def test_a_large_cluster_does_not_fill_with_nurseries(cluster: Cluster) -> None:
    nurseries = keeper(most_nodes=3)
    cluster.nodes = {f"node-{number:04d}": 1.0 for number in range(1000)}
    for second in range(5):
        nurseries.follow_nodes(float(second))
    assert len(cluster.made) == 3


def test_nothing_is_made_after_the_end(cluster: Cluster) -> None:
    nurseries = keeper()
    cluster.nodes = {"a": 1.0}
    nurseries.finished.set()
    nurseries.follow_nodes(0.0)
    assert cluster.made == []
