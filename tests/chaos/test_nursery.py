"""Nurseries that are killed or frozen: training goes on, and recovers without them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.elastic import EVERY, MARKS, NURSERY, TRAINING, Training, expect_same_student, kill_training
from tests.nodes import Cluster, Node, wait

pytestmark = MARKS


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_warm(node: Node) -> bool:
    """Return True if the training process of a node is a child of the node's nursery."""
    return parent_of(node.processes(TRAINING)[0]) in node.processes(NURSERY)


@pytest.mark.parametrize(("name", "number"), [(NURSERY, "SIGKILL"), (NURSERY, "SIGSTOP"), ("ray::Nursery", "SIGKILL")])
def test_training_recovers_from_a_death_whatever_happens_to_the_nursery(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, torch.Tensor], name: str, number: str
) -> None:
    nodes = [cluster.add(), cluster.add()]
    training = Training(cluster, tmp_path / "run")
    training.wait_for_steps(EVERY + 5)
    assert all(is_warm(node) for node in nodes)
    before = [node.processes(NURSERY)[0] for node in nodes]
    attempt = max(row["attempt"] for row in training.all_rows())
    for node in nodes:
        os.kill(node.processes(name)[0], getattr(signal, number))
    time.sleep(1)
    kill_training(nodes[1])
    training.wait(lambda: max(row["attempt"] for row in training.all_rows()) > attempt, "a later attempt")
    if number == "SIGKILL":
        wait(lambda: set(nodes[1].processes(NURSERY)) - set(before) != set(), 120, "another nursery")
    training.finish()
    expect_same_student(training, undisturbed)
