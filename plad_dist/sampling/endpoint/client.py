"""The client of an OpenAI-compatible server.

Every try of a prompt takes these steps:

1. Wait for a slot (`concurrency`).
2. Reserve the worst cost under the spending cap (`budget.py`), which storage has granted to this
   client (`account.py`). If only requests in flight stand in the way, wait until they are settled.
3. Wait for the rate limits and the server's pauses (`rates.py`).
4. Send the request (`connection.py`), receive the response in pieces (`stream.py`) and parse it
   (`reply.py`).
5. Settle the reservation at the real cost, or at the worst cost if the response was lost.

The retry policy (`retry.py`) decides whether a failed prompt is sent again, becomes an error row,
or stops the stage. To tell a bad prompt from a bad server, the client may send a probe, a short
prompt of its own. The outage rule (`outage.py`) stops the stage when nothing succeeds for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from plad_dist.config import Decoding, Endpoint
from plad_dist.sampling.backend import Completion, RefusedPromptError
from plad_dist.sampling.endpoint.account import Account
from plad_dist.sampling.endpoint.batch import BatchClient
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.choices import ManyChoices, completions_of
from plad_dist.sampling.endpoint.connection import Connection
from plad_dist.sampling.endpoint.errors import (
    ClientClosedError,
    EndpointBlockedError,
    EndpointStoppedError,
    advice,
    blocked_message,
    endpoint_down,
    field_remedy,
)
from plad_dist.sampling.endpoint.ledger import Ledger
from plad_dist.sampling.endpoint.outage import Outage
from plad_dist.sampling.endpoint.rates import Pace, TokenEstimate
from plad_dist.sampling.endpoint.reply import Failure, Outcome, Reply
from plad_dist.sampling.endpoint.request import CompletionRequest, Prompt, make_request
from plad_dist.sampling.endpoint.retry import (
    AskUser,
    FailureHistory,
    GiveUpIfOthersSucceeded,
    Refuse,
    RefuseIfOthersSucceed,
    Retry,
    RetryPolicy,
    backoff_s,
)
from plad_dist.sampling.endpoint.usage import Usage

logger = logging.getLogger("plad")

_PROBE_TEXT = "Say ok."
_FEW_PROMPTS = 8  # with so few in progress, perhaps none succeeds in time to show that the server works
_CHECK_TRIES = 3


@dataclass(slots=True)
class _Call:
    """One prompt until it has an outcome.

    Attributes:
        worst_cost: what one try may cost.
        cost: what all tries so far cost, including probes.
    """

    request: CompletionRequest
    decoding: Decoding
    seed: int
    worst_cost: float
    cost: float = 0.0
    history: FailureHistory = field(default_factory=FailureHistory)


class EndpointClient:
    """Draws responses from one server. Use a client in one event loop, and close it.

    Args:
        ledger: money that was spent under the same `max_spend`, by all processes; None to count in
            memory.
        spent: money that was spent before, for a client without a ledger.
        clock: monotonic seconds.
        sleep: waits for seconds of that clock.
        jitter: random numbers in [0, 1) for the backoff.

    Attributes:
        requests: requests sent.
        retries: tries after the first one, over all prompts.
        prompt_tokens: billed tokens of prompts, as reported by the server or estimated.
        completion_tokens: billed tokens of responses, as reported by the server or estimated.
        usage_missing: responses for which the server reported no usage.
        batches: draws whole blocks under the same cap.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        ledger: Ledger | None = None,
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._endpoint, self._clock, self._sleep, self._jitter = endpoint, clock, sleep, jitter
        self._connection = Connection(endpoint)
        self._pace = Pace(endpoint.requests_per_minute, endpoint.tokens_per_minute, clock())
        self._token_estimate = TokenEstimate()
        self._policy = RetryPolicy(endpoint.max_retries, endpoint.give_up_after_s)
        self._outage = Outage(endpoint.give_up_after_s)
        self._budget = Budget(endpoint, spent)
        self._account = Account(endpoint, self._budget, ledger, clock)
        self._is_paid = endpoint.max_spend is not None or endpoint.output_price is not None
        self._many_choices = ManyChoices(endpoint)
        self._turn_lock, self._probe_lock = asyncio.Lock(), asyncio.Lock()
        self.batches = BatchClient(endpoint, self._connection, self._budget, self._account, clock, sleep, jitter)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._prompts_in_progress = self._requests_in_flight = 0
        self._unsent: list[float] = []  # worst costs of requests that are reserved and not sent yet
        self._is_closing = self._reports_usage = False
        self._blocked_message: str | None = None
        self.requests = self.retries = 0
        self.prompt_tokens = self.completion_tokens = self.usage_missing = 0

    def __repr__(self) -> str:
        return f"EndpointClient({self._endpoint.url}, {self._endpoint.model})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("a client holds a key and is not pickled; create it where it is used")

    @property
    def events(self) -> int:
        """Pieces of streamed responses and states of batches received so far."""
        return self._connection.events + self.batches.polls

    @property
    def spent(self) -> float:
        """Money spent so far, including by earlier runs."""
        return self._budget.spent

    async def check(self) -> str | None:
        """Return what the user must correct before any money is spent, None if all is well."""
        if problem := self._connection.problem():
            return f"{self._endpoint.url}: {problem}"
        failure = None
        for tries in range(_CHECK_TRIES):
            if tries:
                await self._sleep(backoff_s(tries + 1, self._jitter()))
            failure = await self._connection.check()
            if failure is None or failure.kind == "blocked":
                break
        if failure is None and self._endpoint.mode == "batch":
            return await self.batches.check()
        return advice(self._endpoint, failure) if failure else None

    async def complete(self, prompt: Prompt, decoding: Decoding, seed: int) -> Completion:
        """Draw one response to messages (`api: chat`) or to a rendered text (`api: completions`).

        The cost of the completion includes failed tries that the server billed or may have billed.
        The errors carry that cost in their attribute `cost`.

        Raises:
            RefusedPromptError: the server does not respond to this prompt, but responds to others.
            EndpointDownError: no request succeeded for `give_up_after_s`.
            SpendingCapReached: the request could exceed `max_spend`, and no request in flight could
                leave room for it.
            SpendingStoppedError: the ledger cannot be written, or another command has taken over.
            ClientClosedError: the client was closed before the request was sent.
            EndpointBlockedError: the user must correct the key, the address, the model or the
                account.
        """
        call = self._start_call(prompt, decoding, seed)
        replies = [choice for choice in await self._draw(call) if isinstance(choice, Reply)]
        self._many_choices.note_single()
        (completion,) = self._completions_of(replies[:1], call)
        assert isinstance(completion, Completion)
        return completion

    @property
    def takes_n(self) -> bool:
        """True as long as several responses may be asked for in one request."""
        return self._many_choices.are_possible

    async def complete_many(
        self, prompt: Prompt, decoding: Decoding, seeds: Sequence[int]
    ) -> tuple[list[Completion | RefusedPromptError | None], float]:
        """Draw several responses in one request, with the first seed.

        Returns:
            An outcome for each seed, None if the server has returned none for it, and money that
            was spent without an outcome. Together with the costs of the outcomes, it is all that
            was paid.

        Raises:
            Exception: as :meth:`complete`.
        """
        call = self._start_call(prompt, decoding, seeds[0], len(seeds))
        choices = (await self._draw(call))[: len(seeds)]
        self._many_choices.note_many(len(choices), len(seeds))
        if not any(isinstance(choice, Reply) for choice in choices):
            return [None for _ in seeds], call.cost
        outcomes = self._completions_of(choices, call)
        return outcomes + [None] * (len(seeds) - len(outcomes)), 0.0

    async def _draw(self, call: _Call) -> list[Reply | Failure]:
        """Send the request of a call until it succeeds, and return its choices.

        There are none if the server refuses a request for several: perhaps it refuses only `n`.
        """
        self._prompts_in_progress += 1
        try:
            while isinstance(outcome := await self._try(call), Failure):
                if call.request.n > 1 and outcome.kind == "refused" and outcome.status >= 400:
                    return []
                await self._handle_failure(outcome, call)
                self.retries += 1
            return outcome
        except (EndpointStoppedError, EndpointBlockedError) as error:
            error.cost = call.cost
            raise
        finally:
            self._prompts_in_progress -= 1
            if not self._prompts_in_progress:
                self._outage.end()

    async def is_superseded(self) -> bool:
        """Return True if another command has taken over the run, as far as storage tells."""
        return await self._account.is_superseded()

    async def close(self, drain_s: float = 0.0) -> None:
        """Send nothing more, and disconnect after up to `drain_s` seconds.

        The wait is for the responses in flight, which are paid for.
        """
        self._is_closing = True
        self._account.stop()
        self.batches.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._requests_in_flight:
                    self._account.changed.clear()
                    await self._account.changed.wait()
        await self._connection.close()
        await self._account.close(self._unsent)

    # -- one prompt

    def _completions_of(
        self, choices: Sequence[Reply | Failure], call: _Call
    ) -> list[Completion | RefusedPromptError | None]:
        return completions_of(self._endpoint.model, choices, self._usage_of(choices, call.request), call.cost)

    def _start_call(self, prompt: Prompt, decoding: Decoding, seed: int, n: int = 1) -> _Call:
        request = make_request(self._endpoint, prompt, decoding, seed, n)
        return _Call(request, decoding, seed, self._budget.worst_cost(request.worst_usage))

    async def _handle_failure(self, failure: Failure, call: _Call) -> None:
        """Carry out the policy's decision: return to send the prompt again, or raise."""
        now, successes = self._clock(), self._outage.successes
        call.history.add(failure, successes, now)
        decision = self._policy.decide(failure, call.history, successes, now, self._jitter())
        match decision:
            case AskUser():
                raise self._blocked_error(failure)
            case Refuse():
                raise self._refusal(_reason(failure), call)
            case RefuseIfOthersSucceed():
                if await self._other_prompts_succeed(call, decision.successes):
                    raise self._refusal(_reason(failure), call)
                retry = decision.otherwise
            case GiveUpIfOthersSucceeded():
                self._pace.pause(decision.pause_until)
                if self._prompts_in_progress <= _FEW_PROMPTS:
                    await self._other_prompts_succeed(call, decision.successes)
                if self._outage.successes > decision.successes:
                    tries = f"no usable response in {call.history.tries} tries while other prompts had one"
                    raise self._refusal(f"{tries}; the last failure: {failure.text}", call)
                retry = decision.otherwise
            case Retry():
                retry = decision
        self._pace.pause(retry.pause_until)
        if retry.wait_s:
            limit_s = max(0.0, self._outage.remaining_s(self._clock())) if retry.stops_with_outage else math.inf
            await self._sleep(min(retry.wait_s, limit_s))

    async def _other_prompts_succeed(self, call: _Call, successes: int) -> bool:
        """Return True if more than `successes` requests have succeeded, or if a probe does.

        The probe is a short prompt with the decoding of the failed one.

        Raises:
            EndpointBlockedError: the server refuses even the probe, so the prompt is not at fault.
        """
        async with self._probe_lock:
            if self._outage.successes > successes:
                return True
            is_chat = self._endpoint.api == "chat"
            prompt: Prompt = [{"role": "user", "content": _PROBE_TEXT}] if is_chat else _PROBE_TEXT
            probe = self._start_call(prompt, call.decoding, call.seed)
            outcome = await self._try(probe)
        call.cost += probe.cost
        if isinstance(outcome, Failure) and outcome.kind in ("refused", "blocked"):
            raise self._blocked_error(outcome)
        return not isinstance(outcome, Failure)

    def _refusal(self, reason: str, call: _Call) -> RefusedPromptError:
        return RefusedPromptError(f"{self._endpoint.model}: {reason}", call.cost)

    def _blocked_error(self, failure: Failure) -> EndpointBlockedError:
        """Return the error with which this and every later request ends."""
        self._blocked_message = blocked_message(self._endpoint, failure)
        return EndpointBlockedError(self._blocked_message)

    # -- one try

    async def _try(self, call: _Call) -> Outcome:
        """Send the request of a call once, as soon as it may be sent, and account for its cost."""
        async with self._slots:
            await self._account.reserve(call.worst_cost)
            self._unsent.append(call.worst_cost)
            cost: float | None = 0.0
            try:
                try:
                    estimated_tokens = await self._wait_for_turn(call.request)
                finally:
                    self._unsent.remove(call.worst_cost)
                cost = None  # the server may bill the request from here on, even if this task is cancelled
                outcome = await self._send(call.request)
                cost = self._record(outcome, call.request, estimated_tokens)
            finally:
                call.cost += self._settle(call, cost)
                self._account.changed.set()
            await self._account.adjust()
        return outcome

    def _settle(self, call: _Call, cost: float | None) -> float:
        """Settle the reservation of a try, and warn the first time that it was too small."""
        is_first = not self._budget.excess
        counted = self._budget.settle(call.worst_cost, cost)
        if cost is not None:
            self._budget.learn(call.worst_cost, cost)
        if is_first and self._budget.excess and self._budget.cap is not None:
            logger.warning(
                "%s: a response cost %.4g, although its prompt and max_tokens allow %.4g: the server bills tokens "
                "beyond them, such as reasoning. endpoint.max_spend holds to one request; from here on each request "
                "reserves as much more as any has cost",
                self._endpoint.url,
                counted,
                call.worst_cost,
            )
        return counted

    async def _wait_for_turn(self, request: CompletionRequest) -> float:
        """Wait until a request may be sent, and return its estimated tokens."""
        tokens = self._token_estimate.tokens(request.prompt_bytes, request.most_tokens)
        async with self._turn_lock:
            while True:
                await self._account.check_owned()
                if self._is_closing:
                    raise ClientClosedError(f"{self._endpoint.url}: stopped")
                if self._blocked_message is not None:
                    raise EndpointBlockedError(self._blocked_message)
                now = self._clock()
                remaining_s, wait_s = self._outage.remaining_s(now), self._pace.wait_s(tokens, now)
                pause_s = self._pace.pause_remaining_s(now)
                if remaining_s <= 0 or pause_s > self._endpoint.give_up_after_s:
                    raise endpoint_down(self._endpoint, self._outage, pause_s, now)
                if wait_s <= 0:
                    self._pace.take(tokens)
                    return tokens
                await self._sleep(min(wait_s, remaining_s))

    async def _send(self, request: CompletionRequest) -> Outcome:
        self.requests += 1
        self._requests_in_flight += 1
        try:
            outcome = await self._connection.post(request)
        finally:
            self._requests_in_flight -= 1
        if isinstance(outcome, Failure) or not self._is_paid:
            return outcome
        if _reported_usage(outcome, request) is not None:
            self._reports_usage = True
        elif any(isinstance(choice, Reply) and choice.is_streamed for choice in outcome):
            self._connection.stop_streaming("reports no token usage in streams")
        elif self._budget.cap is not None and not self._reports_usage:
            # The response is kept, because it may have been paid for, but it is the last one.
            text = "the server reports no token usage, which endpoint.max_spend requires"
            self._blocked_message = blocked_message(self._endpoint, Failure("blocked", text, 200))
        return outcome

    def _record(self, outcome: Outcome, request: CompletionRequest, estimated_tokens: float) -> float | None:
        """Record an outcome, and return its cost, None if that is unknown."""
        if isinstance(outcome, Failure):
            if outcome.kind in ("transient", "throttled"):
                self._outage.record_failure(outcome.text, self._clock())
            if (billed := request.possible(outcome.usage)) is None:
                return None
            usage = billed
        else:
            self._outage.record_success()
            usage = self._usage_of(outcome, request)
            if _reported_usage(outcome, request) is None:
                self.usage_missing += 1
                if self._is_paid:
                    return None
            else:
                self._token_estimate.learn(
                    request.prompt_bytes, request.most_tokens, usage.prompt_tokens, usage.completion_tokens
                )
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self._pace.correct(usage.total - estimated_tokens)
        return self._budget.cost(usage)

    def _usage_of(self, choices: Sequence[Reply | Failure], request: CompletionRequest) -> Usage:
        """Return the tokens of a request as the server reported them, or else an estimate."""
        if (reported := _reported_usage(choices, request)) is not None:
            return reported
        texts = [choice.text + (choice.reasoning or "") for choice in choices if isinstance(choice, Reply)]
        tokens = [round(self._token_estimate.prompt_tokens(len(text.encode()))) + 1 for text in texts]
        prompt_tokens = round(self._token_estimate.prompt_tokens(request.prompt_bytes))
        return Usage(prompt_tokens, min(sum(tokens), request.most_tokens))


def _reported_usage(choices: Sequence[Reply | Failure], request: CompletionRequest) -> Usage | None:
    return request.possible(next((choice.usage for choice in choices if isinstance(choice, Reply)), None))


def _reason(failure: Failure) -> str:
    """Return why a prompt has no response, with the remedy if a field of the request is refused."""
    return ". ".join(filter(None, [failure.text, field_remedy(failure)]))
