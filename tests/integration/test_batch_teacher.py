"""A teacher behind a provider's batch interface: a killed run collects the batches it submitted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.conftest import plad, write_config
from tests.fake_batches import BatchProvider, providing
from tests.tiny import sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

PROMPTS = 100
SAMPLE_TEACHER = """
import sys
import ray
from plad_dist.config_file import load_config
from plad_dist.progress import Progress
from plad_dist.rundir import open_run
from plad_dist.sampling.stage import sample
ray.init(address="local", num_cpus=2, include_dashboard=False)
config = load_config(sys.argv[1])
sample(config, open_run(config), Progress(), roles=("teacher",))
"""  # without the student, whose engine takes minutes to start


def provide(provider: BatchProvider) -> None:
    """Run a provider in a thread, and return once it listens."""
    is_listening = threading.Event()

    async def serve() -> None:
        async with providing(provider):
            is_listening.set()
            await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert is_listening.wait(30)


def test_a_killed_run_collects_its_batches_and_submits_nothing_twice(tmp_path: Path) -> None:
    provider = BatchProvider()
    provider.polls = 10**9  # no batch ends before the kill
    provide(provider)
    raw = sampling_config(tmp_path, PROMPTS)
    raw["teacher"] = {
        "endpoint": {
            "url": provider.url, "model": "big", "mode": "batch", "input_price": 1.0, "output_price": 1.0,
            "max_spend": 1.0,
        }
    }  # fmt: skip
    raw["sampling"]["teacher"] = {"max_tokens": 12, "n": 2}
    config = write_config(tmp_path, raw)
    assert plad("prepare", str(config)).returncode == 0

    log = tmp_path / "log"
    command = [sys.executable, "-c", SAMPLE_TEACHER, str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + 400
    while not provider.batches:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    provider.polls = 2
    provider._looks.clear()
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    dataset = tmp_path / "run/samples/teacher/round-0"
    samples, prompts = rows(dataset), rows(tmp_path / "run/prompts")
    text_of = {prompt["prompt_id"]: prompt["messages"][-1]["content"] for prompt in prompts}
    assert [sample["prompt_id"] for sample in samples] == [prompt_id for prompt_id in text_of for _ in range(2)]
    assert all(sample["text"] == text_of[sample["prompt_id"]] for sample in samples)
    assert {text: provider.answered[text] for text in text_of.values()} == dict.fromkeys(text_of.values(), 2)
    counts = [part["counts"] for part in json.loads((dataset / "manifest.json").read_text())["parts"]]
    assert sum(count["cost_micros"] for count in counts) == 15 * len(samples)
    assert sum(provider.submitted_lines) == provider.answered.total(), "every submitted request was collected"
    assert not (dataset / "spool").exists()


def rows(dataset: Path) -> list[dict[str, Any]]:
    parts = sorted(dataset.glob("part-*.arrow"))
    return list(pa.concat_tables(pa.ipc.open_file(path).read_all() for path in parts).to_pylist())
