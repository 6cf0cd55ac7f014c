"""Promises of the engine that need no model."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import pytest

from plad_dist.errors import UserError
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.engine_arguments import check_engine_args


class FakeLlm:
    errored = False

    def shutdown(self) -> None:
        pass


def test_a_cancelled_change_of_weights_ends_before_the_next_one_starts() -> None:
    """Ray cancels the request of a lease, but the thread that starts the engine continues."""
    running, most_running, started = 0, 0, []

    def start(path: str) -> Any:
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        time.sleep(0.2)
        running -= 1
        started.append(path)
        return FakeLlm()

    async def change_weights() -> None:
        engine = object.__new__(Engine)
        engine.path, engine._llm, engine._change, engine._check_texts = "a", FakeLlm(), None, deque()
        engine._start = start  # type: ignore[method-assign]
        first = asyncio.create_task(engine.load_weights("b"))
        await asyncio.sleep(0.05)
        first.cancel()
        await engine.load_weights("c")
        assert engine.path == "c"
        await engine.load_weights("c")

    asyncio.run(change_weights())
    assert (most_running, started) == (1, ["b", "c"])


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"tensor_parallel_size": True}, "tensor_parallel_size: expected a whole number of at least 1, got True"),
        ({"max_num_seqs": 8.0}, "max_num_seqs: expected a whole number"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization: expected a number above 0, at most 1, got True"),
        ({"override_generation_config": {"temperature": 0.6}}, "beside engine, in sampling.student"),
        ({"reasoning_parser": "qwen3"}, "has no effect here; set reasoning_parser of the teacher"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode: processed_logprobs: samples hold the likelihoods"),
    ],
)
def test_an_engine_argument_that_cannot_be_meant_is_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_engine_args(engine, "sampling.student.engine")
    assert message in str(error.value)
