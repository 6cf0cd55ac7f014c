"""An OpenAI-compatible server in the test's own process that misbehaves as told, and time that passes when told."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from plad_dist.config import Decoding, Endpoint
from plad_dist.sampling.endpoint.client import EndpointClient

DECODING = Decoding(max_tokens=20)


class FakeTime:
    """Seconds that pass only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        due = self.now + seconds
        await asyncio.sleep(min(seconds, 0.002))
        self.now = max(self.now, due)


class Server:
    """A server that answers as `behave(prompt, nth request with this prompt)` says, and remembers what it was asked."""

    def __init__(self, behave: Callable[[str, int], Any], clock: Callable[[], float]) -> None:
        self._behave, self._clock = behave, clock
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.at: list[float] = []
        self.answered = 0
        self.in_flight = self.most_in_flight = 0
        self.models: Callable[[], web.Response] = lambda: web.json_response({"data": []})
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        self.bodies.append(body)
        self.asked[prompt] += 1
        self.at.append(self._clock())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = self._behave(prompt, self.asked[prompt])
            if callable(answer):
                answer = await answer(request)
            if isinstance(answer, web.StreamResponse):
                return answer
            self.answered += 1
            return web.json_response(answer)
        finally:
            self.in_flight -= 1

    async def list_models(self, request: web.Request) -> web.Response:
        return self.models()


@asynccontextmanager
async def serving(
    behave: Callable[[str, int], Any], clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[Server]:
    server = Server(behave, clock)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_get("/v1/models", server.list_models)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def asking(
    server: Server, fake: FakeTime | None = None, spent: float = 0.0, **settings: Any
) -> AsyncIterator[EndpointClient]:
    endpoint = Endpoint(**({"url": server.url, "model": "m", "timeout_s": 60.0} | settings))
    waiting: dict[str, Any] = {"clock": fake.clock, "sleep": fake.sleep} if fake else {}
    client = EndpointClient(endpoint, spent=spent, jitter=lambda: 0.9, **waiting)
    try:
        yield client
    finally:
        await client.close()


def good(
    text: str = "fine", finish_reason: str | None = "stop", usage: Any = (10, 5), **message: Any
) -> dict[str, Any]:
    """A proper answer."""
    body: dict[str, Any] = {"choices": [{"message": {"content": text} | message, "finish_reason": finish_reason}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return body


def error(status: int, message: str = "no", **headers: str) -> web.Response:
    renamed = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.json_response({"error": {"message": message}}, status=status, headers=renamed)


def after(seconds: float, answer: Any) -> Callable[[web.Request], Awaitable[Any]]:
    async def later(request: web.Request) -> Any:
        await asyncio.sleep(seconds)
        return answer

    return later


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


async def ask(client: EndpointClient, *prompts: str) -> list[Any]:
    """The outcome of each prompt, an answer or an exception."""
    calls = (client.complete(messages(prompt), DECODING, 1) for prompt in prompts)
    return await asyncio.gather(*calls, return_exceptions=True)


async def until(met: Callable[[], bool]) -> None:
    while not met():
        await asyncio.sleep(0.005)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def assert_rate(at: list[float], amounts: list[float], per_minute: float) -> None:
    for index, start in enumerate(at):
        window = sum(amount for time_, amount in zip(at[index:], amounts[index:], strict=True) if time_ < start + 60)
        assert window <= math.ceil(per_minute), start
