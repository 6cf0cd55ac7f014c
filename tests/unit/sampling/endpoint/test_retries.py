"""Retries: transient failures are retried, and `Retry-After` pauses all requests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from plad_dist.sampling.endpoint.errors import EndpointDownError
from tests.fake_endpoint import (
    DECODING,
    FakeTime,
    after,
    client_of,
    complete_all,
    cut,
    error,
    good,
    messages,
    run,
    serving,
)

_TRANSIENT = {
    "500": error(500),
    "408": error(408),
    "409": error(409),
    "425": error(425),
    "502 in HTML": web.Response(status=502, text="<html>Bad gateway</html>"),
    "hang": after(60, good()),
    "cut": cut,
    "malformed": web.Response(text='{"choices": [', content_type="application/json"),
    "no object": web.json_response([]),
    "no choices": {"usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    "empty choices": {"choices": []},
    "null content and no reason": {"choices": [{"message": {"content": None}, "finish_reason": None}]},
    "aborted": good("half", finish_reason="abort"),
    "error in 200": {"error": {"code": 503, "message": "overloaded"}},
    "error in 200 as text": {"error": {"code": "503", "message": "overloaded"}},
}


@pytest.mark.parametrize("kind", _TRANSIENT)
def test_a_transient_failure_is_retried(kind: str) -> None:
    async def test() -> None:
        respond = lambda prompt, count: _TRANSIENT[kind] if count == 1 else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), timeout_s=2.0) as client:
            completion = await client.complete(messages("hi"), DECODING, 1)
            assert (completion.text, client.requests, client.retries) == ("fine", 2, 1)

    # An aiohttp response can be sent only once, and so it is: the retry gets another one.
    run(test())


@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_a_pause_gets_it_from_all_requests(form: str, status: int) -> None:
    async def test() -> None:
        def respond(prompt: str, count: int) -> Any:
            date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
            pause = "30" if form == "seconds" else date
            return error(status, Retry_After=pause) if (prompt, count) == ("a", 1) else good()

        fake_time = FakeTime()
        async with serving(respond, fake_time.clock) as server, client_of(server, fake_time, concurrency=1) as client:
            assert [completion.text for completion in await complete_all(client, "a", "b", "c")] == ["fine"] * 3
            assert server.request_times[0] == 0
            assert all(28 <= at <= 40 for at in server.request_times[1:]), server.request_times

    run(test())


def test_throttled_requests_do_not_count_as_retries_of_a_prompt() -> None:
    async def test() -> None:
        respond = lambda prompt, count: error(429) if prompt == "a" and count <= 30 else good()  # noqa: E731
        settings = {"max_retries": 0, "give_up_after_s": 1e6}
        async with serving(respond) as server, client_of(server, FakeTime(), **settings) as client:
            completions = await complete_all(client, *("a" if row == 0 else f"b{row}" for row in range(12)))
            assert [completion.text for completion in completions] == ["fine"] * 12

    run(test())


def test_a_pause_longer_than_give_up_after_s_stops_the_stage_at_once() -> None:
    async def test() -> None:
        fake_time = FakeTime()
        async with (
            serving(lambda prompt, count: error(429, Retry_After="86400")) as server,
            client_of(server, fake_time) as client,
        ):
            with pytest.raises(EndpointDownError, match="pause of 86400 s"):
                await client.complete(messages("hi"), DECODING, 1)
            assert fake_time.now == 0

    run(test())
