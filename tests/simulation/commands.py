"""Whole commands of plad-dist in a simulated world: real code without Ray, engines and threads.

`plad run` prepares, samples and builds pairs. The pipeline, the run directory, its claims, all
datasets and `plad verify` are the real ones. What needs a cluster or a model is replaced: blocks
are processed one after the other in the command itself, and responses and pairs follow from the
prompts.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import pickle
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import obstore
import pyarrow as pa
import pytest
import yaml

from plad_dist import pipeline, rundir
from plad_dist.config import Config, secrets
from plad_dist.config_file import parse_config
from plad_dist.data import dataset, prompts, selection, storage
from plad_dist.data.claims import check_owned
from plad_dist.data.schemas import PAIRS
from plad_dist.fleet.fleet import Assignment, Fleet
from plad_dist.fleet.output import OutputDatasets
from plad_dist.fleet.placement import Placement
from plad_dist.fleet.protocol import BlockResult, Hints
from plad_dist.pairing import build
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.forms import PairForms
from plad_dist.pairing.worker import PairJob
from plad_dist.rundir import check_same_run
from plad_dist.sampling import stage
from plad_dist.sampling.attempt import BlockAttempt
from plad_dist.sampling.backend import Completion
from plad_dist.sampling.job import SamplingJob
from plad_dist.timeline import StartClock
from plad_dist.verify.verification import Verification
from tests.caching import cached
from tests.simulation.world import World

URL = "s3://simulated/run"
_STEPS = ("prepare", "sample", "pair")
_TEMPLATE = "{{ messages[-1].content }}"
_worlds: list[World] = []  # the world of the schedule that runs


def world() -> World:
    """Return the world of the schedule that runs."""
    return _worlds[-1]


@contextmanager
def in_world(one: World) -> Iterator[World]:
    """Make a world the one in which commands run."""
    _worlds.append(one)
    try:
        yield one
    finally:
        _worlds.pop()


# -- configs and commands


def make_config(prompts_file: str, **changes: Any) -> Config:
    """Return the config of a run with a few blocks.

    Args:
        changes: values of keys, with `__` for the dot.
    """
    model = {"template": _TEMPLATE, "max_length": 64}
    raw: dict[str, Any] = {
        "run": {"dir": URL, "seed": 5, "date": "2026-01-02"},
        "prompts": {
            "source": {"type": "files", "paths": [prompts_file], "reference_column": "answer"},
            "heldout_fraction": 0.3,
            "block_size": 4,
        },
        "teacher": {"path": "org/teacher"} | model,
        "student": {"path": "org/student"} | model,
        "sampling": {"teacher": {"max_tokens": 8, "n": 1}, "student": {"max_tokens": 8, "n": 1}},
        "training": {"warmup": None, "teacher": None},
        "evaluation": {
            "limit": 3,
            "candidates": 0,
            "warmup_temperatures": [],
            "decodings": {"greedy": {"temperature": 0.0, "max_tokens": 8}},
        },
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        functools.reduce(lambda section, part: section[part], sections, raw)[name] = value
    return parse_config(raw, "simulated.yaml")


def plad(config: Config, command: str = "run") -> Callable[[], object]:
    """Return a command that works on a run."""
    return lambda: pipeline.run_pipeline(config, None if command == "run" else command)


def plad_verify(*, repair: bool = False) -> Callable[[], object]:
    """Return `plad verify`."""

    def work() -> None:
        verification = Verification(URL)
        if repair:
            verification.repair()
        verification.raise_for_problems(repaired=repair)

    return work


# -- what stands in for engines and a cluster


class _Backend:
    """Responds to a prompt with its own text."""

    path, paid, retries, dead, tokens = "simulated", False, 0, False, 0
    fatal: tuple[type[Exception], ...] = ()
    start = StartClock()

    def render(self, conversations: Sequence[Any]) -> Sequence[Any]:
        return [conversation.messages[-1]["content"] for conversation in conversations]

    async def complete(self, prompt: Any, decoding: Any, seed: int, request_id: str) -> Completion:
        return Completion(f"{prompt}: {seed % 97}", [1, 2], 2, -1.0, "stop", prompt_tokens=3)


class _Lengths:
    """Accepts prompts of any length, since there are no tokenizers."""

    def __init__(self, config: Config) -> None:
        pass

    def check_rendering(self, rows: Sequence[Any]) -> None:
        pass

    def unshown(self, rows: Sequence[Any]) -> list[str]:
        return []

    def over_long(self, rows: Sequence[Any]) -> dict[int, str]:
        return {}


def _fleet(config: Config, run: Any, responder: Any, assignments: Sequence[Assignment], *_: Any, **__: Any) -> Fleet:
    return Fleet(responder.name, tuple(assignments), object, (), Placement(1.0))


async def _sample_block(at: storage.Storage, job: SamplingJob, block: int) -> BlockResult:
    name = uuid.uuid4().hex
    return await BlockAttempt(
        at, _Backend(), None, job, block, name, Hints(), row_tries=1, on_sample=lambda: None
    ).run()  # fmt: skip


async def _pair_block(at: storage.Storage, job: PairJob, block: int) -> BlockResult:
    rows = zip(*(table.to_pylist() for table in job.read(at, block)), strict=False)
    pairs = [
        {"prompt_id": prompt["prompt_id"], "prompt_token_ids": [1], "chosen_token_ids": [2], "rejected_token_ids": [3],
         "chosen_text": teacher["text"], "rejected_text": student["text"], "round": job.round}
        for prompt, teacher, student in rows
    ]  # fmt: skip
    part, is_first = job.dataset(at).commit(
        block,
        pa.Table.from_pylist(pairs, schema=PAIRS),
        fingerprint=job.fingerprint,
        attempt=uuid.uuid4().hex,
        counts={"pairs": len(pairs), "prompts": len(pairs)},
    )
    return BlockResult(part, is_first, 0.0)


def _run_fleets(
    config: Config, at: storage.Storage, fleets: Sequence[Fleet], *_: Any, facts: Any = lambda parts: {}, **__: Any
) -> None:
    """Process the missing blocks one after the other, as the driver and its actors would."""
    outputs = OutputDatasets(fleets, at, config.sampling.max_error_share, facts)
    with asyncio.Runner() as runner:
        try:
            outputs.finish_complete()
            for fleet, task in [(one, task) for one in fleets for task in outputs.missing_tasks(one)]:
                check_owned(at)
                job = fleet.assignments[task.assignment].job
                work = _pair_block if isinstance(job, PairJob) else _sample_block
                outputs.add(task, runner.run(work(at, job, task.block)))  # type: ignore[operator]
                outputs.finish_complete()
        finally:
            outputs.keep_journals()


def _run_pair_jobs(jobs: Sequence[tuple[PairJob, list[int]]], config: Config, run: Any, *_: Any) -> None:
    fleet = _fleet(config, run, stage.student_responder(config, "s"), [
        Assignment(job, range(len(units)), units) for job, units in jobs
    ])  # fmt: skip
    _run_fleets(config, run.storage, [fleet], facts=lambda parts: PairFacts.from_parts(parts).as_dict())


class _SerialExecutor:
    """Executor that calls a function in the thread of its caller."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _SerialExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return iter([work(*arguments) for arguments in zip(*items, strict=False)])

    def submit(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **named))
        except Exception as error:  # noqa: BLE001 - the future holds it
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        pass


async def _to_this_thread(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return work(*arguments, **named)


def _once(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a method without arguments whose result is kept for each object."""
    results: dict[int, tuple[Any, bytes]] = {}

    def kept(this: Any) -> Any:
        if id(this) not in results:
            results[id(this)] = this, pickle.dumps(method(this))
        return pickle.loads(results[id(this)][1])

    return kept


def _of_each_command(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with a cache for each command, since each is a process of its own."""

    def own() -> dict[Any, Any]:
        command = world().current
        return command.caches if command is not None else {}

    def cached(key: Any) -> Any:
        results = own()
        if key not in results:
            results[key] = work(key)
        return results[key]

    cached.cache_clear = lambda: own().clear()  # type: ignore[attr-defined]
    return cached


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace cluster, engines, threads, time, randomness and the network by those of a world."""
    for name in ("put", "get", "head", "delete", "list", "list_with_delimiter"):
        monkeypatch.setattr(obstore, name, lambda *a, _name=name, **k: getattr(world(), _name)(*a, **k))
    monkeypatch.setattr(storage, "from_url", lambda url, **options: url)
    for module in [module for name, module in sys.modules.items() if name.startswith("plad_dist.")]:
        if hasattr(module, "ThreadPoolExecutor"):
            monkeypatch.setattr(module, "ThreadPoolExecutor", _SerialExecutor)
    monkeypatch.setattr(asyncio, "to_thread", _to_this_thread)
    monkeypatch.setattr(dataset, "_parts", _of_each_command(dataset._parts.__wrapped__))
    monkeypatch.setattr(time, "time", lambda: world().time())
    monkeypatch.setattr(time, "time_ns", lambda: int(world().time() * 1e9))
    monkeypatch.setattr(time, "monotonic", lambda: world().monotonic)
    monkeypatch.setattr(time, "sleep", lambda seconds: world().sleep(seconds))
    monkeypatch.setattr(os, "urandom", lambda size: world().random.randbytes(size))
    monkeypatch.setattr(yaml, "load", cached(yaml.load))
    monkeypatch.setattr(secrets, "_environment", functools.cache(secrets._environment))
    monkeypatch.setattr(Config, "flat", _once(Config.flat))
    monkeypatch.setattr(Config, "fingerprint", _once(Config.fingerprint))
    for name in ("dump_yaml", "parse_config", "_with_defaults"):
        monkeypatch.setattr(rundir, name, cached(getattr(rundir, name)))
    monkeypatch.setattr(pipeline, "check_inputs", lambda config, run, **_: check_same_run(config, run))
    monkeypatch.setattr(pipeline, "connected", _connected)
    steps = pipeline.steps_of
    monkeypatch.setattr(pipeline, "steps_of", lambda *a: itertools.takewhile(_is_simulated, steps(*a)))
    monkeypatch.setattr(selection, "Lengths", _Lengths)
    monkeypatch.setattr(prompts, "check_prompts", lambda *a, **k: [])
    monkeypatch.setattr(stage, "run_fleets", _run_fleets)
    monkeypatch.setattr(stage, "fleet_of", _fleet)
    monkeypatch.setattr(build, "run_pair_jobs", _run_pair_jobs)
    monkeypatch.setattr(build, "pair_forms", lambda *a: PairForms())
    monkeypatch.setattr(build, "context_length", lambda *a: 64)


def _is_simulated(step: pipeline.Step) -> bool:
    return step.command in _STEPS


@contextmanager
def _connected(*_: Any) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def random_of(seed: int) -> random.Random:
    """Return the generator of a schedule's faults, apart from that of its world."""
    return random.Random(f"faults {seed}")
