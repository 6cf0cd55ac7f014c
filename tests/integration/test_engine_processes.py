"""Processes of a real vLLM engine: from a warm fork server, and never without their actor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import TEMPLATE, make_random_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# Starts an engine, restarts it as for the weights of another student, and waits.
ACTOR = """
import asyncio, json, os, sys, time
from plad_dist.config import Decoding, Model
from plad_dist.sampling.engine import Engine

async def main(path, template):
    engine = Engine(path, Model(path=path, template=template), {"max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 27}, 1)
    decoding = Decoding(temperature=0.0, max_tokens=4)
    responses = [list((await engine.complete([5, 6, 7], decoding, 1, "a")).token_ids)]
    engine.path = None
    await engine.load_weights(path)
    responses.append(list((await engine.complete([5, 6, 7], decoding, 1, "b")).token_ids))
    print(json.dumps(responses), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def test_an_engine_and_its_successor_come_from_one_server_and_die_with_their_actor(tmp_path: Path) -> None:
    (tmp_path / "actor.py").write_text(ACTOR)
    model = make_random_model(tmp_path / "model")
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(tmp_path / "actor.py"), str(model), TEMPLATE]
    actor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert actor.stdout is not None
        line = next(line for line in actor.stdout if line.startswith("[["))
        first, second = json.loads(line)
        assert first == second
        processes = psutil.Process(actor.pid).children(recursive=True)
        [engine] = [process for process in processes if "EngineCore" in " ".join(process.cmdline())]
        server = engine.parent()
        assert server is not None
        assert "forkserver" in " ".join(server.cmdline()), "vLLM was imported before"
    finally:
        actor.send_signal(signal.SIGKILL)
        actor.wait()
    deadline = time.monotonic() + 60
    while any(process.is_running() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [process for process in processes if process.is_running()] == []
