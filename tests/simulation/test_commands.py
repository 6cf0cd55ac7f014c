"""Thousands of seeded schedules of whole commands: nothing committed is lost, changed or mixed.

`SIMULATION_SEED=123 pytest tests/simulation -k commands` replays one schedule.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from plad_dist.config import Config
from tests.simulation.commands import install, make_config
from tests.simulation.schedules import Schedule

SCHEDULES, _AT_ONCE = 2000, 100
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
