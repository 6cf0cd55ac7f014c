"""`plad doctor` over a real Ray cluster of two nodes, one of which stops answering."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from plad_dist.config_file import parse_config
from plad_dist.doctor import examine as doctor
from plad_dist.doctor import node_checks
from tests.tiny import sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as own:  # so that other clusters of this machine keep their `auto`
        small = {"num_cpus": 1, "object_store_memory": 100 << 20, "temp_dir": own}
        made = Cluster(initialize_head=True, head_node_args={**small, "gcs_server_port": 0, "include_dashboard": False})
        made.add_node(**small)
        yield made
        made.shutdown()


def test_every_node_is_asked_compared_and_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_checks, "torch_facts", lambda: {"cuda": None, "devices": 0, "nccl": None})
    config = parse_config(sampling_config(tmp_path, 20), "test")
    found = doctor.examine(config, cluster.address)
    assert [finding for finding in found if finding.state == "fail"] == []
    members = {finding.node for finding in found} - {doctor.HERE, cluster.address}
    assert len(members) == 2
    for check in (*doctor.NODE_CHECKS, "same versions", "clock"):
        if check not in ("network", "endpoints", "environment"):
            assert members <= {finding.node for finding in found if finding.check == check}, check
    told = [finding for finding in found if finding.check == "storage" and finding.node in members]
    assert all("shared with the driver" in finding.found for finding in told)
    assert "2 nodes" in {finding.node for finding in doctor.folded(found)}
    assert not (tmp_path / "run").exists()


def test_a_node_that_is_frozen_fails_by_name_and_the_others_are_checked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (frozen,) = cluster.worker_nodes
    raylet = frozen.all_processes["raylet"][0].process.pid
    monkeypatch.setattr(doctor, "NODE_TIMEOUT_S", 60.0)
    os.kill(raylet, signal.SIGSTOP)
    try:
        found = doctor.examine(None, cluster.address)
    finally:
        os.kill(raylet, signal.SIGCONT)
    (failed,) = [finding for finding in found if finding.state == "fail"]
    assert (failed.check, frozen.node_id[:6] in failed.node) == ("cluster", True), failed
    assert failed.remedy
    assert [finding.node for finding in found if finding.check == "same versions"] != [failed.node]
    assert any(finding.check == "clock" and finding.state == "ok" for finding in found)
