"""Groups on a cluster of namespaces: two workers, one, and two again; and two with a spare node."""

from __future__ import annotations

import re
from pathlib import Path

from tests.elastic import (
    EVERY,
    MARKS,
    NURSERY,
    PHASE,
    WORKER,
    Training,
    expect_same_student,
    freeze_worker,
    thaw_worker,
    undisturbed_student,
)
from tests.nodes import Cluster

pytestmark = MARKS


def test_a_group_shrinks_when_a_node_dies_and_grows_when_one_joins(tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = undisturbed_student(tmp_path / "undisturbed")
    cluster = Cluster(tmp_path)
    try:
        nodes = [cluster.add(), cluster.add()]
        training = Training(cluster, tmp_path / "run", worker_timeout_s=600)
        training.wait((training.run.root / "checkpoints" / PHASE / "latest.json").exists, "a checkpoint")
        worker = nodes[0].processes(WORKER)
        nodes[1].kill()
        training.wait(lambda: training.sizes()[-1:] == [1], "one worker")
        training.wait_for_steps(3)  # the worker has passed on the first one
        freeze_worker(nodes[0])  # so that steps remain, however long the new node takes
        cluster.add()
        training.wait(lambda: "has room for 2 workers" in training.log(), "the new node to be noticed")
        thaw_worker(nodes[0])
        training.wait(lambda: training.sizes()[-1:] == [2], "two workers")
        assert nodes[0].processes(WORKER) == worker, "a worker of Ray outlives its groups"
        training.finish()
    finally:
        cluster.end()
    assert training.sizes() == [2, 1, 2]
    for line in (
        r"worker \d died: .*node",
        "resumes with 1 workers",
        "has room for 2 workers; the new ones start beside the present ones",
        "resumes with 2 workers",
    ):
        assert re.search(line, training.log()), training.log()
    expect_same_student(training, undisturbed)


def test_a_group_of_one_size_replaces_a_dead_node_by_a_warm_spare(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        nodes = [cluster.add(), cluster.add(), cluster.add()]
        training = Training(cluster, tmp_path / "run", 60, num_workers=2)
        training.wait_for_steps(EVERY + 5)
        spare = next(node for node in nodes if not node.processes(WORKER))
        assert spare.processes(NURSERY), "it has imported what a worker needs"
        killed, survivor = (node for node in nodes if node is not spare)
        worker = survivor.processes(WORKER)
        killed.kill(quietly=False)
        training.wait_for_steps(EVERY)
        assert survivor.processes(WORKER) == worker
        training.finish()
    finally:
        cluster.end()
    assert training.sizes() == [2]
    assert re.search(r"worker \d died: ", training.log())
    assert "resumes with 2 workers" in training.log()
    assert [row["step"] for row in training.rows()] == list(range(1, 61))
