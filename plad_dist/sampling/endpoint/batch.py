"""Batches: the requests of a block as a file at the provider, answered later at a lower price.

A block is sampled in these steps, and the process may end between any two of them:

1. Claim the block, so that no other process submits its requests, and write the record of a batch
   for which there is money (`batch_record.py`).
2. Upload the requests as a file, and write its name into the record.
3. Reserve the worst cost of the batch in the ledger (`account.py`), look at the claim, and submit
   the batch with the record's token in its metadata. A record of an earlier process that has no
   more than the name of its file may be of a submitted batch, which is looked for first.
4. Write the id of the batch into the record, and poll until the batch has ended.
5. Download its results, replace its worst cost in the ledger by the real cost, put the results into
   the spool, and write into the record that it is settled.

What a batch has not answered, because it expired, was cancelled or had a failure, becomes part of
the next batch of the block.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from plad_dist.config import Endpoint
from plad_dist.data.claims import SupersededError
from plad_dist.sampling.backend import Keep, SampleNumber
from plad_dist.sampling.endpoint.account import Account
from plad_dist.sampling.endpoint.batch_api import BatchApi
from plad_dist.sampling.endpoint.batch_record import BatchLedger, BatchRecord
from plad_dist.sampling.endpoint.batch_results import BatchResults, ResultReader, failure_of, lines_of
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.connection import Connection
from plad_dist.sampling.endpoint.errors import (
    KEPT,
    ClientClosedError,
    EndpointBlockedError,
    EndpointDownError,
    SpendingStoppedError,
    advice,
    blocked_message,
    endpoint_down,
    spending_cap_reached,
)
from plad_dist.sampling.endpoint.outage import Outage
from plad_dist.sampling.endpoint.reply import TOO_LARGE, Failure
from plad_dist.sampling.endpoint.request import CompletionRequest
from plad_dist.sampling.endpoint.retry import backoff_s

logger = logging.getLogger("plad")

_MOST_REQUESTS, _MOST_BYTES = 50_000, 100_000_000  # OpenAI allows 200 MB
_TRIAL = 16  # requests under a cap before any response has shown its cost
_FIRST_POLL_S, _LONGEST_POLL_S, _LOOK_AGAIN_S = 1.0, 60.0, 10.0
_ENDED = ("completed", "failed", "expired", "cancelled", "canceled")
_ABSENT = (404, 405, 501)  # statuses of a server without a batch interface
_T = TypeVar("_T")


@dataclass(slots=True)
class BlockRequests:
    """Requests of a block that have no outcome yet.

    Attributes:
        keep: puts outcomes, and money that brought none, into storage.
        tries: batches in which a request had a failure.
        barren: batches in a row without any outcome.
        full_since: time since which the provider accepts no batch, None if it does.
    """

    ledger: BatchLedger
    pending: dict[SampleNumber, CompletionRequest]
    keep: Keep
    tries: Counter[SampleNumber] = field(default_factory=Counter)
    barren: int = 0
    full_since: float | None = None


@dataclass(slots=True)
class _Batch:
    """A batch on its way.

    Attributes:
        requests: requests of the batch that have no outcome yet.
        may_submit: False if it is only to be looked for.
    """

    record: BatchRecord
    requests: Mapping[SampleNumber, CompletionRequest]
    may_submit: bool = True


class BatchClient:
    """Draws the responses to blocks of prompts through a provider's batch interface.

    Attributes:
        polls: states of batches received, which show that the provider works.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        connection: Connection,
        budget: Budget,
        account: Account,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        jitter: Callable[[], float],
    ) -> None:
        self._endpoint, self._connection = endpoint, connection
        self._budget, self._account = budget, account
        self._clock, self._sleep, self._jitter = clock, sleep, jitter
        self._api, self._outage = BatchApi(endpoint, connection), Outage(endpoint.give_up_after_s)
        self._requests_in_flight, self._opening, self._is_closing = 0, 0, False
        self._unopened: dict[int, float] = {}  # worst costs of batches that the ledger does not have yet, by block
        self._reader = ResultReader(endpoint, budget, connection.redacted)
        self.polls = 0

    def close(self) -> None:
        """Send nothing more. Batches in flight are found again by the next process."""
        self._is_closing = True
        self._account.changed.set()

    async def check(self) -> str | None:
        """Return what the user must correct, None if the provider accepts the key for batches.

        A provider that does not list its batches passes.
        """
        failure = await self._api.check()
        return advice(self._endpoint, failure) if failure is not None and failure.status in (401, 403) else None

    async def draw(self, block: BlockRequests) -> None:
        """Have every pending request of a block answered.

        Batches of an earlier process come first: their requests are not submitted again.

        Raises:
            EndpointDownError: the provider does not answer, or no batch brings a response.
            SpendingCapReached: the next request could exceed `max_spend`.
            ClientClosedError: the client was closed.
            SpendingStoppedError: the ledger cannot be written, or another process has taken over.
            EndpointBlockedError: the user must correct the key, the address, the model or the
                account.
        """
        try:
            await asyncio.to_thread(block.ledger.claim)
            await self.finish(block, may_submit=True)
            while block.pending:
                requests, worst_cost = await self._take_requests(block)
                try:
                    record = await asyncio.to_thread(block.ledger.add, list(requests), worst_cost)
                    if record is not None:
                        await self._run(block, _Batch(record, requests))
                finally:
                    self._requests_in_flight -= len(requests)
                    self._unopened.pop(id(block), None)
                    self._account.changed.set()
                if record is None:
                    await self._sleep(_FIRST_POLL_S)
                    await self.finish(block, may_submit=True)
        except SupersededError as error:
            raise SpendingStoppedError(str(error)) from None

    async def finish(self, block: BlockRequests, *, may_submit: bool) -> None:
        """Take the batches of an earlier process to their end.

        Args:
            may_submit: False to leave out what was not submitted before.
        """
        for record in await asyncio.to_thread(block.ledger.open_records):
            requests = {key: block.pending[key] for key in record.keys if key in block.pending}
            await self._run(block, _Batch(record, requests, may_submit=may_submit))

    async def _take_requests(self, block: BlockRequests) -> tuple[dict[SampleNumber, CompletionRequest], float]:
        """Return as many requests as fit into a batch, and their worst cost.

        As long as batches in flight may leave more room than they need, wait for them.
        """
        while True:
            if self._is_closing:
                raise self._closed()
            await self._account.refresh()
            requests, worst_cost, is_short_of_money = self._fitting(block.pending)
            if requests and not (is_short_of_money and self._budget.reservations):
                self._unopened[id(block)] = worst_cost
                self._requests_in_flight += len(requests)
                return requests, worst_cost
            # A block that waits after a barren batch reserves nothing, but goes on.
            if not self._budget.reservations and not self._requests_in_flight:
                first = next(iter(block.pending.values()))
                raise spending_cap_reached(self._endpoint, self._budget, self._budget.worst_cost(first.worst_usage))
            await self._wait_for_change()

    def _fitting(
        self, pending: Mapping[SampleNumber, CompletionRequest]
    ) -> tuple[dict[SampleNumber, CompletionRequest], float, bool]:
        """Return the first requests that fit, their worst cost, and True if money limits them.

        Under a cap the first batch is small: its bill shows whether the provider bills more than
        the worst cost.
        """
        requests: dict[SampleNumber, CompletionRequest] = {}
        size, worst_cost, room = 0, 0.0, self._account.room - sum(self._unopened.values())
        most = min(_MOST_REQUESTS, _TRIAL * (1 + self._budget.known_responses) - self._requests_in_flight)
        for key, request in pending.items():
            size += len(self._api.line(key, request))
            cost = self._budget.worst_cost(request.worst_usage) + self._budget.excess
            if len(requests) >= most or (requests and size > _MOST_BYTES):
                break
            if worst_cost + cost > room:
                return requests, worst_cost, True
            requests[key] = request
            worst_cost += cost
        return requests, worst_cost, False

    # -- one batch

    async def _run(self, block: BlockRequests, batch: _Batch) -> None:
        """Take a batch through the steps that it has not taken."""
        self._budget.begin_batch()
        try:
            results = await self._results_of(block, batch)
            # Before the results are kept: if the process ends in between, they are read again, and
            # their cost is not counted again.
            await self._account.settle_batch(batch.record.holder, results.cost)
            await block.keep(results.outcomes, results.lost_cost)
            await self._note(block, batch, is_settled=True)
        finally:
            self._budget.end_batch()
            self._account.changed.set()
        for key in results.outcomes:
            block.pending.pop(key, None)
        if not batch.may_submit:
            return
        if results.failure is not None and results.failure.kind != "throttled":
            raise self._blocked(results.failure)
        if results.outcomes:
            block.barren, block.full_since = 0, None
        elif batch.requests:
            await self._handle_barren_batch(block, results.failure)

    async def _results_of(self, block: BlockRequests, batch: _Batch) -> BatchResults:
        """Submit a batch unless it was submitted before, wait for its end, and read its results."""
        # Results are kept all at once: an earlier attempt has done so, after it had settled their
        # cost in the ledger. The cost given here counts only if the samples came in another way.
        if len(batch.requests) < len(batch.record.keys):
            return BatchResults(cost=batch.record.worst_cost)
        batch_id = batch.record.batch_id
        if batch_id is None:
            batch_id = await self._find_or_submit(block, batch)
            if batch_id is None:
                return BatchResults()
            batch.record = await self._note(block, batch, batch_id=batch_id)
        state = await self._wait(batch_id, block.ledger.path(batch.record))
        self._log(block, batch_id, str(state.get("status")))
        content = b""
        for name in ("output_file_id", "error_file_id"):
            if file_id := state.get(name):
                content += await self._download(block, batch, str(file_id)) + b"\n"
        results = self._reader.read(lines_of(content), batch.requests, block.tries)
        if state.get("status") == "failed" and not results.outcomes:
            results.failure = failure_of(state, self._connection.redacted)
        return results

    async def _download(self, block: BlockRequests, batch: _Batch, file_id: str) -> bytes:
        """Return a file of results.

        Raises:
            EndpointBlockedError: it is larger than the results of the batch can be.
        """

        async def download() -> bytes | Failure:
            answer = await self._api.content(file_id, batch.requests.values())
            if isinstance(answer, Failure) and answer.status == TOO_LARGE:
                raise EndpointBlockedError(
                    f"{self._endpoint.url}: file {file_id}, the results of the batch in "
                    f"{block.ledger.path(batch.record)}: {answer.text}, the most that its responses can have. Look at "
                    "it at the provider, or delete that file of the run to submit its requests again, which are then "
                    "paid for again"
                )
            return answer

        return await self._insist(download)

    async def _find_or_submit(self, block: BlockRequests, batch: _Batch) -> str | None:
        """Return the id of a batch, None if it was never submitted and must not be."""
        token, file_id = batch.record.token, batch.record.file_id
        # An earlier process was about to submit it, and perhaps has.
        if file_id is not None and (batch_id := await self._find(block, batch, file_id)) is not None:
            return batch_id
        if not batch.may_submit:
            return None
        if file_id is None:
            data = b"".join(self._api.line(key, request) for key, request in batch.requests.items())
            file_id = await self._insist(partial(self._api.upload, f"plad-{token}.jsonl", data))
            batch.record = await self._note(block, batch, file_id=file_id)
        await self._open(block, batch)
        failures = 0
        while isinstance(submitted := await self._submit(block, file_id, token), Failure):
            if submitted.kind in ("refused", "blocked"):
                raise self._blocked(submitted)
            failures += 1
            await self._pause(submitted, failures)
            # Perhaps only the answer was lost.
            if submitted.kind != "throttled" and (batch_id := await self._find(block, batch, file_id)) is not None:
                return batch_id
        self._log(block, submitted, f"submitted with {len(batch.requests)} requests")
        return submitted

    async def _open(self, block: BlockRequests, batch: _Batch) -> None:
        """Reserve the worst cost of a batch in the ledger, unless an earlier process has."""
        await asyncio.to_thread(block.ledger.check_claim)
        self._opening += 1
        try:
            while not await self._account.open_batch(batch.record.holder, batch.record.worst_cost):
                if self._budget.reservations <= self._opening:  # nothing in flight could leave room
                    raise spending_cap_reached(self._endpoint, self._budget, batch.record.worst_cost)
                await self._wait_for_change()
        finally:
            self._opening -= 1
        self._unopened.pop(id(block), None)

    async def _submit(self, block: BlockRequests, file_id: str, token: str) -> str | Failure:
        """Submit a batch, unless another process has claimed the block or the run."""
        await self._account.check_owned()
        await asyncio.to_thread(block.ledger.check_claim)
        return await self._api.create(file_id, token)

    async def _find(self, block: BlockRequests, batch: _Batch, file_id: str) -> str | None:
        """Return the id of a batch if it was submitted.

        Raises:
            EndpointBlockedError: the provider does not tell.
        """
        unknown = (
            f"list of batches, so whether the batch in {block.ledger.path(batch.record)} was submitted is unknown. "
            "Write its id from the provider's console into that file as `batch_id`"
        )
        for looks in range(2):
            if looks:  # the list of batches may lag behind
                await self._sleep(_LOOK_AGAIN_S)
            find = partial(self._api.find, batch.record.token, file_id)
            if (batch_id := await self._insist(find, unknown)) is not None:
                return batch_id
        return None

    async def _note(self, block: BlockRequests, batch: _Batch, **changes: Any) -> BatchRecord:
        """Write changes of a batch's record."""
        return await asyncio.to_thread(block.ledger.update, batch.record, **changes)

    def _log(self, block: BlockRequests, batch_id: str, state: str) -> None:
        logger.info("%s: batch %s of %s: %s", self._endpoint.url, batch_id, block.ledger.name, state)

    async def _wait(self, batch_id: str, record_path: str) -> dict[str, Any]:
        """Return the state of a batch once it has ended."""
        wait_s = _FIRST_POLL_S
        while True:
            unknown = f"batch {batch_id}, recorded in {record_path}. Use the key of the account that has submitted it"
            state = await self._insist(partial(self._api.get, batch_id), unknown)
            self.polls += 1
            status = str(state.get("status")).lower()  # some providers write it in capitals
            if status in _ENDED:
                return state | {"status": status}
            await self._sleep(wait_s)
            wait_s = min(_LONGEST_POLL_S, 1.5 * wait_s)

    # -- failures

    async def _insist(self, send: Callable[[], Awaitable[_T | Failure]], what: str = "") -> _T:
        """Call the provider until it answers.

        Args:
            what: thing that is missing if the provider does not know the call, and what to do.
        """
        failures = 0
        while isinstance(answer := await send(), Failure):
            if answer.status in _ABSENT and what:
                raise EndpointBlockedError(
                    f"{self._endpoint.url}: the provider has no {what}, or delete that file to submit its requests "
                    "again, which are then paid for again"
                )
            if answer.kind in ("refused", "blocked"):
                raise self._blocked(answer)
            failures += 1
            await self._pause(answer, failures)
        self._outage.end()
        if self._is_closing:
            raise self._closed()
        return answer

    async def _pause(self, failure: Failure, failures: int) -> None:
        """Wait after a failure that is not for good, as long as the outage lasts."""
        now = self._clock()
        self._outage.record_failure(failure.text, now)
        remaining_s = self._outage.remaining_s(now)
        if remaining_s <= 0 or (failure.retry_after_s or 0.0) > self._endpoint.give_up_after_s:
            raise endpoint_down(self._endpoint, self._outage, failure.retry_after_s or 0.0, now)
        wait_s = failure.retry_after_s or backoff_s(failures + 1, self._jitter())
        await self._sleep(min(wait_s, remaining_s))
        if self._is_closing:
            raise self._closed()

    async def _handle_barren_batch(self, block: BlockRequests, failure: Failure | None) -> None:
        """Wait before the next batch of a block after one without outcomes, or give up."""
        if failure is None or failure.kind != "throttled":
            block.barren += 1
            if block.barren > self._endpoint.max_retries:
                raise EndpointDownError(
                    f"{self._endpoint.url}: {block.barren} batches of {block.ledger.name} ended without a response. "
                    "Look at them at the provider, then run again, or set endpoint.mode to realtime."
                )
            await self._sleep(backoff_s(block.barren, self._jitter()))
        else:
            now = self._clock()
            block.full_since = now if block.full_since is None else block.full_since
            # Batches of this client that are in flight may be what fills the queue.
            if not self._budget.reservations and now - block.full_since > self._endpoint.give_up_after_s:
                raise EndpointDownError(
                    f"{self._endpoint.url}: accepts no batch for {now - block.full_since:.0f} s: {failure.text}. Run "
                    "again when the provider's queue is shorter, or use a smaller prompts.block_size."
                )
            await self._sleep(_LONGEST_POLL_S)

    async def _wait_for_change(self) -> None:
        if self._is_closing:
            raise self._closed()
        self._account.changed.clear()
        await self._account.changed.wait()

    def _blocked(self, failure: Failure) -> EndpointBlockedError:
        message = blocked_message(self._endpoint, failure)
        if failure.kind == "refused":
            message = (
                f"{self._endpoint.url}: the provider refuses the batch ({failure.text}). Correct sampling.*, "
                f"endpoint.model, endpoint.batch_window or endpoint.extra_body. {KEPT}; run again after that."
            )
        hint = " A server without a batch interface needs endpoint.mode: realtime." if failure.status in _ABSENT else ""
        return EndpointBlockedError(message + hint)

    def _closed(self) -> ClientClosedError:
        return ClientClosedError(f"{self._endpoint.url}: stopped")
