"""Checks of a cluster: unique node names, and versions and clocks like the driver's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config import Endpoint
from plad_dist.doctor.checks import examine_node
from plad_dist.doctor.cluster import ClockReading, check_clock, compare_versions, members_by_id, unanswered
from plad_dist.doctor.node import HERE, Node
from tests.unit.doctor.findings import site_at


def test_nodes_with_other_versions_fail_by_name() -> None:
    here = {"ray": "2.60.0", "torch": "2.13.0"}
    nodes = {"a": here, "b": here | {"torch": "2.12.0"}, "c": {"ray": "2.60.0", "vllm": "1"}}
    same, different, incomplete = compare_versions(here, nodes)
    assert (same.state, same.node) == ("ok", "a")
    assert (different.state, different.node, different.text) == ("fail", "b", "torch 2.12.0 (2.13.0 here)")
    assert (incomplete.state, incomplete.text) == ("fail", "torch is missing (2.13.0 here), vllm 1 (missing here)")


@pytest.mark.parametrize(
    ("skew", "state"), [(0.2, "ok"), (-0.9, "ok"), (2.0, "warn"), (-29.0, "warn"), (31.0, "fail"), (-3600.0, "fail")]
)
def test_a_skewed_clock_is_found_by_the_shortest_round_trip(skew: float, state: str) -> None:
    # The first answer took four seconds to start, which tells nothing about the clock.
    readings = [ClockReading(100.0, 104.0 + skew, 104.0), ClockReading(110.0, 110.05 + skew, 110.1)]
    finding = check_clock("node-3", readings)
    assert (finding.state, finding.node) == (state, "node-3")
    if state != "ok":
        assert f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'}" in finding.text


def test_a_slow_answer_alone_is_no_skewed_clock() -> None:
    assert check_clock("node-3", [ClockReading(100.0, 105.0, 105.0)]).state == "ok"


@pytest.mark.parametrize(
    "error", [None, RuntimeError("its raylet died"), ModuleNotFoundError("No module named 'plad_dist'")]
)
def test_a_node_that_does_not_answer_fails_by_name(error: Exception | None) -> None:
    finding = unanswered("node-3", error)
    assert (finding.state, finding.node) == ("fail", "node-3")
    assert (str(error) if error else "no answer within") in finding.text
    assert finding.remedy


def test_every_node_has_a_unique_name() -> None:
    def ray_node(number: int, host: str, address: str) -> dict[str, Any]:
        return {
            "NodeID": f"{number}" * 12, "NodeManagerHostname": host, "NodeManagerAddress": address,
            "Resources": {"GPU": 8.0}, "ObjectStoreSocketName": "/data/ray/session_1/sockets/plasma_store",
        }  # fmt: skip

    addresses = [("a", "10.0.0.1"), ("b", "10.0.0.2"), ("b", "10.0.0.3"), ("b", "10.0.0.3")]
    living = [ray_node(number, host, address) for number, (host, address) in enumerate(addresses, start=1)]
    members = list(members_by_id(living, Node(HERE)).values())
    assert [node.name for node in members] == ["a", "10.0.0.2", "10.0.0.3 (333333)", "10.0.0.3 (444444)"]
    assert {(node.role, node.gpus, node.ray_folder) for node in members} == {("member", 8.0, "/data/ray")}


def test_the_task_of_a_node_and_its_argument_can_be_pickled(tmp_path: Path) -> None:
    endpoint = Endpoint(url="http://host/v1", model="m", api_key_env="PLAD_TEST_KEY")
    node = Node("n", "member", (site_at(tmp_path),), (("teacher.endpoint", endpoint),))
    function, argument = pickle.loads(pickle.dumps((examine_node, node)))
    assert argument == node
    assert function is examine_node
