"""Closing a client: responses in flight are paid for and awaited, and nothing more is sent."""

from __future__ import annotations

import asyncio

from plad_dist.sampling.endpoint.errors import ClientClosedError
from tests.fake_endpoint import after, client_of, complete_all, good, run, serving, until


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
