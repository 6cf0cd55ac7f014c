"""Nurseries that are killed, frozen or out of memory: training continues, and recovers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from plad_dist.compat.linux import oom_kills
from tests.elastic import EVERY, MARKS, NURSERY, TRAINING, Training, expect_same_student, kill_training
from tests.memory_faults import limit_address_space, small_group
from tests.nodes import Cluster, Node, wait

pytestmark = MARKS


@pytest.fixture
def starve(request: pytest.FixtureRequest) -> Iterator[Callable[[int], object]]:
    """Yield a function that lets a process run out of memory."""
    with small_group(request.param) as starve:
        yield starve


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def training_on_two_nodes(cluster: Cluster, folder: Path) -> tuple[Training, list[Node]]:
    """Return a training that takes steps, in children of nurseries."""
    nodes = [cluster.add(), cluster.add()]
    training = Training(cluster, folder / "run")
    training.wait_for_steps(EVERY + 5)
    assert all(is_warm(node) for node in nodes)
    return training, nodes


def is_warm(node: Node) -> bool:
    """Return True if the training process of a node is a child of the node's nursery."""
    return parent_of(node.processes(TRAINING)[0]) in node.processes(NURSERY)


def kill_and_recover(training: Training, node: Node) -> None:
    """Kill the training process of a node, and wait for the first step after that."""
    attempt = max(row["attempt"] for row in training.all_rows())
    kill_training(node)
    training.wait(lambda: max(row["attempt"] for row in training.all_rows()) > attempt, "a later attempt")


FAULTS: dict[str, Callable[[Node], None]] = {
    "it is killed": lambda node: os.kill(node.processes(NURSERY)[0], signal.SIGKILL),
    "it freezes": lambda node: os.kill(node.processes(NURSERY)[0], signal.SIGSTOP),
    "its actor is killed": lambda node: os.kill(node.processes("ray::Nursery")[0], signal.SIGKILL),
    "it has no memory": lambda node: limit_address_space(node.processes(NURSERY)[0], 0),
    "its children get too little memory": lambda node: limit_address_space(node.processes(NURSERY)[0], 100 << 20),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_recovers_from_a_death_whatever_happens_to_the_nursery(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor], fault: str
) -> None:
    training, nodes = training_on_two_nodes(cluster, tmp_path)
    before = [node.processes(NURSERY)[0] for node in nodes]
    for node in nodes:
        FAULTS[fault](node)
    time.sleep(1)
    kill_and_recover(training, nodes[1])
    if "memory" not in fault:
        wait(lambda: set(nodes[1].processes(NURSERY)) - set(before) != set(), 120, "another nursery")
    training.finish()
    if "children" in fault:
        assert "starts without nurseries" in training.log()
    expect_same_student(training, undisturbed)


@pytest.mark.parametrize("starve", [0, 20 << 20], ids=["at once", "while its child starts"], indirect=True)
def test_training_recovers_when_the_kernel_kills_a_nursery_for_lack_of_memory(
    tmp_path: Path, starve: Callable[[int], object], cluster: Cluster, undisturbed: dict[str, torch.Tensor]
) -> None:
    training, nodes = training_on_two_nodes(cluster, tmp_path)
    starve(nodes[1].processes(NURSERY)[0])
    kills = oom_kills()
    kill_and_recover(training, nodes[1])
    assert oom_kills() > kills
    wait(lambda: nodes[1].processes(NURSERY), 120, "a nursery")
    training.finish()
    expect_same_student(training, undisturbed)
