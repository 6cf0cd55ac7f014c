"""Limits on requests in flight, requests per minute and tokens per minute."""

from __future__ import annotations

import pytest

from plad_dist.sampling.backend import Completion
from tests.fake_endpoint import FakeTime, after, assert_rate, client_of, complete_all, error, good, run, serving


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    async def test() -> None:
        respond = lambda prompt, count: after(0.01, error(500) if count == 1 else good())  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), concurrency=5) as client:
            completions = await complete_all(client, *(f"p{row}" for row in range(40)))
            assert all(isinstance(completion, Completion) for completion in completions)
            assert server.most_in_flight == 5

    run(test())


def test_requests_keep_to_their_rate() -> None:
    async def test() -> None:
        fake_time = FakeTime()
        async with (
            serving(lambda prompt, count: good(), fake_time.clock) as server,
            client_of(server, fake_time, requests_per_minute=30, concurrency=1) as client,
        ):
            await complete_all(client, *(f"p{row}" for row in range(60)))
            assert_rate(server.request_times, [1.0] * 60, 30)
            assert fake_time.now == pytest.approx(60 * 2, rel=0.05)

    run(test())


def test_the_token_rate_counts_the_tokens_that_the_server_reports() -> None:
    async def test() -> None:
        fake_time = FakeTime()
        async with (
            serving(lambda prompt, count: good(usage=(30, 2)), fake_time.clock) as server,
            client_of(server, fake_time, tokens_per_minute=600, concurrency=1) as client,
        ):
            await complete_all(client, *(f"p{row}" for row in range(60)))
            # 60 requests of 32 tokens take over three minutes; at `max_tokens`, five.
            assert 180 <= fake_time.now <= 230

    run(test())
