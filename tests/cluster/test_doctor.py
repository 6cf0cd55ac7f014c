"""`plad doctor` on a real Ray cluster of two nodes, one of which stops answering."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from plad_dist.config_file import parse_config
from plad_dist.doctor import cluster as doctor_cluster
from plad_dist.doctor import machine_checks
from plad_dist.doctor.checks import NODE_CHECKS
from plad_dist.doctor.examine import examine
from plad_dist.doctor.node import HERE
from plad_dist.doctor.report import merge_nodes
from tests.tiny import sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as folder:  # so that `auto` still means another cluster of this machine
        node = {"num_cpus": 1, "object_store_memory": 100 << 20, "temp_dir": folder}
        head = {**node, "gcs_server_port": 0, "include_dashboard": False}
        started = Cluster(initialize_head=True, head_node_args=head)
        started.add_node(**node)
        yield started
        started.shutdown()


def test_every_node_is_checked_compared_and_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "torch_facts", lambda: {"cuda": None, "devices": 0, "nccl": None})
    config = parse_config(sampling_config(tmp_path, 20), "test")
    findings = examine(config, cluster.address)
    assert [finding for finding in findings if finding.state == "fail"] == []
    members = {finding.node for finding in findings} - {HERE, cluster.address}
    assert len(members) == 2
    for check in (*NODE_CHECKS, "same versions", "clock"):
        if check not in ("network", "endpoints", "environment"):
            assert members <= {finding.node for finding in findings if finding.check == check}, check
    storage = [finding for finding in findings if finding.check == "storage" and finding.node in members]
    assert all("shared with the driver" in finding.text for finding in storage)
    assert "2 nodes" in {finding.node for finding in merge_nodes(findings)}
    assert not (tmp_path / "run").exists()


def test_a_frozen_node_fails_by_name_and_the_other_nodes_are_checked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (frozen,) = cluster.worker_nodes
    raylet = frozen.all_processes["raylet"][0].process.pid
    monkeypatch.setattr(doctor_cluster, "NODE_TIMEOUT_S", 60.0)
    os.kill(raylet, signal.SIGSTOP)
    try:
        findings = examine(None, cluster.address)
    finally:
        os.kill(raylet, signal.SIGCONT)
    (failure,) = [finding for finding in findings if finding.state == "fail"]
    assert (failure.check, frozen.node_id[:6] in failure.node) == ("cluster", True), failure
    assert failure.remedy
    assert [finding.node for finding in findings if finding.check == "same versions"] != [failure.node]
    assert any(finding.check == "clock" and finding.state == "ok" for finding in findings)
