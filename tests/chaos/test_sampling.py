"""A night of sampling on a cluster of several nodes: engines, a node and the driver are killed.

Real Ray nodes, real vLLM engines, real signals. After each blow the run goes on by itself or is run again; in the morning
there is one sample where one was asked for, and what had been committed was not touched.
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


class Night:
    """A cluster of a head without work and two nodes, a run directory, and the driver at work."""

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
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or [])
            if word in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def end(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    found = Night(tmp_path_factory.mktemp("night"))
    assert plad("prepare", str(found.config), cwd=found.folder).returncode == 0
    yield found
    found.end()
    ray.shutdown()


@pytest.fixture(scope="module")
def morning(night: Night) -> dict[Path, tuple[bytes, int]]:
    """Everything that was committed at any of the blows; when it is there, the run is finished."""
    kept: dict[Path, tuple[bytes, int]] = {}
    night.start_driver()
    # While it starts, and no engine of its kind has ever been up.
    night.wait(lambda: bool(night.processes("VLLM::EngineCore")))
    night.processes("VLLM::EngineCore")[0].send_signal(signal.SIGKILL)
    night.wait(lambda: night.log().count(" died (") >= 1, 120)
    night.wait(lambda: len(night.parts()) >= 4)

    kept |= night.stamps()
    night.processes("VLLM::EngineCore")[0].send_signal(signal.SIGKILL)
    night.wait(lambda: night.log().count(" died (") >= 2, 120)
    night.wait_for_more(4)

    kept |= night.stamps()
    # An engine that is told to end ends all its requests at once, as if they were done.
    night.processes("VLLM::EngineCore")[0].send_signal(signal.SIGTERM)
    night.wait(lambda: night.log().count(" died (") >= 3, 120)
    night.wait_for_more(4)

    kept |= night.stamps()
    night.cluster.remove_node(night.nodes.pop(), allow_graceful=False)
    night.nodes.append(night.add_node())
    night.wait(lambda: night.log().count(" died (") >= 4, 300)
    night.wait_for_more(4)

    kept |= night.stamps()
    assert night.driver is not None
    os.kill(night.driver.pid, signal.SIGKILL)
    night.driver.wait()
    assert len(night.parts()) < PROMPTS // 8, "killed too late to prove anything"
    kept |= night.stamps()

    done = plad("sample", str(night.config), timeout=1500, cwd=night.folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return kept


def test_what_was_committed_before_a_kill_is_byte_identical(morning: dict[Path, tuple[bytes, int]]) -> None:
    assert len(morning) >= 10
    for path, stamp in morning.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == stamp, path


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_every_prompt_has_its_sample_exactly_once(night: Night, morning: Any, role: str) -> None:
    def read(folder: str) -> pa.Table:
        files = sorted((night.root / folder).glob("part-*.arrow"))
        return pa.concat_tables(pa.ipc.open_file(path).read_all() for path in files)

    prompts = read("prompts")["prompt_id"].to_pylist()
    samples = read(f"samples/{role}/round-0")
    assert samples["prompt_id"].to_pylist() == prompts
    assert set(samples["sample_index"].to_pylist()) == {0}
    assert samples["error"].null_count == len(prompts)
    assert set(samples["finish_reason"].to_pylist()) <= {"stop", "length"}
    whole = [64 if role == "teacher" else 2] * len(prompts)
    cut = zip(samples["finish_reason"].to_pylist(), samples["num_tokens"].to_pylist(), whole, strict=True)
    assert all(reason == "stop" or tokens == most for reason, tokens, most in cut), "a response was cut short"


def test_verify_passes(night: Night, morning: Any) -> None:
    checked = plad("verify", str(night.root))
    assert checked.returncode == 0, checked.stderr
    assert "nothing is wrong" in checked.stdout


def test_the_log_says_who_died_and_why(night: Night, morning: Any) -> None:
    reasons = re.findall(r" died \((.*)\); its blocks are leased again", night.log())
    assert len(reasons) >= 4
    assert any("did not start" in reason for reason in reasons), reasons
    assert any("died without an error message" in reason for reason in reasons), reasons
    assert any("received SIGTERM" in reason for reason in reasons), reasons
    assert any("node" in reason for reason in reasons), reasons
    assert not any(reason == "The actor died unexpectedly before finishing this task." for reason in reasons)
