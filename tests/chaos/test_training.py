"""Training on several nodes that are killed, frozen and cut off: the run ends, and the student is the same.

Real Ray Train and DeepSpeed on a cluster of network namespaces, an elastic group of one to two workers, a node each.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.elastic import MARKS, Training, begun_at, expect_the_same, freeze_worker, kill_worker, undisturbed_student
from tests.nodes import Cluster, Node

pytestmark = MARKS
STEPS, EVERY, NOTICE_S = 160, 10, 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return undisturbed_student(tmp_path_factory.mktemp("undisturbed"), STEPS, EVERY)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    yield found
    found.end()


BLOWS: dict[str, Callable[[Node], None]] = {
    "a worker is killed": kill_worker,
    "a worker freezes": freeze_worker,
    "a node is killed": Node.kill,
    "a node freezes": Node.freeze,
    "a node is cut off": Node.cut,
}


@pytest.mark.parametrize("blow", BLOWS)
@pytest.mark.parametrize("which", [0, 1])
def test_whatever_happens_to_a_node_the_student_is_the_same(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor], blow: str, which: int
) -> None:
    """The node of the first rank and the other one. What froze or was cut off wakes up when the others have gone on."""
    nodes = [cluster.add(), cluster.add()]
    training = Training(cluster, tmp_path / "run", STEPS, EVERY, worker_timeout_s=10)
    training.wait_for_steps(EVERY + 5)
    hit = time.time()
    BLOWS[blow](nodes[which])
    attempt = max(row["attempt"] for row in training.all_rows())
    training.wait(lambda: max(row["attempt"] for row in training.all_rows()) > attempt, "going on")
    lost = next(row for row in training.all_rows() if row["attempt"] > attempt)["step"]
    assert max(row["step"] for row in training.all_rows() if row["time"] <= hit) - (lost - 1) <= EVERY + 5
    nodes[which].mend()
    nodes[which].thaw()
    training.finish()
    expect_the_same(training, undisturbed)


def test_the_driver_is_killed_and_the_same_command_goes_on(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor]
) -> None:
    cluster.add()
    cluster.add()
    training = Training(cluster, tmp_path / "run", STEPS, EVERY)
    training.wait_for_steps(EVERY + 5)
    os.killpg(training.command.pid, signal.SIGKILL)
    training.command.wait()
    training.start(cluster)
    training.finish()
    assert "goes on from the checkpoint of step" in training.log()
    assert max(begun_at(training)) >= EVERY
    expect_the_same(training, undisturbed)


def test_a_node_that_leaves_with_notice_and_one_that_comes_cost_no_step(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor]
) -> None:
    nodes = [cluster.add(), cluster.add()]
    training = Training(cluster, tmp_path / "run", STEPS, EVERY)
    training.wait_for_steps(EVERY + 5)
    cluster.drain(nodes[0], NOTICE_S)
    told = time.time()
    time.sleep(NOTICE_S)
    nodes[0].kill()
    assert training.recover(told, 1)[1] == 0
    came = time.time()
    cluster.add()
    assert training.recover(came, 2)[1] == 0
    training.finish()
    assert "a node has left as it had announced" in training.log()
    expect_the_same(training, undisturbed)


def test_the_head_is_lost_and_the_same_command_goes_on_elsewhere(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    first = Cluster(tmp_path)
    try:
        first.add()
        first.add()
        training = Training(first, tmp_path / "run", STEPS, EVERY)
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
    assert max(begun_at(training)) >= EVERY
    expect_the_same(training, undisturbed)
