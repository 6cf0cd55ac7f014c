"""Teachers behind stand-ins of providers: a model that thinks at length, and batches."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import web

from tests.conftest import plad, write_config
from tests.fake_batches import BatchProvider, providing
from tests.fake_endpoint import FakeServer, error, good, serving, streamed
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


def in_thread(server: AbstractAsyncContextManager[Any]) -> None:
    """Run a server in a thread, and return once it listens."""
    is_listening = threading.Event()

    async def serve() -> None:
        async with server:
            is_listening.set()
            await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert is_listening.wait(30)


def sample_teacher(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SAMPLE_TEACHER, str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_a_server_that_refuses_the_key_ends_the_stage_with_one_message(tmp_path: Path) -> None:
    opened: list[FakeServer] = []

    @asynccontextmanager
    async def server() -> AsyncIterator[None]:
        async with serving(lambda prompt, count: error(401, "bad key")) as fake:
            opened.append(fake)
            yield

    in_thread(server())
    raw = sampling_config(tmp_path, PROMPTS) | {"teacher": {"endpoint": {"url": opened[0].url, "model": "m"}}}
    config = write_config(tmp_path, raw)
    assert plad("prepare", str(config)).returncode == 0
    refused = plad("sample", str(config))
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert refused.stderr.count("bad key") == 1
    assert "Traceback" not in refused.stderr


def test_the_cap_holds_to_one_request_of_a_teacher_that_thinks_beyond_max_tokens(tmp_path: Path) -> None:
    bill: list[float] = []

    def respond(prompt: str, count: int) -> Any:
        thought = 100 + len(bill) * 37 % 400
        usage = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24 + thought}
        details = {"completion_tokens_details": {"reasoning_tokens": thought}}
        cached = {"prompt_tokens_details": {"cached_tokens": 16}}
        bill.append((4 * 1000 + 16 * 100 + (4 + thought) * 1000) / 1e6)
        body = good(f"It is {prompt}.", usage=usage | details | cached, reasoning_content="hm " * thought)
        return streamed(body) if len(bill) % 2 else body

    respond_slowly = lambda prompt, count: _delayed(respond, prompt, count)  # noqa: E731
    opened: list[FakeServer] = []

    @asynccontextmanager
    async def server() -> AsyncIterator[None]:
        async with serving(respond_slowly) as fake:
            opened.append(fake)
            yield

    in_thread(server())
    raw = sampling_config(tmp_path, PROMPTS)
    endpoint = {
        "url": opened[0].url, "model": "thinker", "input_price": 1000.0, "cached_input_price": 100.0,
        "output_price": 1000.0, "max_spend": 15.0, "concurrency": 16,
    }  # fmt: skip
    raw["teacher"] = {"endpoint": endpoint}
    raw["sampling"]["teacher"] = {"max_tokens": 12}
    config = write_config(tmp_path, raw)
    assert plad("prepare", str(config)).returncode == 0
    capped = sample_teacher(config)
    assert capped.returncode == 1, capped.stderr[-3000:]
    assert "raise endpoint.max_spend" in capped.stderr
    assert 15.0 - 3 * max(bill) < sum(bill) <= 15.0 + max(bill)

    raw["teacher"]["endpoint"]["max_spend"] = 1000.0
    resumed = sample_teacher(write_config(tmp_path, raw))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    samples = rows(tmp_path / "run/samples/teacher/round-0")
    assert all(sample["text"].startswith("It is ") for sample in samples)
    assert all(set(sample["reasoning"].split()) == {"hm"} for sample in samples)
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "run").rglob("manifest.json")]
    parts = [part for manifest in manifests for part in manifest["parts"] if "cost_micros" in part["counts"]]
    assert opened[0].requests.total() == sum(part["rows"] for part in parts), "nothing is asked twice"
    spent = sum(part["counts"]["cost_micros"] for part in parts)
    assert spent == pytest.approx(sum(bill) * 1e6, abs=len(bill)), "the bill is the server's"


def _delayed(respond: Callable[[str, int], Any], prompt: str, count: int) -> Callable[[web.Request], Any]:
    body = respond(prompt, count)

    async def send(request: web.Request) -> Any:
        await asyncio.sleep(0.05)
        return await body(request) if callable(body) else body

    return send


def test_a_killed_run_collects_its_batches_and_submits_nothing_twice(tmp_path: Path) -> None:
    provider = BatchProvider()
    provider.polls = 10**9  # no batch ends before the kill
    in_thread(providing(provider))
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
    resumed = sample_teacher(config)
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
