"""A teacher behind a real `vllm serve`, interrupted by Ctrl-C and resumed: nothing that was answered is asked again."""

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

from tests.conftest import in_this_process, plad, write_config
from tests.tiny import TEMPLATE, make_random_model, sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

PROMPTS, KEY = 160, "sk-test-0123456789abcdef"


class CountingProxy:
    """Stands before the server and remembers which requests it got and which it answered; it takes its time."""

    def __init__(self, target: str) -> None:
        self.target, self.asked, self.answered = target, Counter[str](), Counter[str]()
        self.keys: set[str] = set()
        self.port = 0
        self._up = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        assert self._up.wait(30)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._forward)
        app.router.add_get("/v1/models", self._forward)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._up.set()
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
            self.asked[prompt] += 1
            await asyncio.sleep(0.4)
            self.answered[prompt] += 1
        return web.Response(text=text, status=reply.status, content_type="application/json")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingProxy]:
    folder = tmp_path_factory.mktemp("server")
    model = make_random_model(folder / "model", 3)
    (folder / "chat.jinja").write_text(TEMPLATE)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
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


def test_an_interrupted_run_goes_on_and_pays_for_nothing_twice(
    proxy: CountingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = partial(in_this_process, monkeypatch, capsys)
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

    # The cap stops the stage; it says what to raise, and what is answered is kept.
    assert here("sample", str(config))[0] == 2, "the prompts are not there yet"
    assert here("prepare", str(config))[0] == 0
    capped = plad("sample", str(config), env=environment, timeout=600)
    assert capped.returncode == 1, capped.stderr[-3000:]
    assert "raise endpoint.max_spend" in capped.stderr
    spent = proxy.answered.total()
    assert 4 < spent < PROMPTS

    # Ctrl-C in the middle.
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
    assert not (parts / "manifest.json").exists(), "interrupted too late to prove anything"
    kept = {path: path.read_bytes() for path in parts.glob("part-*.arrow")}

    done = plad("sample", str(config), env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(path.read_bytes() == data for path, data in kept.items())
    samples = pa.concat_tables(pa.ipc.open_file(path).read_all() for path in sorted(parts.glob("part-*.arrow")))
    prompts = pa.concat_tables(
        pa.ipc.open_file(path).read_all() for path in sorted((tmp_path / "run/prompts").glob("part-*.arrow"))
    )
    assert samples["prompt_id"].to_pylist() == prompts["prompt_id"].to_pylist()
    assert set(samples["model"].to_pylist()) == {"big"}
    assert samples["error"].null_count == len(samples)

    again = {prompt: count for prompt, count in proxy.asked.items() if count > 1}
    assert not again, "answers under way at the cap and at the interruption are waited for and kept"

    assert proxy.keys == {f"Bearer {KEY}"}
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in capped.stderr + done.stderr + (tmp_path / "log").read_text()
    assert here("verify", str(tmp_path / "run"))[0] == 0
    manifest = json.loads((parts / "manifest.json").read_text())
    cost = sum(part["counts"]["cost_micros"] for part in manifest["parts"])
    tokens = sum(part["counts"]["tokens"] + part["counts"]["prompt_tokens"] for part in manifest["parts"])
    assert cost >= tokens * 1000
    assert "cost" in here("status", str(tmp_path / "run"))[1]


def test_without_its_key_the_stage_is_refused_before_anything_is_asked(
    proxy: CountingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = partial(in_this_process, monkeypatch, capsys)
    raw = sampling_config(tmp_path, PROMPTS)
    raw["teacher"] = {
        "endpoint": {"url": f"http://127.0.0.1:{proxy.port}/v1", "model": "big", "api_key_env": "NO_SUCH_KEY"}
    }
    config = write_config(tmp_path, raw)
    assert here("prepare", str(config))[0] == 0
    asked = proxy.asked.total()
    code, _, told = here("sample", str(config))
    assert code == 2, told
    assert "NO_SUCH_KEY" in told
    assert "Traceback" not in told
    assert proxy.asked.total() == asked
