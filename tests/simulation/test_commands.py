"""Thousands of seeded schedules of whole commands: nothing committed is lost, changed or mixed.

`SIMULATION_SEED=123 pytest tests/simulation -k commands` replays one schedule.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plad_dist import rundir
from plad_dist.config import Config
from plad_dist.data import claims
from plad_dist.data.dataset import Dataset
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.run_logs import TIMINGS
from plad_dist.rundir import RUN_FILE
from tests.simulation import commands
from tests.simulation.commands import in_world, install, make_config, plad_verify
from tests.simulation.schedules import Schedule, snapshots
from tests.simulation.watch import is_part
from tests.simulation.world import Command, World

SCHEDULES, _AT_ONCE = 2000, 100
_MOST_SEEDS = 400  # until a mutation must show
_SEED = os.environ.get("SIMULATION_SEED")


Configs = tuple[Config, Config, Config]


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configs]:
    """Return configs of one run, with everything replaced that needs a cluster or a model."""
    lines = [json.dumps({"prompt": f"question {row}", "answer": f"answer {row}"}) for row in range(14)]
    good, bad = tmp_path / "prompts.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(lines))
    bad.write_text("\n".join([*lines[:10], "{", *lines[10:]]))
    made = make_config(str(good)), make_config(str(good), prompts__heldout_fraction=0.5), make_config(str(bad))
    install(monkeypatch)
    logging.getLogger("plad").setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()  # the heap is large, and a collection would take longer than a schedule
    gc.disable()
    yield made
    gc.enable()
    gc.unfreeze()
    logging.getLogger("plad").setLevel(logging.NOTSET)


def problems_of(seeds: range, configs: Configs) -> Iterator[str]:
    """Yield the broken promises of schedules."""
    for seed in seeds:
        schedule = Schedule(seed, configs)
        if problems := schedule.run():
            yield "\n  ".join([*problems, *schedule.log])


@pytest.mark.parametrize("start", [int(_SEED)] if _SEED else range(0, SCHEDULES, _AT_ONCE))
def test_commands_lose_and_mix_nothing(start: int, configs: Configs) -> None:
    problem = next(problems_of(range(start, start + (1 if _SEED else _AT_ONCE)), configs), None)
    assert problem is None, problem


def test_commands_that_verify_find_every_flipped_bit(configs: Configs) -> None:
    objects, rng = snapshots(configs[0])["pair"], random.Random(0)
    harmless = (f"{claims.RUN_CLAIMS}/", TIMINGS)  # who worked on the run, and for how long
    for key, data in [(key, data) for key, data in objects.items() if not key.startswith(harmless)]:
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with in_world(World(0)) as world:
            world.objects = objects | {key: bytes(flipped)}
            check = Command("verify", plad_verify())
            world.run(check)
        assert isinstance(check.outcome, RunFailed | UserError), f"{key}: {check.outcome!r}"


# -- mutations: without any of its guards, the simulation must fail


def _without_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command looks whether another one has taken over the run."""
    for module in list(sys.modules.values()):
        if getattr(module, "check_owned", None) is claims.check_owned and module is not claims:
            monkeypatch.setattr(module, "check_owned", lambda storage: None)
    monkeypatch.setattr(claims, "check_owned", lambda storage: None)


def _with_replaced_run_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run.yaml` is written whether it exists or not."""
    _overwrite(monkeypatch, lambda key: key == RUN_FILE)


def _with_replaced_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are written whether they exist or not."""
    _overwrite(monkeypatch, is_part)


def _overwrite(monkeypatch: pytest.MonkeyPatch, is_meant: Callable[[str], bool]) -> None:
    create = Storage.create

    def overwrite(storage: Storage, key: str, data: bytes) -> bool:
        if not is_meant(key):
            return create(storage, key, data)
        storage.replace(key, data)
        return True

    monkeypatch.setattr(Storage, "create", overwrite)


def _without_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest is written without another look at its parts."""
    monkeypatch.setattr(Dataset, "_check_again", lambda *_: None)


def _without_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command takes any run for that of its config."""
    for module in (rundir, commands):
        monkeypatch.setattr(module, "check_same_run", lambda config, run: None)


@pytest.mark.parametrize(
    ("mutate", "scenario"),
    [
        (_without_claims, "other config"),
        (_with_replaced_run_file, "other config"),
        (_with_replaced_parts, "same config"),
        (_without_second_look, "deletion"),
        (_without_comparison, "other config"),
    ],
)
def test_commands_without_a_guard_fail(
    mutate: Callable[[pytest.MonkeyPatch], None], scenario: str, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots(configs[0])
    mutate(monkeypatch)
    assert any(Schedule(seed, configs, (scenario,)).run() for seed in range(_MOST_SEEDS))
