"""A fake OpenAI-compatible server in the test's process, a client for it, and a fake clock."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from plad_dist.config import Decoding, Endpoint
from plad_dist.sampling.endpoint.client import EndpointClient

DECODING = Decoding(max_tokens=20)
KEY = "sk-proj-AbCdEf0123456789XyZ"
PRICES = {"input_price": 10.0, "output_price": 100.0}


class FakeTime:
    """Clock whose seconds pass only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        due = self.now + seconds
        await asyncio.sleep(min(seconds, 0.002))
        self.now = max(self.now, due)


class FakeServer:
    """Server that responds with `respond(prompt, count)`, and records its requests.

    `count` is the number of requests with that prompt so far, this one included. `respond` returns
    a JSON body, an HTTP response, or a coroutine function of the HTTP request that returns either.
    """

    def __init__(self, respond: Callable[[str, int], Any], clock: Callable[[], float]) -> None:
        self._respond, self._clock = respond, clock
        self.bodies: list[dict[str, Any]] = []
        self.requests: Counter[str] = Counter()
        self.request_times: list[float] = []
        self.completed = 0
        self.in_flight = self.most_in_flight = 0
        self.models: Callable[[], web.Response] = lambda: web.json_response({"data": []})
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        self.bodies.append(body)
        self.requests[prompt] += 1
        self.request_times.append(self._clock())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            response = self._respond(prompt, self.requests[prompt])
            if callable(response):
                response = await response(request)
            if isinstance(response, web.StreamResponse):
                return response
            self.completed += 1
            return web.json_response(response)
        finally:
            self.in_flight -= 1

    async def list_models(self, request: web.Request) -> web.Response:
        return self.models()


@asynccontextmanager
async def serving(
    respond: Callable[[str, int], Any],
    clock: Callable[[], float] = time.monotonic,
    certificate: ssl.SSLContext | None = None,
) -> AsyncIterator[FakeServer]:
    server = FakeServer(respond, clock)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_get("/v1/models", server.list_models)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate)
    await site.start()
    server.url = f"{'https' if certificate else 'http'}://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client_of(
    server: FakeServer, fake_time: FakeTime | None = None, spent: float = 0.0, **settings: Any
) -> AsyncIterator[EndpointClient]:
    """Open a client with these keys of the config; without `fake_time` it waits in real time."""
    endpoint = Endpoint(**({"url": server.url, "model": "m", "timeout_s": 60.0} | settings))
    timing: dict[str, Any] = {"clock": fake_time.clock, "sleep": fake_time.sleep} if fake_time else {}
    client = EndpointClient(endpoint, spent=spent, jitter=lambda: 0.9, **timing)
    try:
        yield client
    finally:
        await client.close()


def good(
    text: Any = "fine", finish_reason: str | None = "stop", usage: Any = (10, 5), **message: Any
) -> dict[str, Any]:
    """Return the body of a proper response."""
    body: dict[str, Any] = {"choices": [{"message": {"content": text} | message, "finish_reason": finish_reason}]}
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    if usage is not None:
        body["usage"] = usage
    return body


def error(status: int, message: str = "no", **headers: str) -> web.Response:
    """Return an error response; `Retry_After` stands for the header `Retry-After`."""
    renamed = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.json_response({"error": {"message": message}}, status=status, headers=renamed)


def after(seconds: float, response: Any) -> Callable[[web.Request], Awaitable[Any]]:
    """Delay a response by real seconds."""

    async def delayed(request: web.Request) -> Any:
        await asyncio.sleep(seconds)
        return response

    return delayed


def streamed(
    body: dict[str, Any], gap_s: float = 0.0, pieces: int = 3, *, usage: bool = True, last: str | None = "[DONE]"
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Send a response as server-sent events, with a silence of real seconds before each.

    Args:
        pieces: number of deltas into which each choice is cut.
        last: data of the last event; None to close the connection instead.
    """
    events: list[Any] = [{"choices": [], "prompt_filter_results": []}]
    for index, choice in enumerate(body["choices"]):
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
        for name, text in choice["message"].items():
            if isinstance(text, str):
                size = max(1, -(-len(text) // pieces))
                deltas += [{name: text[start : start + size]} for start in range(0, len(text), size)]
            elif text is not None:
                deltas.append({name: text})
        events += [{"choices": [{"index": index, "delta": delta, "finish_reason": None}]} for delta in deltas]
        if last is not None:
            events.append({"choices": [{"index": index, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if usage and "usage" in body:
        events.append({"choices": [], "usage": body["usage"]})

    async def send(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in [*map(json.dumps, events), *([last] if last else [])]:
            await asyncio.sleep(gap_s)
            data = f": comment\n\ndata: {event}\n\n".encode()
            await response.write(data[:9])  # lines and characters may be cut anywhere
            await response.write(data[9:])
        if last is None:
            assert request.transport is not None
            request.transport.close()
        return response

    return send


async def cut(request: web.Request) -> web.StreamResponse:
    """Close the connection in the middle of the body."""
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices": [{"mess')
    assert request.transport is not None
    request.transport.close()
    return response


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def complete_all(client: EndpointClient, *prompts: str) -> list[Any]:
    """Return the outcome of each prompt, a completion or an exception."""
    calls = (client.complete(messages(prompt), DECODING, 1) for prompt in prompts)
    return await asyncio.gather(*calls, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def assert_rate(times: list[float], amounts: list[float], per_minute: float) -> None:
    """Assert that no window of 60 seconds exceeds the rate, rounded up."""
    for index, start in enumerate(times):
        window = sum(amount for at, amount in zip(times[index:], amounts[index:], strict=True) if at < start + 60)
        assert window <= math.ceil(per_minute), start
