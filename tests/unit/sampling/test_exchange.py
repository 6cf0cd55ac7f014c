"""Promises of an exchange of weights that need no engine."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from plad_dist.sampling import engine as engine_module
from plad_dist.sampling import exchange
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.exchange import can_be_exchanged, largest_difference


def model_folder(folder: Path, weights: bytes, **files: Any) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    for name, content in ({"config": {"hidden_size": 8}, "plad": {"of": folder.name}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "is_exchanged"),
    [
        ({}, True),
        ({"config": {"hidden_size": 9}}, False),
        ({"tokenizer": {}}, False),
        ({"generation_config": {"eos_token_id": 3}}, False),
    ],
)
def test_only_models_that_differ_in_their_weights_alone_are_exchanged(
    tmp_path: Path, files: dict[str, Any], is_exchanged: bool
) -> None:
    first, second = model_folder(tmp_path / "a", b"1"), model_folder(tmp_path / "b", b"22", **files)
    assert can_be_exchanged(str(first), str(second)) is is_exchanged
    assert can_be_exchanged(str(second), str(first)) is is_exchanged


def test_a_model_on_a_hub_or_too_large_for_the_check_is_not_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (str(model_folder(tmp_path / name, b"123")) for name in "ab")
    assert not can_be_exchanged("owner/name", second)
    assert not can_be_exchanged(first, "owner/name")
    monkeypatch.setattr(exchange, "_LARGEST_WEIGHTS", 2)
    assert not can_be_exchanged(first, second)


def test_a_likelihood_that_is_not_a_number_is_the_largest_difference() -> None:
    assert largest_difference([-1.0, -3.0], [-1.0, -2.0]) == 0.5
    for actual in ([math.nan, -2.0], [-1.0, math.nan]):
        assert math.isnan(largest_difference(actual, [-1.0, -2.0]))


class FakeLlm:
    errored = False

    def __init__(self, path: str) -> None:
        self.path, self.is_up = path, True

    def shutdown(self) -> None:
        self.is_up = False


@pytest.mark.parametrize(
    ("logprob", "failure", "warning"),
    [
        (-10.00005, None, None),
        (-10.5, None, "off by up to 5.0e-02 of their values"),
        (math.nan, None, "off by up to nan of their values"),
        (-10.0, RuntimeError("no such tensor"), "no such tensor"),
    ],
)
def test_a_new_engine_starts_unless_the_running_one_passes_the_check(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    logprob: float,
    failure: Exception | None,
    warning: str | None,
) -> None:
    async def exchange_weights(llm: FakeLlm, path: str) -> None:
        assert engine.path is None, "blocks could be sampled while the weights change"
        if failure is not None:
            raise failure
        llm.path = path

    async def score(*_: Any) -> float:
        return logprob

    for name, value in {
        "computes_in_float32": lambda llm: True,
        "can_be_exchanged": lambda present, other: True,
        "exchange_weights": exchange_weights,
        "logprobs_by_transformers": lambda path, settings, texts: [-10.0] * len(texts),
    }.items():
        monkeypatch.setattr(engine_module, name, value)
    engine = object.__new__(Engine)
    engine.path, engine._change, engine._check_texts, engine._settings = "a", None, deque([[1, 2], [3, 4]]), None  # type: ignore[assignment]
    engine._llm = first = FakeLlm("a")
    engine._start, engine._logprob = FakeLlm, score  # type: ignore[assignment,method-assign]
    with caplog.at_level(logging.WARNING, "plad"):
        asyncio.run(engine.load_weights("b"))
    assert (engine.path, engine._llm.path, engine._llm.is_up) == ("b", "b", True)
    assert (engine._llm is first) is (warning is None)
    assert first.is_up is (warning is None)
    assert [warning in record.message for record in caplog.records] == ([] if warning is None else [True])  # type: ignore[operator]
