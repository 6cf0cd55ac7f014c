"""A teacher behind a real vLLM server: an interrupted run resumes and pays for nothing twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import aiohttp
import pyarrow as pa
import pytest
from aiohttp import web

from plad_dist.config import Decoding, Endpoint
from plad_dist.sampling.backend import Completion
from plad_dist.sampling.endpoint.client import EndpointClient
from tests.conftest import in_this_process, plad, write_config
from tests.tiny import TEMPLATE, make_random_model, sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

PROMPTS, KEY = 160, "sk-test-0123456789abcdef"


class CountingProxy:
    """Slow proxy in front of the server that counts requests and responses by prompt."""

    def __init__(self, target: str) -> None:
        self.target, self.requests, self.responses = target, Counter[str](), Counter[str]()
        self.keys: set[str] = set()
        self.port = 0
        self._is_listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        assert self._is_listening.wait(30)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._forward)
        app.router.add_get("/v1/models", self._forward)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._is_listening.set()
        await asyncio.Event().wait()

    async def _forward(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.keys.add(request.headers.get("Authorization", ""))
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, self.target + request.path, data=body or None, headers=dict(request.headers)
            ) as reply,
        ):
            text = await reply.text()
        if request.method == "POST":
            prompt = body.decode()
            self.requests[prompt] += 1
            await asyncio.sleep(0.4)
            self.responses[prompt] += 1
        return web.Response(text=text, status=reply.status, content_type="application/json")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingProxy]:
    folder = tmp_path_factory.mktemp("server")
    model = make_random_model(folder / "model", 3)
    (folder / "chat.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "big",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32",
        "--kv-cache-memory-bytes", str(1 << 27), "--no-enable-chunked-prefill", "--max-num-batched-tokens", "16384",
        "--chat-template", str(folder / "chat.jinja"), "--api-key", KEY,
    ]  # fmt: skip
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while "Application startup complete" not in log.read_text(errors="replace"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield CountingProxy(f"http://127.0.0.1:{port}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_an_interrupted_run_resumes_and_pays_for_no_response_twice(
    proxy: CountingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plad_here = partial(in_this_process, monkeypatch, capsys)
    raw = sampling_config(tmp_path, PROMPTS, block_size=16, max_tokens=12)
    endpoint = {
        "url": f"http://127.0.0.1:{proxy.port}/v1", "model": "big", "api_key_env": "TEACHER_KEY", "concurrency": 4,
        "input_price": 1000.0, "output_price": 1000.0, "max_spend": 1.0,
    }  # fmt: skip
    raw["teacher"] = {"endpoint": endpoint}
    raw["sampling"]["student"]["max_tokens"] = 4
    config = write_config(tmp_path, raw)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    environment = dict(os.environ)
    parts = tmp_path / "run/samples/teacher/round-0"

    # The cap stops the stage. The message names the key to raise, and the responses are kept.
    assert plad_here("sample", str(config))[0] == 2, "there are no prompts yet"
    assert plad_here("prepare", str(config))[0] == 0
    capped = plad("sample", str(config), env=environment, timeout=600)
    assert capped.returncode == 1, capped.stderr[-3000:]
    assert "raise endpoint.max_spend" in capped.stderr
    assert 4 < proxy.responses.total() < PROMPTS

    # Ctrl-C interrupts the stage midway.
    raw["teacher"]["endpoint"]["max_spend"] = 1000.0
    config = write_config(tmp_path, raw)
    process = subprocess.Popen(
        [sys.executable, "-c", "from plad_dist.cli import main; main()", "sample", str(config)],
        env=environment,
        stderr=(tmp_path / "log").open("wb"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 400
    while len(list(parts.glob("part-*.arrow"))) < 4:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    assert not (parts / "manifest.json").exists(), "the interruption came too late"
    committed = {path: path.read_bytes() for path in parts.glob("part-*.arrow")}

    resumed = plad("sample", str(config), env=environment, timeout=600)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert all(path.read_bytes() == data for path, data in committed.items())
    samples = pa.concat_tables(pa.ipc.open_file(path).read_all() for path in sorted(parts.glob("part-*.arrow")))
    prompts = pa.concat_tables(
        pa.ipc.open_file(path).read_all() for path in sorted((tmp_path / "run/prompts").glob("part-*.arrow"))
    )
    assert samples["prompt_id"].to_pylist() == prompts["prompt_id"].to_pylist()
    assert set(samples["model"].to_pylist()) == {"big"}
    assert samples["error"].null_count == len(samples)

    repeated = {prompt: count for prompt, count in proxy.requests.items() if count > 1}
    assert not repeated, "responses in flight at the cap and at the interruption are awaited and kept"

    assert proxy.keys == {f"Bearer {KEY}"}
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in capped.stderr + resumed.stderr + (tmp_path / "log").read_text()
    assert plad_here("verify", str(tmp_path / "run"))[0] == 0
    manifest = json.loads((parts / "manifest.json").read_text())
    cost = sum(part["counts"]["cost_micros"] for part in manifest["parts"])
    tokens = sum(part["counts"]["tokens"] + part["counts"]["prompt_tokens"] for part in manifest["parts"])
    assert cost >= tokens * 1000
    assert "cost" in plad_here("status", str(tmp_path / "run"))[1]


def test_a_missing_key_is_reported_before_any_request_is_sent(
    proxy: CountingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plad_here = partial(in_this_process, monkeypatch, capsys)
    raw = sampling_config(tmp_path, PROMPTS)
    raw["teacher"] = {
        "endpoint": {"url": f"http://127.0.0.1:{proxy.port}/v1", "model": "big", "api_key_env": "NO_SUCH_KEY"}
    }
    config = write_config(tmp_path, raw)
    assert plad_here("prepare", str(config))[0] == 0
    requests = proxy.requests.total()
    code, _, stderr = plad_here("sample", str(config))
    assert code == 2, stderr
    assert "NO_SUCH_KEY" in stderr
    assert "Traceback" not in stderr
    assert proxy.requests.total() == requests


def test_a_real_server_returns_all_responses_of_one_request(
    proxy: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    prices = {"input_price": 1000.0, "output_price": 1000.0}
    keys = {"url": f"http://127.0.0.1:{proxy.port}/v1", "model": "big", "api_key_env": "TEACHER_KEY"} | prices
    requests = proxy.requests.total()

    async def draw(stream: bool) -> list[str]:
        client = EndpointClient(Endpoint(**keys, stream=stream))
        prompt = [{"role": "user", "content": "larger of 3 and 4"}]
        try:
            outcomes, _ = await client.complete_many(prompt, Decoding(max_tokens=12), [7, 8, 9])
        finally:
            await client.close()
        completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
        assert len(completions) == 3
        assert client.usage_missing == 0
        tokens = sum(completion.num_tokens + completion.prompt_tokens for completion in completions)
        assert sum(completion.cost for completion in completions) == pytest.approx(tokens / 1000)
        return [completion.text for completion in completions]

    streamed, whole = asyncio.run(draw(stream=True)), asyncio.run(draw(stream=False))
    assert streamed == whole, "a stream has the same responses"
    assert len(set(streamed)) == 3, "one seed gives different responses"
    assert proxy.requests.total() == requests + 2
