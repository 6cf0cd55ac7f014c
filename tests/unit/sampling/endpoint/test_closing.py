"""Closing a client: responses in flight are awaited and paid for once, and nothing more is sent."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config import Decoding, Endpoint, Model
from plad_dist.data.claims import claim_run
from plad_dist.data.storage import Storage
from plad_dist.fleet import driver
from plad_dist.sampling.endpoint import backend as backends
from plad_dist.sampling.endpoint.account import Account
from plad_dist.sampling.endpoint.backend import EndpointBackend
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.client import EndpointClient
from plad_dist.sampling.endpoint.errors import ClientClosedError
from plad_dist.sampling.endpoint.ledger import Ledger, Spending
from tests.fake_endpoint import PRICES, FakeServer, after, client_of, complete_all, good, messages, run, serving, until
from tests.unit.sampling.test_attempt import prepare

PAID: dict[str, Any] = {"input_price": 0.0, "output_price": 4000.0, "max_spend": 100.0}
ANSWER = 20_000  # the worst cost of a request with `max_tokens: 5`, in millionths


@asynccontextmanager
async def paying(
    server: FakeServer, ledger: Ledger, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep, **settings: Any
) -> AsyncIterator[EndpointClient]:
    """Open a client that pays five tokens for each answer."""
    ledger.start(Spending)
    client = EndpointClient(
        Endpoint(**({"url": server.url, "model": "m"} | PAID | settings)), ledger=ledger, sleep=sleep
    )
    client._budget._known = 1000  # without a slow start
    try:
        yield client
    finally:
        await client.close()


def ask(client: EndpointClient, count: int) -> list[asyncio.Task[Any]]:
    decoding = Decoding(max_tokens=5)
    return [asyncio.create_task(client.complete(messages(f"p{row}"), decoding, 1)) for row in range(count)]


def test_closing_waits_for_responses_in_flight_and_sends_nothing_more() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: after(0.3, good(prompt))) as server:
            async with client_of(server, concurrency=2) as client:
                task = asyncio.create_task(complete_all(client, "a", "b", "c", "d"))
                await until(lambda: server.requests == {"a": 1, "b": 1})
                await client.close(60.0)
                outcomes = await task
            assert [completion.text for completion in outcomes[:2]] == ["a", "b"]
            assert all(isinstance(outcome, ClientClosedError) for outcome in outcomes[2:])
            assert server.requests == {"a": 1, "b": 1}

    run(test())


def test_closing_waits_no_longer_than_its_limit() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: after(60, good())) as server, client_of(server) as client:
            task = asyncio.create_task(complete_all(client, "slow"))
            await until(lambda: server.requests == {"slow": 1})
            await client.close(0.2)
            assert isinstance((await task)[0], ClientClosedError)
            assert server.requests == {"slow": 1}

    run(test())


def test_a_close_that_cuts_responses_off_counts_them_once_whatever_waits_for_their_slots(tmp_path: Path) -> None:
    async def test() -> None:
        ledger = Ledger(Storage(str(tmp_path)), "p")
        respond = lambda prompt, count: good(usage=(0, 5)) if int(prompt[1:]) < 3 else after(60, good())  # noqa: E731
        async with serving(respond) as server, paying(server, ledger, concurrency=4) as client:
            tasks = ask(client, 20)
            await until(lambda: server.completed == 3 and len(server.requests) == 7)
            await client.close(0.1)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, ClientClosedError) for outcome in outcomes[3:])
            assert ledger.read() == Spending(7 * ANSWER)
            assert client.spent == pytest.approx(7 * ANSWER / 1e6)

    run(test())


def test_requests_that_were_never_sent_cost_nothing_when_the_client_closes(tmp_path: Path) -> None:
    async def test() -> None:
        ledger = Ledger(Storage(str(tmp_path)), "p")

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(60)

        async with (
            serving(lambda prompt, count: good(usage=(0, 5))) as server,
            paying(server, ledger, sleep, concurrency=8, requests_per_minute=1) as client,
        ):
            tasks = ask(client, 8)
            await until(lambda: server.completed == 1 and len(client._unsent) == 7)
            await client.close(0.1)
            assert ledger.read() == Spending(ANSWER)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert len(server.requests) == 1
            assert ledger.read() == Spending(ANSWER)

    run(test())


def account_of(ledger: Ledger) -> tuple[Account, Budget]:
    endpoint = Endpoint(url="http://x", model="m", max_spend=100.0, **PRICES)
    budget = Budget(endpoint)
    budget._known = 1000
    ledger.start(Spending)
    return Account(endpoint, budget, ledger), budget


def test_a_bill_that_is_settled_late_does_not_open_the_account_again(tmp_path: Path) -> None:
    ledger = Ledger(Storage(str(tmp_path)), "p")

    async def test() -> None:
        account, budget = account_of(ledger)
        await account.reserve(1.0)
        await account.close()
        budget.settle(1.0, 7.0)
        budget.learn(1.0, 7.0)
        await account.adjust()
        for call in (account.reserve(1.0), account.hold(1.0), account.open_batch("batch-x", 1.0)):
            with pytest.raises(ClientClosedError):
                await call  # type: ignore[misc]
        await account.close()
        assert ledger.read() == Spending(1_000_000)

    asyncio.run(test())


def test_a_raise_that_outlives_its_cancelled_task_does_not_open_the_account_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(Storage(str(tmp_path)), "p")
    real, may_go_on, calls = Ledger.change, threading.Event(), list[str]()

    def change(self: Ledger, edit: Any) -> Spending:
        calls.append("")
        if len(calls) == 2:
            may_go_on.wait(30)
        return real(self, edit)

    async def test() -> None:
        account, budget = account_of(ledger)
        await account.reserve(1.0)
        budget.settle(1.0, 1.0)
        late = asyncio.create_task(account.hold(50.0))
        await until(lambda: len(calls) == 2)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        await account.close()
        may_go_on.set()

    monkeypatch.setattr(Ledger, "change", change)
    asyncio.run(test())  # waits for the thread
    assert ledger.read() == Spending(1_000_000)


@pytest.mark.parametrize("is_taken_over", [False, True])
def test_a_command_that_was_taken_over_settles_before_its_driver_ends_it(
    is_taken_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_DRAIN_S", 60.0)
    monkeypatch.setattr(backends, "_SUPERSEDED_DRAIN_S", 0.2)
    assert backends._SUPERSEDED_DRAIN_S < driver._SUPERSEDED_STOP_TIMEOUT_S / 2
    storage, job = prepare(tmp_path, ["p"])
    storage = replace(storage, claim=claim_run(storage, "plad run"))

    async def test() -> None:
        async with serving(lambda prompt, count: after(2.0, good(usage=(0, 5)))) as server:
            endpoint = Endpoint(url=server.url, model="m", **PAID)
            backend = EndpointBackend(Model(endpoint=endpoint), "m", [(job.dataset(storage), [0])], "p")
            task = asyncio.create_task(backend.complete(messages("p"), Decoding(max_tokens=5), 1, "id"))
            await until(lambda: bool(server.requests))
            if is_taken_over:
                claim_run(storage, "plad sample")
            began = time.monotonic()
            await backend.close()
            assert (time.monotonic() - began < 1.5) == is_taken_over
            assert Ledger(storage, "p").read() == Spending(ANSWER)
            await asyncio.gather(task, return_exceptions=True)

    run(test())
