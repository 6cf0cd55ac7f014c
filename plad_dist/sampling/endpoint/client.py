"""The client of an OpenAI-compatible server: nothing asked twice without need, nothing spent above the cap, no key shown.

A request waits for a free slot, for room under the cap, and for its turn under the rates; then it is tried until it is
answered, refused for good, or the server has been down for too long. An outage makes no error rows: a prompt is only given
up when others were answered while it failed. Where no others are under way, a short question of our own takes their part.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NoReturn

from plad_dist.config import Decoding, Endpoint
from plad_dist.errors import UserError
from plad_dist.sampling.backend import RefusedPromptError
from plad_dist.sampling.endpoint.connection import Connection
from plad_dist.sampling.endpoint.rates import Budget, Outage, Pace, TokenEstimate, backoff_s
from plad_dist.sampling.endpoint.reply import Failure, Reply, Usage

Prompt = list[dict[str, str]] | str

_OURS = ("model", "messages", "prompt", "stream", "n", "best_of")
_TEMPLATE_TOKENS = 256  # a server's chat template may add so many to a prompt, its own system prompt for example
_CANARY = "Say ok."
_FEW_CALLS = 8  # under way, when nobody else can tell a bad prompt from an outage
_CHECK_TRIES = 3
_MAY_BE_THE_PROMPT = (403, 404, 405, 410)


class EndpointDownError(RuntimeError):
    """The server has answered nothing for too long. What is answered is kept."""


class SpendingCapReached(RuntimeError):
    """The next request could cost more than is left under the cap. What is answered is kept."""


class ClientClosedError(RuntimeError):
    """The client asks nothing more. What is answered is kept."""


@dataclass(frozen=True, slots=True)
class EndpointAnswer:
    """One response. `cost` includes failed tries that the server billed or may have billed."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cost: float
    logprob: None = None


@dataclass(slots=True)
class _Request:
    """A prompt as it is sent, and what became of it so far.

    Attributes:
        worst: what one try may cost; `cost` is what all tries did.
        failures: failed tries; `throttled` is the number of those that came too fast, since `throttled_at`.
        answered_before: requests of this client that had succeeded when this one first failed, None until then.
    """

    body: bytes
    decoding: Decoding
    seed: int
    prompt_bytes: int
    max_tokens: int
    worst: float
    cost: float = 0.0
    failures: int = 0
    throttled: int = 0
    throttled_at: float = 0.0
    answered_before: int | None = None


class EndpointClient:
    """Asks one server. Use it in one event loop and close it. It has the key of its connection, so it is not pickled.

    Args:
        spent: what earlier runs have spent of `max_spend`.
        clock: monotonic seconds; `sleep` and `jitter` (random numbers in [0, 1)) belong to the waiting between tries.

    Attributes:
        requests: requests that were sent, `retries` tries after the first of one prompt.
        prompt_tokens: as the server reported them, or estimated; `completion_tokens` alike.
        usage_missing: answers for which the server did not report them.

    Raises:
        UserError: `extra_body` sets what the run sets, or takes away what the cap needs.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        _check_extra_body(endpoint)
        self._endpoint, self._clock, self._sleep, self._jitter = endpoint, clock, sleep, jitter
        self._connection = Connection(endpoint)
        self._pace = Pace(endpoint.requests_per_minute, endpoint.tokens_per_minute, clock())
        self._estimate = TokenEstimate()
        self._outage = Outage(endpoint.give_up_after_s)
        self._budget = Budget(endpoint.max_spend, endpoint.input_price, endpoint.output_price, spent)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._turn, self._canary_turn, self._settled = asyncio.Lock(), asyncio.Lock(), asyncio.Event()
        self._calls = self._posted = 0  # prompts under way, and requests at the server
        self._closing = False
        self._to_mend: str | None = None
        self.requests = self.retries = 0
        self.prompt_tokens = self.completion_tokens = self.usage_missing = 0

    def __repr__(self) -> str:
        return f"EndpointClient({self._endpoint.url}, {self._endpoint.model})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("a client holds a key and is not pickled; make one where it is used")

    @property
    def spent(self) -> float:
        """What is spent, by earlier runs too."""
        return self._budget.spent

    # -- what the sampler calls

    async def check(self) -> str | None:
        """Look for what the user must mend before anything is paid: the key, the address. None where all is well."""
        if problem := self._connection.key_problem():
            return f"{self._endpoint.url}: {problem}"
        failure = None
        for tried in range(_CHECK_TRIES):
            if tried:
                await self._sleep(backoff_s(tried + 1, self._jitter()))
            failure = await self._connection.look()
            if failure is None or failure.kind == "mend":
                break
        return self._advice(failure) if failure else None

    async def complete(self, prompt: Prompt, decoding: Decoding, seed: int) -> EndpointAnswer:
        """Draw one response to messages (`api: chat`) or to a rendered text (`api: completions`).

        Raises:
            RefusedPromptError: the server does not answer this prompt, while it answers others.
            EndpointDownError: no answer to any request for `give_up_after_s`.
            SpendingCapReached: the request might exceed `max_spend`, and none is under way that could leave room.
            ClientClosedError: the client was closed before the request was sent.
            UserError: key, address, model or account must be mended.

        These but the first have an attribute `cost`: what failed tries of this prompt cost or may have cost.
        """
        request = self._request(prompt, decoding, seed)
        self._calls += 1
        try:
            while isinstance(outcome := await self._attempt(request), Failure):
                if request.answered_before is None:
                    request.answered_before = self._outage.successes
                await self._after(outcome, request)
                self.retries += 1
            return EndpointAnswer(outcome.text, outcome.finish_reason, *self._usage(outcome, request), request.cost)
        except (ClientClosedError, EndpointDownError, SpendingCapReached, UserError) as error:
            error.cost = request.cost  # type: ignore[union-attr]
            raise
        finally:
            self._calls -= 1
            if not self._calls:
                self._outage.rest()

    async def close(self, drain_s: float = 0.0) -> None:
        """Ask nothing more, wait at most so long for the answers under way, which are paid for, and give back the connections."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._posted:
                    self._settled.clear()
                    await self._settled.wait()
        await self._connection.close()

    # -- one prompt

    async def _after(self, failure: Failure, request: _Request) -> None:
        """Return when a failed request is to be tried again; raise where it is not."""
        now = self._clock()
        match failure.kind:
            case "mend":
                # A firewall before the server may refuse one prompt as a server refuses a key.
                if failure.status not in _MAY_BE_THE_PROMPT or not self._outage.successes:
                    raise self._must_mend(failure)
                await self._refuse_if_others_are_answered(failure, request, self._outage.successes)
            case "refused":
                if failure.status < 400:
                    raise RefusedPromptError(f"{self._endpoint.model}: {failure.text}", request.cost)
                await self._refuse_if_others_are_answered(failure, request, answered_before=0)
            case "throttled":
                request.throttled += 1
                request.throttled_at = request.throttled_at or now
                if now - request.throttled_at > self._endpoint.give_up_after_s:
                    await self._give_up_if_others_succeed(failure, request)
                self._pace.pause(now + (failure.retry_after_s or backoff_s(request.throttled, self._jitter())))
            case "retry":
                request.failures += 1
                self._pace.pause(now + (failure.retry_after_s or 0.0))
                if request.failures > self._endpoint.max_retries:
                    await self._give_up_if_others_succeed(failure, request)
                left = max(0.0, self._outage.left(self._clock()))
                await self._sleep(min(left, backoff_s(request.failures, self._jitter())))

    async def _refuse_if_others_are_answered(self, failure: Failure, request: _Request, answered_before: int) -> None:
        if await self._others_are_answered(request, answered_before):
            raise RefusedPromptError(f"{self._endpoint.model}: {failure.text}", request.cost)
        request.failures += 1  # the server has just broken down: nothing is known of the prompt
        await self._sleep(backoff_s(request.failures, self._jitter()))

    async def _give_up_if_others_succeed(self, last: Failure, request: _Request) -> None:
        assert request.answered_before is not None
        if self._calls <= _FEW_CALLS:
            await self._others_are_answered(request, request.answered_before)
        if self._outage.successes > request.answered_before:
            tries = request.failures + request.throttled
            raise RefusedPromptError(
                f"{self._endpoint.model}: no usable answer in {tries} tries while others had one; the last: {last.text}",
                request.cost,
            )

    async def _others_are_answered(self, request: _Request, answered_before: int) -> bool:
        """Whether others have succeeded, or else a short question, asked in the way of a request that failed, does.

        Raises :class:`UserError` where even that is refused: then it is not the prompt.
        """
        async with self._canary_turn:
            if self._outage.successes > answered_before:
                return True
            prompt: Prompt = [{"role": "user", "content": _CANARY}] if self._endpoint.api == "chat" else _CANARY
            canary = self._request(prompt, request.decoding, request.seed)
            outcome = await self._attempt(canary)
        request.cost += canary.cost
        if isinstance(outcome, Failure) and outcome.kind in ("refused", "mend"):
            raise self._must_mend(outcome)
        return not isinstance(outcome, Failure)

    # -- one try

    async def _attempt(self, request: _Request) -> Reply | Failure:
        """Send a request once, when it may go, and account for it: at worst where nobody knows what it cost."""
        async with self._slots:
            while not self._budget.reserve(request.worst):
                if not self._budget.in_flight:
                    raise self._cap_reached(request)
                self._settled.clear()
                await self._settled.wait()
            cost: float | None = 0.0
            try:
                tokens = await self._wait_for_turn(request)
                cost = None  # from here on the server may bill it, whatever becomes of us
                outcome = await self._post(request)
                cost = self._account(outcome, request, tokens)
            finally:
                request.cost += self._budget.settle(request.worst, cost)
                self._settled.set()
        return outcome

    async def _wait_for_turn(self, request: _Request) -> float:
        """Wait until the rates and the server let a request go. Returns the tokens that were taken for it."""
        tokens = self._estimate.tokens(request.prompt_bytes, request.max_tokens)
        async with self._turn:
            while True:
                if self._closing:
                    raise ClientClosedError(f"{self._endpoint.url}: stopped")
                if self._to_mend is not None:
                    raise UserError(self._to_mend)
                now = self._clock()
                left, wait = self._outage.left(now), self._pace.wait(tokens, now)
                if left <= 0 or self._pace.pause_left(now) > self._endpoint.give_up_after_s:
                    raise self._down(now)
                if wait <= 0:
                    self._pace.take(tokens)
                    return tokens
                await self._sleep(min(wait, left))

    async def _post(self, request: _Request) -> Reply | Failure:
        self.requests += 1
        self._posted += 1
        try:
            outcome = await self._connection.post(request.body, request.max_tokens)
        finally:
            self._posted -= 1
        if isinstance(outcome, Reply) and outcome.usage is None and self._budget.cap is not None:
            text = "the server reports no token usage, without which endpoint.max_spend cannot be kept"
            return Failure("mend", text, 200, usage=None)
        return outcome

    def _account(self, outcome: Reply | Failure, request: _Request, tokens: float) -> float | None:
        """Remember what a request tells of the server and of tokens. Returns its cost, None where nobody knows."""
        if isinstance(outcome, Failure):
            if outcome.kind in ("retry", "throttled"):
                self._outage.failure(outcome.text, self._clock())
            usage = outcome.usage
            if usage is None:
                return None
        else:
            self._outage.success()
            usage = self._usage(outcome, request)
            if outcome.usage is None:
                self.usage_missing += 1
            else:
                self._estimate.learn(request.prompt_bytes, request.max_tokens, *usage)
        self.prompt_tokens += usage[0]
        self.completion_tokens += usage[1]
        self._pace.correct(sum(usage) - tokens)
        return self._budget.cost(*usage)

    def _usage(self, reply: Reply, request: _Request) -> Usage:
        """The tokens of a reply as reported, otherwise as estimated."""
        if reply.usage is not None:
            return reply.usage
        written = self._estimate.prompt_tokens(len(reply.text.encode()))
        return round(self._estimate.prompt_tokens(request.prompt_bytes)), min(round(written) + 1, request.max_tokens)

    def _request(self, prompt: Prompt, decoding: Decoding, seed: int) -> _Request:
        chat = self._endpoint.api == "chat"
        assert isinstance(prompt, list) == chat, "messages for api: chat, text for api: completions"
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages" if chat else "prompt": prompt,
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "n": 1,
            "seed": seed,
        }
        if decoding.stop:
            body["stop"] = decoding.stop
        if decoding.top_k:
            body["top_k"] = decoding.top_k
        if decoding.min_p:
            body["min_p"] = decoding.min_p
        body = {key: value for key, value in (body | self._endpoint.extra_body).items() if value is not None}
        limits = [body[key] for key in ("max_tokens", "max_completion_tokens") if isinstance(body.get(key), int)]
        max_tokens = max(limits, default=decoding.max_tokens)
        # A token has at least one byte.
        size = len(json.dumps(prompt, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        worst = self._budget.cost(size + _TEMPLATE_TOKENS, max_tokens)
        return _Request(json.dumps(body).encode(), decoding, seed, size, max_tokens, worst)

    # -- what the user reads

    def _must_mend(self, failure: Failure) -> UserError:
        """The error that this and every later request ends with."""
        self._to_mend = f"{self._advice(failure)} What is answered is kept; run again then."
        return UserError(self._to_mend)

    def _advice(self, failure: Failure) -> str:
        """What the user must mend, and where."""
        endpoint, said = self._endpoint, f"({failure.text})"
        match failure.status:
            case 401 | 403 if endpoint.api_key_env:
                advice = f"the server refuses the key in {endpoint.api_key_env} {said}. Set one that may use the model."
            case 401 | 403:
                advice = f"the server wants a key {said}. Name the variable that holds it in endpoint.api_key_env."
            case 402 | 429:
                advice = f"the account at the server is exhausted {said}. Mend its billing or its limits."
            case 404 | 405 | 410:
                advice = f"no model {endpoint.model!r}, or no such API at this address {said}. Correct endpoint.model or .url."
            case status if 300 <= status < 400:
                advice = f"the server redirects {said}, where the key must not follow. Give the final address in endpoint.url."
            case 200:
                advice = f"{failure.text}. Remove the cap, or use a server that reports it."
            case status if 400 <= status < 500:
                advice = f"the server refuses even a short question {said}. Correct sampling.*, endpoint.model or .extra_body."
            case _:
                advice = f"the server cannot be used {said}. Start it, or correct endpoint.url."
        return f"{endpoint.url}: {advice}"

    def _down(self, now: float) -> EndpointDownError:
        outage, pause = self._outage, self._pace.pause_left(now)
        lasting = now - (now if outage.since is None else outage.since)
        if outage.left(now) > 0:
            what = f"the server asks for a pause of {pause:.0f} s"
        else:
            since = datetime.now().astimezone() - timedelta(seconds=lasting)
            what = f"nothing answered since {since:%Y-%m-%d %H:%M:%S} ({lasting:.0f} s, {outage.failures} failures)"
        return EndpointDownError(
            f"{self._endpoint.url}: {what}, the last: {outage.last}. What is answered is kept; run again when the server "
            "works, or raise endpoint.give_up_after_s."
        )

    def _cap_reached(self, request: _Request) -> SpendingCapReached:
        budget = self._budget
        assumed = (
            f", {budget.assumed:.4g} of it assumed for {budget.lost} requests whose answer was lost"
            if budget.lost
            else ""
        )
        return SpendingCapReached(
            f"{self._endpoint.url}: {budget.spent:.6g} of {budget.cap:g} spent{assumed}; the next request may cost up to "
            f"{request.worst:.4g}. What is answered is kept; raise endpoint.max_spend to go on."
        )


def _check_extra_body(endpoint: Endpoint) -> None:
    extra = endpoint.extra_body
    for name in _OURS:
        if name in extra:
            raise UserError(f"endpoint.extra_body.{name}: is set by the run itself")
    no_limit = extra.get("max_tokens", 0) is None and not isinstance(extra.get("max_completion_tokens"), int)
    if endpoint.max_spend is not None and no_limit:
        raise UserError("endpoint.extra_body: takes max_tokens away, without which max_spend cannot be kept")
