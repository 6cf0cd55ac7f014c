"""Costs of batches are counted once, whatever storage, provider and process do meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from plad_dist.config import Endpoint, Model
from plad_dist.errors import RunFailed
from plad_dist.fleet.protocol import Hints
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.endpoint import batch as batches
from plad_dist.sampling.endpoint.backend import EndpointBackend
from plad_dist.sampling.endpoint.batch_record import BatchLedger
from tests.fake_batches import BatchProvider, prompt_of, providing
from tests.fake_endpoint import PRICES, good
from tests.unit.sampling.endpoint.test_batches import PRICE, PROMPTS, Killed, short_waits, texts, work
from tests.unit.sampling.test_attempt import prepare

__all__ = ["short_waits"]  # a fixture


def backend_of(provider: BatchProvider, outputs: Any) -> Any:
    keys: dict[str, Any] = {"url": provider.url, "model": "m", "mode": "batch", "max_spend": 10.0} | PRICES
    return EndpointBackend(Model(endpoint=Endpoint(**keys)), "m", outputs)


def test_a_billed_failure_counts_once_if_the_process_dies_before_the_batch_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        is_first = prompt_of(body) == "b" and len(provider.batches) == 1
        return 200, good(prompt_of(body), "unknown" if is_first else "stop")

    provider.answer = answer
    with monkeypatch.context() as patch:
        patch.setattr(BatchLedger, "update", dies_before_settling(BatchLedger.update))
        with pytest.raises(Killed):
            work(storage, job, provider)
    result = work(storage, job, provider)
    assert texts(tmp_path) == PROMPTS
    assert provider.submitted_lines == [3, 1]
    assert result.part.counts["cost_micros"] == round(4 * PRICE * 1e6)


def dies_before_settling(real: Callable[..., Any], error: BaseException | None = None) -> Callable[..., Any]:
    def update(self: BatchLedger, record: Any, **changes: Any) -> Any:
        if changes.get("is_settled"):
            raise error or Killed
        return real(self, record, **changes)

    return update


@pytest.mark.parametrize("failing", ["the record of a new batch", "the record of a settled batch"])
def test_an_attempt_that_storage_has_failed_leaves_what_was_spent_as_it_is(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider, failure = BatchProvider(), RunFailed("storage does not answer")
    real_add = BatchLedger.add

    def add(self: BatchLedger, *arguments: Any) -> Any:
        real_add(self, *arguments)
        raise failure

    async def test() -> float:
        async with providing(provider):
            backend = backend_of(provider, [(job.dataset(storage), [0])])
            sampler = Sampler(storage, lambda: backend)
            assert await sampler.start() is None
            with monkeypatch.context() as patch:
                if failing == "the record of a new batch":
                    patch.setattr(BatchLedger, "add", add)
                else:
                    patch.setattr(BatchLedger, "update", dies_before_settling(BatchLedger.update, failure))
                with pytest.raises(RunFailed):
                    await sampler.work(job, 0, "first", Hints())
            await sampler.work(job, 0, "second", Hints())
            await sampler.stop()
            return backend._client.spent

    assert asyncio.run(asyncio.wait_for(test(), 60)) == pytest.approx(3 * PRICE)
    assert provider.submitted_lines == [3]


def test_a_block_that_waits_after_a_barren_batch_is_not_taken_for_an_exhausted_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "backoff_s", lambda failures, jitter: 0.2)
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(16)])
    other = replace(job, output="other")
    provider = BatchProvider()
    provider.ending = lambda number: "expired" if number == 0 else "completed"
    provider.answer = lambda body: None if len(provider.batches) == 1 else (200, good(prompt_of(body)))

    async def test() -> None:
        async with providing(provider):
            sampler = Sampler(storage, lambda: backend_of(provider, []))
            assert await sampler.start() is None
            await asyncio.gather(*(sampler.work(each, 0, each.output, Hints()) for each in (job, other)))
            await sampler.stop()

    asyncio.run(asyncio.wait_for(test(), 60))
    assert provider.answered.total() == 32


def test_a_submission_is_found_in_a_list_that_lags_behind(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.lost_answers = {"POST batches"}
    lagging = web.json_response({"data": []})
    # The first look is the check at the start.
    provider.refuse = lambda call: lagging if call == "GET batches" and provider.calls.count(call) == 2 else None
    work(storage, job, provider)
    assert texts(tmp_path) == PROMPTS
    assert provider.submitted_lines == [3]
