"""An elastic group on a cluster of namespaces: from two workers to one and to two again, in one run and with one command."""

from __future__ import annotations

import re
from pathlib import Path

from tests.elastic import MARKS, PHASE, Training, expect_the_same, freeze_worker, thaw_worker, undisturbed_student
from tests.nodes import Cluster

pytestmark = MARKS
STEPS, EVERY = 120, 10


def test_sizes_go_down_when_a_node_dies_and_up_when_one_comes(tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = undisturbed_student(tmp_path / "undisturbed", STEPS, EVERY)
    cluster = Cluster(tmp_path)
    try:
        nodes = [cluster.add(), cluster.add()]
        training = Training(cluster, tmp_path / "run", STEPS, EVERY, worker_timeout_s=600)
        training.wait((training.run.root / "checkpoints" / PHASE / "latest.json").exists, "a checkpoint")
        nodes[1].kill()
        training.wait(lambda: training.sizes()[-1:] == [1], "one worker")
        freeze_worker(nodes[0])  # a node takes as long to come and to be seen as it likes: there are steps left for it
        cluster.add()
        training.wait(lambda: "has room for 2 workers now" in training.log(), "the new node to be seen")
        thaw_worker(nodes[0])
        training.finish()
    finally:
        cluster.end()
    assert training.sizes() == [2, 1, 2]
    for told in (
        r"worker \d died: .*node",
        "goes on with 1 workers",
        "has room for 2 workers now",
        "goes on with 2 workers",
    ):
        assert re.search(told, training.log()), training.log()
    expect_the_same(training, undisturbed)
