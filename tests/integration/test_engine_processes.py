"""Processes of a real vLLM engine: from a warm fork server, and never without their actor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


# Keeps a nursery like a node, starts an actor's engine from it, samples a block, and waits.
WARM_ACTOR = """
import asyncio, os, subprocess, sys, time
from functools import partial
from pathlib import Path
from plad_dist.config import Model
from plad_dist.fleet.protocol import Hints
from plad_dist.nursery.client import interpreter
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.engine_actor import EngineActor
from plad_dist.sampling.responders import FORK_SERVER
from plad_dist.sampling.warm import modules_of
from tests.unit.sampling.test_attempt import prepare

async def main(path, template, folder):
    server, (end, _), (_, news) = Path(folder, "s"), os.pipe(), os.pipe()
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    command = interpreter("plad_dist.nursery.server", end, news, server, *modules_of("engine-1"))
    subprocess.Popen(command, pass_fds=(end, news), env=environment)
    while not server.exists():
        time.sleep(0.1)
    storage, job = prepare(Path(folder), ["a", "b"], weights=path)
    settings = Model(path=path, template=template)
    make_engine = partial(Engine, path, settings, {"max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 27}, 1)
    actor = EngineActor("engine", storage, make_engine, 1, FORK_SERVER)
    actor._server = lambda: server
    assert await actor.start() is None
    result = await actor.work(job, 0, "first", Hints())
    print(f"[[{result.part.rows}, {int(actor._child.is_warm)}]]", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def test_an_engine_and_its_successor_come_from_one_server_and_die_with_their_actor(tmp_path: Path) -> None:
    with running(ACTOR, tmp_path) as (line, actor):
        first, second = json.loads(line)
        assert first == second
        processes = actor.children(recursive=True)
        assert "forkserver" in " ".join(server_of_engine(processes).cmdline()), "vLLM was imported before"
    expect_death(processes)


def test_an_engine_comes_from_a_nursery_and_dies_with_its_actor(tmp_path: Path) -> None:
    with running(WARM_ACTOR, tmp_path, str(tmp_path)) as (line, actor):
        assert json.loads(line) == [[2, 1]], "two rows, from a warm process"
        processes = actor.children(recursive=True)
        assert server_of_engine(processes).cmdline()[0] == "plad:engine", "a fork of the process with the sampler"
    expect_death(processes)


@contextmanager
def running(script: str, folder: Path, *arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a script with a model until it prints its result, and kill it after the block."""
    (folder / "actor.py").write_text(script)
    model = make_random_model(folder / "model")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    environment.pop("PYTEST_CURRENT_TEST", None)
    command = [sys.executable, str(folder / "actor.py"), str(model), TEMPLATE, *arguments]
    actor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert actor.stdout is not None
        yield next(line for line in actor.stdout if line.startswith("[[")), psutil.Process(actor.pid)
    finally:
        actor.send_signal(signal.SIGKILL)
        actor.wait()


def server_of_engine(processes: list[psutil.Process]) -> psutil.Process:
    """Return the process that the engine was forked from."""
    [engine] = [process for process in processes if "EngineCore" in " ".join(process.cmdline())]
    server = engine.parent()
    assert server is not None
    return server


def expect_death(processes: list[psutil.Process]) -> None:
    """Check that processes end soon."""
    deadline = time.monotonic() + 60
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(filter(is_alive, processes)) == []


def is_alive(process: psutil.Process) -> bool:
    """Return False for a process that is gone, or that nobody waits for."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
