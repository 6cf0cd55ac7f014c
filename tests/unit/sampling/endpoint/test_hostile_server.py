"""A server may send anything: each response is bounded in size, time, depth and numbers."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from plad_dist.config import Decoding
from plad_dist.sampling.endpoint.batch_api import BatchApi
from plad_dist.sampling.endpoint.batch_results import lines_of
from plad_dist.sampling.endpoint.connection import Connection
from plad_dist.sampling.endpoint.redaction import redacted
from plad_dist.sampling.endpoint.reply import Failure, Reply, read_replies
from plad_dist.sampling.endpoint.request import make_request
from plad_dist.sampling.endpoint.retry import retry_after_s
from plad_dist.sampling.endpoint.stream import ResponseBody
from plad_dist.sampling.endpoint.usage import Usage, read_usage
from tests.fake_endpoint import KEY, Endpoint, error, good, messages, run, serving

MIB = 1 << 20
Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


def post(respond: Any, max_tokens: int = 1, models: Any = None, **settings: Any) -> Any:
    """Return the outcome of one request to a server that responds like this."""
    outcomes: list[Any] = []

    async def test() -> None:
        async with serving(lambda prompt, count: respond) as server:
            if models is not None:
                server.models = models
            endpoint = Endpoint(**({"url": server.url, "model": "m", "timeout_s": 20.0} | settings))
            connection = Connection(endpoint)
            try:
                if models is not None:
                    outcomes.append((await connection.check(), await connection.list_models()))
                    return
                request = make_request(endpoint, messages("hi"), Decoding(max_tokens=max_tokens), 1)
                outcomes.append(await connection.post(request))
            finally:
                await connection.close()

    run(test())
    return outcomes[0]


def sending(*pieces: bytes, times: int = 1, gap_s: float = 0.0, status: int = 200, **headers: str) -> Respond:
    async def send(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})
        await response.prepare(request)
        for _ in range(times):
            for piece in pieces:
                await response.write(piece)
                if gap_s:
                    await asyncio.sleep(gap_s)
        return response

    return send


# -- size


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_bomb_is_not_unpacked(encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    bomb = pack(b'{"a": "' + b"x" * (150 * MIB), 1)
    tracemalloc.start()
    try:
        outcome = post(sending(bomb, Content_Encoding=encoding))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.usage) == ("transient", None)
    assert "too large" in outcome.text
    assert peak < 64 * MIB


@pytest.mark.parametrize(
    "piece",
    [b"x" * MIB, b"data: " + b"x" * MIB, b"data: {}\n\n" * 100_000, b": wait\n" * 100_000, b"data: x\n" * 99_999],
)
def test_a_body_without_an_end_is_given_up(piece: bytes) -> None:
    started = time.process_time()
    outcome = post(sending(piece, times=12))
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.usage) == ("transient", None)
    assert time.process_time() - started < 5


def test_a_response_may_be_as_large_as_its_tokens() -> None:
    (reply,) = post(sending(json.dumps(good("long " * 400_000)).encode()), max_tokens=400_000)
    assert isinstance(reply, Reply)
    assert len(reply.text) == 2_000_000


def test_a_large_error_keeps_its_status() -> None:
    outcome = post(sending(b"busy " * MIB, status=429))
    assert (outcome.kind, outcome.status) == ("throttled", 429)
    assert outcome.text.startswith("HTTP 429: busy busy")
    assert len(outcome.text) < 320


def test_a_stream_of_single_bytes_is_read_in_linear_time() -> None:
    body, started = ResponseBody(), time.process_time()
    body.feed(b"data: ")
    for _ in range(300_000):
        body.feed(b"x")
    assert time.process_time() - started < 2.0


# -- time


def test_a_server_that_drips_is_given_up() -> None:
    for first in (b'{"choices": [', b"data: {}\n\n", b" "):
        started = time.perf_counter()
        outcome = post(sending(first, b" ", times=1000, gap_s=0.05), timeout_s=0.3)
        assert isinstance(outcome, Failure)
        assert "no complete response within 2.2 s" in outcome.text
        assert outcome.usage is None
        assert time.perf_counter() - started < 5


def test_a_drip_in_the_list_of_models_is_given_up() -> None:
    started = time.perf_counter()
    outcome = post(sending(b"x"), models=lambda: web.Response(status=500, body=drip()), timeout_s=0.3)
    assert isinstance(outcome[0], Failure)
    assert time.perf_counter() - started < 35


async def drip() -> Any:
    for _ in range(100):
        yield b" "
        await asyncio.sleep(0.05)


# -- texts


@pytest.mark.parametrize(
    "text",
    ["://a" * 16_000, "://a@" * 16_000, "x y " * 5_000_000, "sk-" * 500_000, "bearer " * 500_000, "\x1b]" * 500_000],
)
def test_a_text_of_any_length_is_redacted_at_once(text: str) -> None:
    for body in (json.dumps({"error": {"message": text}}).encode(), text.encode()):
        started = time.process_time()
        failure = read_replies(400, body, 10, lambda text: redacted(text, KEY))
        assert isinstance(failure, Failure)
        assert len(failure.text) < 320
        assert time.process_time() - started < 1.0
    started = time.process_time()
    redacted(text, KEY)
    assert time.process_time() - started < 0.05


def test_no_part_of_a_key_is_left_where_a_text_is_cut() -> None:
    for padding in range(4050, 4100):
        for text in (" " * padding + KEY, "x " * (padding // 2) + KEY, " " * padding + f"http://me:{KEY}@host"):
            shown = redacted(text, KEY)
            assert not any(KEY[start : start + 4] in shown for start in range(len(KEY) - 4)), shown
    assert redacted(" " * 4080 + "http://me:password@host") in ("...", "http://***...")


def test_what_a_terminal_obeys_is_dropped() -> None:
    assert redacted("bad \x1b]52;c;ZWNobw==\x07 \x1b[2J \x9b31m x\u202ey\x00") == "bad x y".replace(" y", "y")


# -- types, depth and numbers

ODD: list[Any] = [None, True, 0, -1, 1e300, 10**400, "", "x", [], [[]], [None], {}, {"a": []}, {"role": 5}]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_value_of_any_type_in_any_place_is_a_reply_or_a_failure(odd: Any) -> None:
    def documents(value: Any) -> list[Any]:
        if isinstance(value, dict):
            inner = [value | {key: other} for key, member in value.items() for other in documents(member)]
            return [odd, *inner, value | {"extra": odd}]
        if isinstance(value, list):
            return [odd, *([other] for other in documents(value[0]))]
        return [odd]

    part = {"type": "text", "text": "a"}
    thought = {"type": "thinking", "thinking": [part]}
    usage = {
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "total_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    message = {
        "content": [part], "refusal": "a", "tool_calls": [{}], "reasoning_content": "a", "reasoning": "a",
        "function_call": {},
    }  # fmt: skip
    whole = {"choices": [{"message": message, "finish_reason": "stop", "index": 0}], "usage": usage}
    plain = {"choices": [{"text": "a", "message": {"content": [thought]}, "finish_reason": "stop"}]}
    failure = {"error": {"message": "a", "code": "503", "type": "a"}, "detail": "a", "message": "a"}
    for document in (*documents(whole), *documents(plain), *documents(failure)):
        raw = json.dumps(document).encode()
        for status in (200, 400, 429, 500):
            outcome = read_replies(status, raw, 10, redacted)
            for item in [outcome] if isinstance(outcome, Failure) else outcome:
                assert isinstance(item, Reply | Failure)
                assert item.usage is None or 0 <= item.usage.total < 2**31
    event = {"choices": [{"delta": message | {"content": "a"}, "index": 0, "finish_reason": "stop"}], "usage": usage}
    for document in (*documents(event), *documents(failure)):
        body = ResponseBody()
        body.feed(b"data: " + json.dumps(event).encode() + b"\n\ndata: " + json.dumps(document).encode() + b"\n\n")
        body.end()
        read_replies(200, body.raw(), 10, redacted)


@pytest.mark.parametrize("depth", [65, 500, 990, 100_000])
def test_nested_documents_are_failures(depth: int) -> None:
    nested = b'{"choices": ' * depth + b"1" + b"}" * depth
    for raw in (nested, b"[" * depth, b'{"choices": [{"message": {"content": ' + b"[" * depth + b"]" * depth + b"}}]}"):
        for status in (200, 400):
            assert isinstance(read_replies(status, raw, 10, redacted), Failure)
        body = ResponseBody()
        body.feed(b"data: " + raw + b"\n\n")
        body.end()
        assert isinstance(read_replies(200, body.raw(), 10, redacted), Failure)
    assert lines_of(nested) == {}


@pytest.mark.parametrize(
    "count",
    [-1, True, 2**31, 10**9, 10**400, 1e300, float("nan"), float("inf"), "1e300", "9" * 15, "9" * 5000, [], {}, None],
)
def test_an_impossible_number_of_tokens_is_no_report(count: Any) -> None:
    assert read_usage({"prompt_tokens": count, "completion_tokens": 5}) is None
    assert read_usage({"prompt_tokens": 10, "completion_tokens": count}) is None
    details = {
        "prompt_tokens_details": {"cached_tokens": count},
        "completion_tokens_details": {"reasoning_tokens": count},
    }
    report = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": count} | details
    assert read_usage(report) in (Usage(10, 5), Usage(10, 6))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1e300",
        "-5",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 4000,
        "Wed, 99 Foo 9999",
        "x",
        "0",
        "(",
        "1 Jan 10000000000 00:00:00 GMT",
    ],
)
def test_a_pause_is_never_negative_endless_or_a_crash(text: str) -> None:
    pause_s = retry_after_s({"Retry-After": text, "Date": text}, time.time())
    assert pause_s is None or 0 <= pause_s <= 30 * 24 * 3600


# -- lists


def test_odd_lists_of_models_and_batches_are_read_or_refused() -> None:
    for odd in [
        *ODD,
        {"data": [{"id": odd} for odd in ODD]},
        *({"data": odd} for odd in ODD),
        {"data": [{"id": "m"}] * 50_000},
    ]:
        failure, (status, names) = post(sending(b""), models=lambda odd=odd: web.Response(text=json.dumps(odd)))
        assert (failure, status) == (None, 200)
        assert len(names) <= 10_000
    failure, _ = post(sending(b""), models=lambda: error(500, "x" * 100_000))
    assert isinstance(failure, Failure)


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_answers_of_the_batch_interface_are_failures(odd: Any) -> None:
    class Fake:
        answers: list[Any]

        async def call(self, *args: Any, **options: Any) -> bytes:
            return json.dumps(self.answers.pop(0)).encode()

    connection = Fake()
    api = BatchApi(Endpoint(url="http://h/v1", model="m"), connection)  # type: ignore[arg-type]
    batch = {"id": odd, "metadata": {"plad": "token"}, "input_file_id": "f"}
    pages = [
        odd,
        {"data": odd},
        {"data": [odd]},
        {"data": [batch]},
        {"data": [{"metadata": odd, "input_file_id": odd}]},
    ]
    for page in pages:
        connection.answers = [page]
        found = asyncio.run(api.find("token", "f"))
        assert found is None or found == "x" or isinstance(found, Failure)
    connection.answers = [{"has_more": True, "last_id": f"b{number}"} for number in range(2000)]
    assert isinstance(asyncio.run(api.find("token", "f")), Failure)
    connection.answers = [odd]
    assert isinstance(asyncio.run(api.get("b")), dict | Failure)
    assert isinstance(asyncio.run(api.content("../../other?x=")), Failure)
    lines_of(json.dumps(odd).encode())
