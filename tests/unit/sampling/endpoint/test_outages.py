"""Bad prompts and bad servers: only a prompt that fails while others succeed is an error row."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from plad_dist.errors import UserError
from plad_dist.sampling.backend import Completion, RefusedPromptError
from plad_dist.sampling.endpoint.errors import EndpointDownError
from tests.fake_endpoint import DECODING, FakeTime, client_of, complete_all, error, good, messages, run, serving


@pytest.mark.parametrize(
    "refusal",
    [
        lambda: error(400, "too long"),
        lambda: error(413),
        lambda: error(422),
        lambda: error(403, "Your input was flagged by moderation"),
        lambda: error(429, "Request too large for m: limit 100 tokens"),
        lambda: good("I", finish_reason="content_filter"),
        lambda: good("I", finish_reason="SAFETY"),
        lambda: good("", finish_reason="tool_calls"),
        lambda: good(None, refusal="I will not"),
        lambda: good([{"type": "refusal", "refusal": "I will not"}]),
        lambda: good(None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        lambda: good([{"type": "image_url", "image_url": {"url": "http://x"}}]),
    ],
)
def test_a_refused_prompt_is_sent_once_and_does_not_affect_others(refusal: Callable[[], Any]) -> None:
    async def test() -> None:
        respond = lambda prompt, count: refusal() if prompt == "bad" else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime()) as client:
            outcomes = await complete_all(client, "bad", *(f"good{row}" for row in range(9)))
            assert isinstance(outcomes[0], RefusedPromptError)
            assert all(isinstance(outcome, Completion) for outcome in outcomes[1:])
            assert server.requests["bad"] == 1

    run(test())


def test_a_server_that_refuses_everything_makes_no_error_rows() -> None:
    async def test() -> None:
        respond = lambda prompt, count: error(400, "Unsupported parameter: 'max_tokens'")  # noqa: E731
        async with serving(respond) as server, client_of(server) as client:
            outcomes = await complete_all(client, *(f"p{row}" for row in range(30)))
            assert all(isinstance(outcome, UserError) for outcome in outcomes)
            assert "Unsupported parameter" in str(outcomes[0])

    run(test())


def test_one_poison_prompt_among_good_ones_is_the_only_one_given_up() -> None:
    async def test() -> None:
        fake_time = FakeTime()
        respond = lambda prompt, count: error(500, "CUDA error") if prompt == "poison" else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, fake_time, max_retries=3, concurrency=2) as client:
            outcomes = await complete_all(client, "poison", *(f"good{row}" for row in range(30)))
            assert isinstance(outcomes[0], RefusedPromptError)
            assert "4 tries" in str(outcomes[0])
            assert "CUDA error" in str(outcomes[0])
            assert all(isinstance(outcome, Completion) for outcome in outcomes[1:])
            assert server.requests["poison"] == 4
            assert fake_time.now < 60

    run(test())


def test_a_poison_prompt_that_is_the_last_prompt_does_not_stop_the_stage() -> None:
    async def test() -> None:
        respond = lambda prompt, count: error(500) if prompt == "poison" else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), max_retries=3) as client:
            with pytest.raises(RefusedPromptError):
                await client.complete(messages("poison"), DECODING, 1)
            assert server.requests.total() == 5  # four tries and a probe, which succeeds

    run(test())


def test_a_prompt_that_is_always_throttled_is_given_up_while_others_succeed() -> None:
    async def test() -> None:
        respond = lambda prompt, count: error(429, "slow down") if prompt == "bad" else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), give_up_after_s=100.0) as client:
            bad = asyncio.create_task(client.complete(messages("bad"), DECODING, 1))
            while not bad.done():
                assert isinstance((await complete_all(client, "good"))[0], Completion)
            with pytest.raises(RefusedPromptError, match=r"while other prompts had one; the last failure: .*slow down"):
                await bad

    run(test())


@pytest.mark.parametrize("status", [403, 404])
def test_a_prompt_that_a_firewall_rejects_is_an_error_row_once_others_have_succeeded(status: int) -> None:
    async def test() -> None:
        respond = lambda prompt, count: error(status, "blocked") if "DROP TABLE" in prompt else good()  # noqa: E731
        async with serving(respond) as server, client_of(server) as client:
            assert isinstance((await complete_all(client, "a"))[0], Completion)
            outcomes = await complete_all(client, "b", "DROP TABLE x", "c")
            assert [type(outcome) for outcome in outcomes] == [Completion, RefusedPromptError, Completion]
            assert isinstance((await complete_all(client, "d"))[0], Completion)

    run(test())


def test_a_key_that_is_revoked_midway_is_not_taken_for_a_bad_prompt() -> None:
    async def test() -> None:
        is_revoked = False
        respond = lambda prompt, count: error(403, "revoked") if is_revoked else good()  # noqa: E731
        async with serving(respond) as server, client_of(server) as client:
            await complete_all(client, "a")
            is_revoked = True
            outcomes = await complete_all(client, "b", "c", "d")
            assert all(isinstance(outcome, UserError) for outcome in outcomes)

    run(test())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("cause", ["500", "429", "refused connection"])
def test_an_outage_stops_the_stage_and_makes_no_error_rows(rows: int, cause: str) -> None:
    async def test() -> None:
        fake_time = FakeTime()
        respond = lambda prompt, count: error(int(cause), "overloaded")  # noqa: E731
        async with serving(respond) as server:
            url = "http://127.0.0.1:9/v1" if cause == "refused connection" else server.url
            async with client_of(server, fake_time, url=url, max_retries=1, concurrency=4) as client:
                outcomes = await complete_all(client, *(f"p{row}" for row in range(rows)))
                assert all(isinstance(outcome, EndpointDownError) for outcome in outcomes), outcomes
                assert 900 <= fake_time.now < 1000
                for fragment in ("no response since", "900 s", "give_up_after_s", "run again"):
                    assert fragment in str(outcomes[0])
                assert ("overloaded" if cause != "refused connection" else "no connection") in str(outcomes[0])

    run(test())


def test_a_server_that_responds_only_to_probes_is_an_outage() -> None:
    async def test() -> None:
        respond = lambda prompt, count: good() if prompt == "Say ok." else error(504)  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), max_retries=1, concurrency=4) as client:
            outcomes = await complete_all(client, *(f"p{row}" for row in range(20)))
            assert all(isinstance(outcome, EndpointDownError) for outcome in outcomes)

    run(test())


def test_requests_continue_after_an_outage_that_ends_in_time() -> None:
    async def test() -> None:
        fake_time = FakeTime()
        respond = lambda prompt, count: error(503) if fake_time.now < 800 else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, fake_time, max_retries=0, concurrency=4) as client:
            outcomes = await complete_all(client, *(f"p{row}" for row in range(20)))
            assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes

    run(test())


def test_idle_time_does_not_count_as_an_outage() -> None:
    async def test() -> None:
        fake_time = FakeTime()
        respond = lambda prompt, count: error(500) if prompt == "bad" or count == 1 else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, fake_time, max_retries=100) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.complete(messages("bad"), DECODING, 1), 0.05)
            fake_time.now += 10_000
            assert isinstance((await complete_all(client, "fine"))[0], Completion)

    run(test())
