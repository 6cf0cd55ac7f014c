"""Training on nodes that are killed, frozen and cut off, with an unchanged student.

Real Ray Train and DeepSpeed on a cluster of network namespaces: an elastic group of one to two
workers, one per node.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.elastic import (
    EVERY,
    MARKS,
    WORKER,
    Training,
    expect_same_student,
    freeze_training,
    freeze_worker,
    kill_training,
    kill_worker,
    resumed_steps,
)
from tests.nodes import Cluster, Node

pytestmark = MARKS
NOTICE_S = 20

FAULTS: dict[str, Callable[[Node], None]] = {
    "a worker is killed": kill_worker,
    "a worker freezes": freeze_worker,
    "a training process is killed": kill_training,
    "a training process freezes": freeze_training,
    "a node is killed": Node.kill,
    "a node freezes": Node.freeze,
    "a node is cut off": Node.cut,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("node", [0, 1])
def test_the_student_is_the_same_after_any_fault_of_a_node(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor], fault: str, node: int
) -> None:
    """On the node of the first rank and on the other one.

    A frozen or isolated node returns after training has resumed.
    """
    nodes = [cluster.add(), cluster.add()]
    training = Training(cluster, tmp_path / "run", worker_timeout_s=10)
    training.wait_for_steps(EVERY + 5)
    fault_at = time.time()
    workers = [each.processes(WORKER) for each in nodes]
    FAULTS[fault](nodes[node])
    attempt = max(row["attempt"] for row in training.all_rows())
    training.wait(lambda: max(row["attempt"] for row in training.all_rows()) > attempt, "a later attempt")
    first_repeated = next(row for row in training.all_rows() if row["attempt"] > attempt)["step"]
    last_before = max(row["step"] for row in training.all_rows() if row["time"] <= fault_at)
    assert last_before - (first_repeated - 1) <= EVERY + 5
    assert nodes[1 - node].processes(WORKER) == workers[1 - node], "the other worker of Ray stays"
    if "training process" in fault:
        assert nodes[node].processes(WORKER) == workers[node], "this one too"
    nodes[node].mend()
    nodes[node].thaw()
    training.finish()
    expect_same_student(training, undisturbed)


def test_the_same_command_resumes_after_the_driver_is_killed(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor]
) -> None:
    cluster.add()
    cluster.add()
    training = Training(cluster, tmp_path / "run")
    training.wait_for_steps(EVERY + 5)
    os.killpg(training.command.pid, signal.SIGKILL)
    training.command.wait()
    training.start(cluster)
    training.finish()
    assert "resumes from the checkpoint of step" in training.log()
    assert max(resumed_steps(training)) >= EVERY
    expect_same_student(training, undisturbed)


def test_a_node_that_leaves_as_announced_and_a_new_node_cost_no_step(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor]
) -> None:
    nodes = [cluster.add(), cluster.add()]
    training = Training(cluster, tmp_path / "run")
    training.wait_for_steps(EVERY + 5)
    cluster.drain(nodes[0], NOTICE_S)
    announced_at = time.time()
    time.sleep(NOTICE_S)
    nodes[0].kill()
    assert training.recover(announced_at, 1).lost_steps == 0
    joined_at = time.time()
    cluster.add()
    assert training.recover(joined_at, 2).lost_steps == 0
    training.finish()
    assert "a node has left as announced" in training.log()
    expect_same_student(training, undisturbed)


def test_the_same_command_resumes_on_another_cluster_after_the_head_is_lost(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    first = Cluster(tmp_path)
    try:
        first.add()
        first.add()
        training = Training(first, tmp_path / "run")
        training.wait_for_steps(EVERY + 5)
        first.head.kill()
        training.command.kill()
        training.command.wait()
    finally:
        first.end()
    second = Cluster(tmp_path)
    try:
        second.add()
        training.start(second)
        training.finish()
    finally:
        second.end()
    assert max(resumed_steps(training)) >= EVERY
    expect_same_student(training, undisturbed)
