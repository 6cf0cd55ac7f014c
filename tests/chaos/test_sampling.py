"""Sampling on a cluster of several nodes while engines, a node and the driver are killed.

Real Ray nodes, real vLLM engines, real signals. After each fault the run continues on its own, or
is run again. At the end each prompt has exactly one sample, and no committed part was touched.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.conftest import plad, write_config
from tests.tiny import sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

PROMPTS = 1500


class FaultyRun:
    """A cluster of a head without CPUs and two nodes, a run directory, and a driver."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "run"
        raw = sampling_config(folder, PROMPTS, block_size=8, max_tokens=64)
        raw["sampling"]["teacher"] = {**raw["sampling"]["teacher"], "replicas": 2}
        raw["sampling"]["student"] = {**raw["sampling"]["student"], "max_tokens": 2}
        raw["sampling"] |= {"heartbeat_timeout_s": 15, "window": 1}
        raw["sampling"]["teacher"]["engine"] = {"max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 27}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add_node(), self.add_node()]
        raw["cluster"] = {"address": self.cluster.address, "start_timeout_s": 600}
        self.config = write_config(folder, raw)
        self.driver: subprocess.Popen[bytes] | None = None

    def add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=2)

    def start_driver(self) -> None:
        log = (self.folder / "driver.log").open("ab")
        command = [sys.executable, "-c", "from plad_dist.cli import main; main()", "sample", str(self.config)]
        self.driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)

    def parts(self, role: str = "teacher") -> list[Path]:
        return sorted((self.root / "samples" / role / "round-0").glob("part-*.arrow"))

    def stamps(self) -> dict[Path, tuple[bytes, int]]:
        """Return the content and modification time of every committed part."""
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in self.root.rglob("part-*.arrow")}

    def log(self) -> str:
        return (self.folder / "driver.log").read_text()

    def wait(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.driver is None or self.driver.poll() is None, self.log()[-3000:]
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.05)

    def wait_for_more(self, count: int) -> None:
        goal = len(self.parts()) + count
        self.wait(lambda: len(self.parts()) >= goal)

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the live processes whose command line contains a word."""
        processes = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or [])
            if word in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                processes.append(process)
        return processes

    def end(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyRun]:
    faulty_run = FaultyRun(tmp_path_factory.mktemp("run"))
    assert plad("prepare", str(faulty_run.config), cwd=faulty_run.folder).returncode == 0
    yield faulty_run
    faulty_run.end()
    ray.shutdown()


@pytest.fixture(scope="module")
def parts_before_faults(run: FaultyRun) -> dict[Path, tuple[bytes, int]]:
    """Cause all faults, complete the run, and return the parts committed before the last fault."""
    stamps: dict[Path, tuple[bytes, int]] = {}
    run.start_driver()
    # The engine dies while it starts, before any engine of its fleet has been up.
    run.wait(lambda: bool(run.processes("VLLM::EngineCore")))
    run.processes("VLLM::EngineCore")[0].send_signal(signal.SIGKILL)
    run.wait(lambda: run.log().count(" died (") >= 1, 120)
    run.wait(lambda: len(run.parts()) >= 4)

    stamps |= run.stamps()
    run.processes("VLLM::EngineCore")[0].send_signal(signal.SIGKILL)
    run.wait(lambda: run.log().count(" died (") >= 2, 120)
    run.wait_for_more(4)

    stamps |= run.stamps()
    # An engine that receives SIGTERM ends all its requests at once, as if they had finished.
    run.processes("VLLM::EngineCore")[0].send_signal(signal.SIGTERM)
    run.wait(lambda: run.log().count(" died (") >= 3, 120)
    run.wait_for_more(4)

    stamps |= run.stamps()
    run.cluster.remove_node(run.nodes.pop(), allow_graceful=False)
    run.nodes.append(run.add_node())
    run.wait(lambda: run.log().count(" died (") >= 4, 300)
    run.wait_for_more(4)

    stamps |= run.stamps()
    assert run.driver is not None
    os.kill(run.driver.pid, signal.SIGKILL)
    run.driver.wait()
    assert len(run.parts()) < PROMPTS // 8, "killed too late to prove anything"
    stamps |= run.stamps()

    completed = plad("sample", str(run.config), timeout=1500, cwd=run.folder)
    assert completed.returncode == 0, completed.stderr[-4000:]
    return stamps


def test_parts_committed_before_a_fault_stay_byte_identical(parts_before_faults: dict[Path, tuple[bytes, int]]) -> None:
    assert len(parts_before_faults) >= 10
    for path, stamp in parts_before_faults.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == stamp, path


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_every_prompt_has_its_sample_exactly_once(run: FaultyRun, parts_before_faults: Any, role: str) -> None:
    def read(folder: str) -> pa.Table:
        files = sorted((run.root / folder).glob("part-*.arrow"))
        return pa.concat_tables(pa.ipc.open_file(path).read_all() for path in files)

    prompts = read("prompts")["prompt_id"].to_pylist()
    samples = read(f"samples/{role}/round-0")
    assert samples["prompt_id"].to_pylist() == prompts
    assert set(samples["sample_index"].to_pylist()) == {0}
    assert samples["error"].null_count == len(prompts)
    assert set(samples["finish_reason"].to_pylist()) <= {"stop", "length"}
    max_tokens = 64 if role == "teacher" else 2
    ends = zip(samples["finish_reason"].to_pylist(), samples["num_tokens"].to_pylist(), strict=True)
    assert all(reason == "stop" or tokens == max_tokens for reason, tokens in ends), "a response was cut short"


def test_verify_passes(run: FaultyRun, parts_before_faults: Any) -> None:
    checked = plad("verify", str(run.root))
    assert checked.returncode == 0, checked.stderr
    assert "nothing is wrong" in checked.stdout


def test_the_log_reports_which_actor_died_and_why(run: FaultyRun, parts_before_faults: Any) -> None:
    reasons = re.findall(r" died \((.*)\); its blocks are leased again", run.log())
    assert len(reasons) >= 4
    assert any("did not start" in reason for reason in reasons), reasons
    assert any("died without an error message" in reason for reason in reasons), reasons
    assert any("received SIGTERM" in reason for reason in reasons), reasons
    assert any("node" in reason for reason in reasons), reasons
    assert not any(reason == "The actor died unexpectedly before finishing this task." for reason in reasons)
