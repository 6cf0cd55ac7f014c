"""Streams: only silence times out, and a stream gives what a whole response gives."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest
from aiohttp import web

from plad_dist.errors import UserError
from plad_dist.sampling.backend import RefusedPromptError
from plad_dist.sampling.endpoint.stream import ResponseBody
from tests.fake_endpoint import (
    DECODING,
    PRICES,
    FakeTime,
    after,
    client_of,
    complete_all,
    error,
    good,
    messages,
    run,
    serving,
    streamed,
)

TEXT = "héllo, wörld"


def test_a_streamed_response_equals_a_whole_one() -> None:
    async def test() -> None:
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 45}
        body = good(TEXT, usage=usage, reasoning_content="2 + 2 is")
        completions = []
        for stream in (True, False):
            respond = lambda prompt, count, stream=stream: streamed(body) if stream else body  # noqa: E731
            async with serving(respond) as server, client_of(server, stream=stream, **PRICES) as client:
                completions.append(await client.complete(messages("hi"), DECODING, 7))
                assert server.bodies[0].get("stream", False) is stream
                assert (client.events > 0) is stream, "a long response is seen to grow"
        assert completions[0] == completions[1]
        assert (completions[0].text, completions[0].reasoning) == (TEXT, "2 + 2 is")
        assert completions[0].cost == pytest.approx((10 * 10 + 35 * 100) / 1e6)

    run(test())


def test_only_silence_times_out() -> None:
    async def test() -> None:
        respond = lambda prompt, count: streamed(good(TEXT), gap_s=0.15, pieces=12)  # noqa: E731
        async with serving(respond) as server, client_of(server, timeout_s=1.0) as client:
            started = time.monotonic()
            assert (await client.complete(messages("hi"), DECODING, 7)).text == TEXT
            assert time.monotonic() - started > 2.0
            assert client.retries == 0

    run(test())


def test_a_stream_that_falls_silent_is_sent_again_and_counts_at_its_worst_cost() -> None:
    async def test() -> None:
        respond = lambda prompt, count: streamed(good(TEXT), gap_s=9.0 if count == 1 else 0.0)  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), timeout_s=0.5, **PRICES) as client:
            completion = await client.complete(messages("hi"), DECODING, 7)
            assert (completion.text, client.retries) == (TEXT, 1)
            worst = (len(json.dumps(messages("hi"))) + 256) * 10 / 1e6 + 20 * 100 / 1e6
            assert completion.cost == pytest.approx(worst + 600e-6)

    run(test())


@pytest.mark.parametrize("last", [None, '{"error": {"code": 503, "message": "overloaded"}}', "{not json"])
def test_a_stream_that_breaks_is_sent_again_and_counts_at_its_worst_cost(last: str | None) -> None:
    async def test() -> None:
        respond = lambda prompt, count: streamed(good(TEXT), last=last if count == 1 else "[DONE]")  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), **PRICES) as client:
            completion = await client.complete(messages("hi"), DECODING, 7)
            assert (completion.text, client.retries) == (TEXT, 1)
            assert completion.cost > 4000e-6

    run(test())


def test_an_error_in_a_stream_keeps_its_kind() -> None:
    async def test() -> None:
        async def refuse(request: web.Request) -> web.Response:
            text = 'data: {"error": {"code": 400, "message": "too long"}}\n\ndata: [DONE]\n\n'
            return web.Response(text=text, content_type="text/event-stream")

        respond = lambda prompt, count: refuse if prompt == "bad" else streamed(good())  # noqa: E731
        async with serving(respond) as server, client_of(server) as client:
            outcomes = await complete_all(client, "bad", "a", "b")
            assert isinstance(outcomes[0], RefusedPromptError)
            assert server.requests["bad"] == 1

    run(test())


@pytest.mark.parametrize(
    "rejection", ["Unrecognized request argument supplied: stream_options", "Streaming is not supported by this model"]
)
def test_a_server_that_refuses_streams_is_asked_for_whole_responses(
    rejection: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server, client_of(server, concurrency=2) as client:
            server._respond = lambda prompt, count: error(400, rejection) if "stream" in server.bodies[-1] else good()
            outcomes = await complete_all(client, "a", "b", "c", "d")
            assert [outcome.text for outcome in outcomes] == ["fine"] * 4
            assert sum("stream" in body for body in server.bodies) <= 2

    caplog.set_level(logging.WARNING)
    run(test())
    assert caplog.text.count("endpoint.stream") == 1


def test_a_stream_without_usage_counts_at_its_worst_cost_and_is_the_last_one_under_a_cap() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server:
            server._respond = lambda prompt, count: (
                streamed(good(), usage=False) if "stream" in server.bodies[-1] else good()
            )
            async with client_of(server, max_spend=1.0, concurrency=4, **PRICES) as client:
                outcomes = await complete_all(client, *"abcdef")
                assert [outcome.text for outcome in outcomes] == ["fine"] * 6
                assert sum("stream" in body for body in server.bodies) == 1
                assert client.spent > 4000e-6
            server._respond = lambda prompt, count: (
                streamed(good(), usage=False) if "stream" in server.bodies[-1] else good(usage=None)
            )
            async with client_of(server, max_spend=1.0, **PRICES) as client:
                outcomes = await complete_all(client, "a", "b", "c")
                assert isinstance(outcomes[2], UserError)
                assert "no token usage" in str(outcomes[2])

    run(test())


def test_a_server_that_ignores_the_request_for_a_stream_is_understood() -> None:
    async def test() -> None:
        async def as_json(request: web.Request) -> web.Response:  # as through a proxy that knows no streams
            response = 'data: {"choices": [{"index": 0, "text": "ok", "finish_reason": "stop"}]}\r\n\r\ndata: [DONE]'
            return web.Response(text=response, content_type="application/json")

        respond = lambda prompt, count: after(0.01, good()) if prompt == "whole" else as_json  # noqa: E731
        async with serving(respond) as server, client_of(server) as client:
            assert [outcome.text for outcome in await complete_all(client, "whole", "events")] == ["fine", "ok"]

    run(test())


def test_a_connection_that_stays_open_after_the_last_event_does_not_delay_the_response() -> None:
    async def test() -> None:
        async def hold(request: web.Request) -> Any:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b'data: {"choices": [{"delta": {"content": "ok"}, "finish_reason": "stop"}]}\n\n')
            await response.write(b"data: [DONE]\n\n")
            await asyncio.sleep(30)
            return response

        async with serving(lambda prompt, count: hold) as server, client_of(server) as client:
            started = time.monotonic()
            assert (await client.complete(messages("hi"), DECODING, 7)).text == "ok"
            assert time.monotonic() - started < 10

    run(test())


USAGE = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}


@pytest.mark.parametrize(
    "usage_event", [{"choices": [], **USAGE}, {"choices": [{"index": 1, "delta": {}, **USAGE}]}, {**USAGE}]
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_may_be_cut_anywhere(size: int, usage_event: dict[str, Any]) -> None:
    events = [
        {"choices": [{"index": 1, "delta": {"content": "zwölf"}}]},
        {"choices": [{"index": 0, "delta": {"reasoning": "hm", "reasoning_content": "hm"}}]},
        {"choices": [{"index": 0, "delta": {"content": "é"}, "finish_reason": "stop"}], "usage": None},
        {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]},
        usage_event,
    ]
    data = "".join(f"event: x\r\ndata: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events).encode()
    body = ResponseBody()
    for start in range(0, len(data), size):
        body.feed(data[start : start + size])
    body.end()
    assert body.is_stream
    assert body.is_complete
    document = json.loads(body.raw())
    assert [choice["message"]["content"] for choice in document["choices"]] == ["é", "zwölf"]
    assert [choice["message"]["reasoning_content"] for choice in document["choices"]] == ["hm", None]
    assert [choice["finish_reason"] for choice in document["choices"]] == ["stop", "length"]
    assert document["usage"] == {"prompt_tokens": 1, "completion_tokens": 2}
