"""Promises of an attempt at a paid block: each response is paid for once, no money is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.config import Decoding
from plad_dist.data.dataset import Dataset
from plad_dist.data.schemas import PROMPTS
from plad_dist.data.storage import Storage
from plad_dist.fleet.protocol import BlockResult, Hints, StopStageError
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.backend import Completion, RefusedPromptError
from plad_dist.sampling.job import SamplingJob
from plad_dist.sampling.spool import Spool, total_cost
from plad_dist.timeline import StartClock


class PaidBackend:
    """A server that charges 0.25 a request. Prompts named `refuse` and `stop` get no response."""

    paid, retries, tokens, dead = True, 0, 0, False
    fatal: tuple[type[Exception], ...] = (StopStageError,)

    def __init__(self, requests: list[str]) -> None:
        self.path: str | None = "m"
        self.start = StartClock()
        self._requests = requests

    async def check(self) -> str | None:
        return None

    def render(self, prompts: Sequence[Any]) -> Sequence[Any]:
        return [prompt.messages[-1]["content"] for prompt in prompts]

    async def complete(self, prompt: str, decoding: Decoding, seed: int, request_id: str) -> Completion:
        self._requests.append(prompt)
        if prompt == "refuse":
            raise RefusedPromptError("refused", cost=0.25)
        if prompt == "stop" and self._requests.count("stop") == 1:
            await asyncio.sleep(0.05)  # after the other prompts
            raise StopStageError("the spending cap is reached", cost=0.25)
        thought = f"about {prompt}" if prompt.startswith("think") else None
        return Completion(prompt, [], 2, None, "stop", prompt_tokens=3, cost=0.25, reasoning=thought)

    async def load_weights(self, path: str) -> None:
        pass

    async def close(self) -> None:
        pass


def prepare(folder: Path, prompts: Sequence[str], weights: str = "m") -> tuple[Storage, SamplingJob]:
    """Write one block of prompts."""
    storage = Storage(str(folder))
    rows = [{"prompt_id": text, "messages": [{"role": "user", "content": text}]} for text in prompts]
    dataset = Dataset(storage, "prompts", PROMPTS)
    dataset.commit(0, pa.Table.from_pylist(rows, schema=PROMPTS), fingerprint="p", attempt="a")
    dataset.finish(1, fingerprint="p", facts={})
    job = SamplingJob(
        prompts="prompts", output="samples", role="teacher", model="m", weights=weights, decoding=Decoding(), n=1,
        seed=1, round=0, seed_round=0, fingerprint="f",
    )  # fmt: skip
    return storage, job


def work(storage: Storage, job: SamplingJob, requests: list[str], attempt: str) -> BlockResult:
    """Let a new actor process the block, as after a restart."""

    async def run() -> BlockResult:
        sampler = Sampler(storage, lambda: PaidBackend(requests))
        assert await sampler.start() is None
        try:
            return await sampler.work(job, 0, attempt, Hints())
        finally:
            await sampler.stop()

    return asyncio.run(run())


def test_a_stopped_attempt_leaves_its_responses_and_its_lost_money_to_the_next_one(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a", "stop", "b"])
    requests: list[str] = []
    with pytest.raises(StopStageError):
        work(storage, job, requests, "first")
    assert total_cost(job.dataset(storage)) == 0.75, "two responses, and a request without one"
    result = work(storage, job, requests, "second")
    assert sorted(requests) == ["a", "b", "stop", "stop"], "only the prompt without a response is asked again"
    assert result.is_first
    assert result.part.counts["cost_micros"] == 1_000_000, "of all four requests"
    assert total_cost(job.dataset(storage)) == 0.0, "the part has the cost of its block"
    assert not list(tmp_path.rglob("spool/*/*.arrow"))


def test_a_thought_is_kept_in_its_own_column_of_samples_and_spool(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["think", "stop", "plain"])
    with pytest.raises(StopStageError):
        work(storage, job, [], "first")
    spooled, _ = Spool(job.dataset(storage), job.fingerprint).load(0)
    assert spooled["think", 0]["reasoning"] == "about think"
    work(storage, job, ["stop"], "second")
    samples = pa.ipc.open_file(next((tmp_path / "samples").glob("part-*.arrow"))).read_all()
    assert samples["reasoning"].to_pylist() == ["about think", None, None]


def test_a_refused_prompt_is_an_error_row_with_its_cost(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a", "refuse"])
    requests: list[str] = []
    result = work(storage, job, requests, "first")
    assert result.first_error == "prompt refuse: refused"
    assert (result.part.counts["errors"], result.part.counts["cost_micros"]) == (1, 500_000)
    assert sorted(requests) == ["a", "refuse"]


def test_a_committed_block_is_neither_asked_nor_paid_for_again(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a", "b"])
    requests: list[str] = []
    first = work(storage, job, requests, "first")
    late = work(storage, job, requests, "late")
    assert (late.part, late.is_first) == (first.part, False)
    assert len(requests) == 2


def test_a_second_response_to_a_prompt_is_charged_but_the_first_one_is_kept(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a"])
    for text in ("first", "second"):  # two processes that did not know of each other
        spool = Spool(job.dataset(storage), job.fingerprint)
        row = {
            "prompt_id": "a", "sample_index": 0, "role": "teacher", "text": text, "token_ids": [], "logprob": None,
            "num_tokens": 2, "finish_reason": "stop", "error": None, "model": "m", "round": 0, "reasoning": None,
            "prompt_tokens": 3, "cost": 0.25,
        }  # fmt: skip
        spool.add(0, row)
        spool.flush()
    requests: list[str] = []
    result = work(storage, job, requests, "third")
    assert requests == []
    assert result.part.counts["cost_micros"] == 500_000
    table = pa.ipc.open_file(next((tmp_path / "samples").glob("part-*.arrow"))).read_all()
    assert table["text"].to_pylist() == ["first"]


class ManyBackend(PaidBackend):
    """A server that returns up to two responses for a request, which costs 0.5 a response."""

    takes_n = True

    def __init__(self, requests: list[str], lost_cost: float = 0.0) -> None:
        super().__init__(requests)
        self._lost_cost = lost_cost

    async def complete_many(
        self, prompt: str, decoding: Decoding, seeds: Sequence[int], request_id: str
    ) -> tuple[list[Completion | RefusedPromptError | None], float]:
        self._requests.append(f"{len(seeds)} of {prompt}")
        if self._lost_cost:
            return [None for _ in seeds], self._lost_cost
        if prompt == "refuse":
            raise RefusedPromptError("refused", cost=0.25)
        drawn = [Completion(f"{prompt}{seed}", [], 2, None, "stop", prompt_tokens=3, cost=0.5) for seed in seeds[:2]]
        return [*drawn, *(None for _ in seeds[2:])], 0.0


def draw_many(storage: Storage, job: SamplingJob, backend: PaidBackend) -> BlockResult:
    async def run() -> BlockResult:
        sampler = Sampler(storage, lambda: backend)
        assert await sampler.start() is None
        try:
            return await sampler.work(job, 0, "attempt", Hints())
        finally:
            await sampler.stop()

    return asyncio.run(run())


def test_responses_drawn_together_are_completed_one_by_one_and_paid_for_once(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a", "refuse"])
    requests: list[str] = []
    result = draw_many(storage, replace(job, n=3), ManyBackend(requests))
    assert sorted(requests) == ["3 of a", "3 of refuse", "a"], "a refused prompt is refused for all of its samples"
    assert result.part.counts["errors"] == 3
    assert result.part.counts["cost_micros"] == 500_000 * 2 + 250_000 + 250_000


def test_only_missing_responses_are_drawn_together(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a", "stop"])
    requests: list[str] = []
    with pytest.raises(StopStageError):
        draw_many(storage, replace(job, n=1), PaidBackend(requests))
    draw_many(storage, replace(job, n=3), ManyBackend(requests))
    assert sorted(requests) == ["2 of a", "3 of stop", "a", "stop", "stop"]


def test_money_of_a_request_for_several_responses_that_returned_none_is_not_forgotten(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a"])
    result = draw_many(storage, replace(job, n=2), ManyBackend([], lost_cost=0.75))
    assert result.part.counts["cost_micros"] == 750_000 + 2 * 250_000


@pytest.mark.parametrize("tokens", [2**31, -(2**31) - 1, 2**70, 1e300, float("nan"), "many"])
def test_a_paid_response_that_cannot_be_stored_becomes_an_error_row_and_is_not_paid_again(
    tokens: Any, tmp_path: Path
) -> None:
    class Absurd(PaidBackend):
        async def complete(self, prompt: str, *arguments: Any) -> Completion:
            completion = await super().complete(prompt, *arguments)
            return replace(completion, num_tokens=tokens) if prompt == "absurd" else completion

    async def run() -> BlockResult:
        sampler = Sampler(storage, lambda: Absurd(requests))
        await sampler.start()
        try:
            return await sampler.work(job, 0, "attempt", Hints())
        finally:
            await sampler.stop()

    storage, job = prepare(tmp_path, ["a", "absurd", "b"])
    requests: list[str] = []
    result = asyncio.run(run())
    assert sorted(requests) == ["a", "absurd", "b"]
    assert result.part.counts["errors"] == 1
    assert result.part.counts["cost_micros"] == 750_000
    assert "prompt absurd: the response cannot be stored" in (result.first_error or "")
