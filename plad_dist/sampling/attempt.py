"""One attempt at a block: read its prompts, draw or score the responses, commit the part.

Rows never pass through the driver. A response that cost money is spooled within two seconds, so
that a later attempt takes it from the spool instead of paying for it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from plad_dist.data.conversation import Conversation
from plad_dist.data.dataset import Dataset
from plad_dist.data.parts import Part
from plad_dist.data.schemas import SAMPLES, is_usable_response
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.fleet.protocol import BlockKey, BlockResult, Hints
from plad_dist.sampling.backend import (
    Backend,
    Completion,
    DrawsBlocks,
    DrawsMany,
    RefusedPromptError,
    Response,
    SampleNumber,
)
from plad_dist.sampling.endpoint.ledger import MICROS
from plad_dist.sampling.job import SamplingJob, sample_seed
from plad_dist.sampling.spool import Row, SampleKey, Spool

logger = logging.getLogger("plad")

_MOST_ERROR = 500  # characters of the error of a row that cannot be stored


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of an attempt, read before it samples.

    Attributes:
        prompts: rows of the prompts dataset.
        rendered: the prompts as the backend takes them; an exception if it cannot render one.
        responses: stored responses to score; empty for a job that draws.
        spooled: samples that earlier attempts paid for.
        lost_cost: money that earlier attempts spent without a sample in `spooled`.
    """

    prompts: list[dict[str, Any]]
    rendered: Sequence[Any]
    responses: dict[SampleKey, Response]
    spooled: dict[SampleKey, Row]
    lost_cost: float


class BlockAttempt:
    """One attempt of a sampling actor at one block.

    Args:
        spool: keeps paid responses; None if the backend is free.
        name: unique name of the attempt.
        row_tries: number of failures after which a row becomes an error row.
        on_sample: called after each sample that the backend produced.

    Attributes:
        key: dataset and number of the block.
        rows_in_flight: rows that have started and are not finished.
    """

    def __init__(
        self,
        storage: Storage,
        backend: Backend,
        spool: Spool | None,
        job: SamplingJob,
        block: int,
        name: str,
        hints: Hints,
        *,
        row_tries: int,
        on_sample: Callable[[], None],
    ) -> None:
        self._storage, self._backend, self._spool = storage, backend, spool
        self._job, self._block, self._name, self._hints = job, block, name, hints
        self._row_tries, self._on_sample = row_tries, on_sample
        self._samples: dict[int, list[Row]] = {}
        self._lost_cost = 0.0  # of requests of this attempt without a response
        self.key: BlockKey = (job.output, block)
        self.rows_in_flight: set[int] = set()

    async def run(self) -> BlockResult:
        """Sample every prompt of the block and commit the part.

        An earlier attempt may have committed it: one that was given up, or whose reply was lost.
        """
        started = time.monotonic()
        dataset = self._job.dataset(self._storage)
        committed = await asyncio.to_thread(dataset.find, self._block, self._job.fingerprint)
        if committed is not None:
            return BlockResult(committed, is_first=False, seconds=time.monotonic() - started)
        self._inputs = await asyncio.to_thread(self._read)
        await self._sample_all()
        if self._backend.dead:
            raise RuntimeError("the engine died while the last rows of the block were finished")
        samples = [sample for row in range(len(self._inputs.prompts)) for sample in self._samples[row]]
        part, is_first = await asyncio.to_thread(self._commit, samples)
        error = next((sample for sample in samples if sample["error"] is not None), None)
        return BlockResult(
            part=part,
            is_first=is_first,
            seconds=time.monotonic() - started,
            first_error=f"prompt {error['prompt_id']}: {error['error']}" if error else None,
        )

    # -- storage

    def _read(self) -> BlockInputs:
        job, block = self._job, self._block
        prompts = job.input(self._storage).read_block(block).slice(0, job.cut.get(block)).to_pylist()
        rendered = self._backend.render([Conversation.from_row(prompt) for prompt in prompts])
        spooled, lost_cost = self._spool.load(block) if self._spool is not None else ({}, 0.0)
        return BlockInputs(prompts, rendered, self._read_responses(), spooled, lost_cost)

    def _read_responses(self) -> dict[SampleKey, Response]:
        job = self._job
        if job.responses is None:
            return {}
        columns = ["prompt_id", "sample_index", "text", "token_ids", "finish_reason"]
        table = Dataset(self._storage, job.responses, SAMPLES).read_block(self._block).select(columns)
        return {
            (row["prompt_id"], row["sample_index"]): Response(
                row["text"], row["token_ids"] if job.own_tokens else [], row["finish_reason"]
            )
            for row in table.to_pylist()
        }

    def _commit(self, samples: list[Row]) -> tuple[Part, bool]:
        counts = {
            "tokens": sum(sample["num_tokens"] for sample in samples),
            "prompt_tokens": sum(sample["prompt_tokens"] for sample in samples),
            "errors": sum(sample["error"] is not None for sample in samples),
            "finished": sum(is_usable_response(sample) for sample in samples),
        }
        if self._spool is not None:
            cost = self._inputs.lost_cost + self._lost_cost + sum(sample["cost"] for sample in samples)
            counts["cost_micros"] = round(cost * MICROS)
        table = pa.Table.from_pylist(samples, schema=SAMPLES)
        dataset, fingerprint = self._job.dataset(self._storage), self._job.fingerprint
        committed = dataset.commit(self._block, table, fingerprint=fingerprint, attempt=self._name, counts=counts)
        if self._spool is not None:
            try:
                self._spool.discard(self._block)
            except RunFailed as error:  # harmless: the spool of a committed block does not count
                logger.warning("the spooled responses of a committed block could not be deleted: %s", error)
        return committed

    # -- samples

    async def _sample_all(self) -> None:
        await self._draw_block()
        for rows in _in_order(len(self._inputs.prompts), self._hints):
            outcomes = await asyncio.gather(*map(self._sample_row, rows), return_exceptions=True)
            # All rows have ended before an exception is raised, so none outlives the attempt.
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome

    async def _sample_row(self, row: int) -> None:
        job = self._job
        self.rows_in_flight.add(row)
        if row in self._hints.poison:
            error = self._hints.poison[row]
            samples = [self._row(row, index, _no_response(), error) for index in range(job.n)]
        elif job.n == 1:
            samples = [await self._sample(row, 0)]
        else:
            await self._draw_many(row)
            samples = list(await asyncio.gather(*(self._sample(row, index) for index in range(job.n))))
        self._samples[row] = samples
        self.rows_in_flight.discard(row)

    async def _draw_many(self, row: int) -> None:
        """Draw the missing samples of a prompt in one request if the backend can, and spool them.

        Those that it does not return stay missing.
        """
        backend, job, rendered = self._backend, self._job, self._inputs.rendered[row]
        prompt_id = self._inputs.prompts[row]["prompt_id"]
        missing = [index for index in range(job.n) if (prompt_id, index) not in self._inputs.spooled]
        is_drawn = job.responses is None and not isinstance(rendered, Exception) and len(missing) > 1
        if not is_drawn or not isinstance(backend, DrawsMany) or not backend.takes_n:
            return
        request_id = f"{job.output}/{prompt_id}/{missing[0]}+{len(missing)}/{self._name}"
        seeds = [sample_seed(job.seed, job.seed_round, job.role, prompt_id, index) for index in missing]
        outcomes: list[Completion | RefusedPromptError | None]
        try:
            outcomes, lost_cost = await backend.complete_many(rendered, job.decoding, seeds, request_id)
        except RefusedPromptError as refusal:
            outcomes, lost_cost = [RefusedPromptError(str(refusal)) for _ in missing], refusal.cost
        except self._backend.fatal as stop:
            self._spool_lost_cost(row, stop)
            raise
        drawn = {(row, index): outcome for index, outcome in zip(missing, outcomes, strict=True) if outcome is not None}
        self._keep(drawn, lost_cost)

    async def _draw_block(self) -> None:
        """Draw the missing samples of the block as a batch if the backend can, and spool them."""
        backend, job, inputs, spool = self._backend, self._job, self._inputs, self._spool
        if spool is None or job.responses is not None or not isinstance(backend, DrawsBlocks):
            return
        requests: dict[SampleNumber, tuple[Any, int]] = {}
        for row, (prompt, rendered) in enumerate(zip(inputs.prompts, inputs.rendered, strict=True)):
            if row in self._hints.poison or isinstance(rendered, Exception):
                continue
            prompt_id = prompt["prompt_id"]
            for index in range(job.n):
                if (prompt_id, index) not in inputs.spooled:
                    seed = sample_seed(job.seed, job.seed_round, job.role, prompt_id, index)
                    requests[row, index] = rendered, seed

        async def keep(outcomes: Mapping[SampleNumber, Completion | RefusedPromptError], lost_cost: float) -> None:
            self._keep(outcomes, lost_cost)
            await asyncio.to_thread(spool.flush)

        self.rows_in_flight.update(row for row, _ in requests)
        dataset = job.dataset(self._storage)
        await backend.draw_block(dataset, self._block, job.fingerprint, job.decoding, requests, keep)
        self.rows_in_flight.clear()

    def _keep(self, outcomes: Mapping[SampleNumber, Completion | RefusedPromptError], lost_cost: float) -> None:
        """Spool what one request or batch has brought, so that all of it counts or nothing."""
        samples = [
            self._storable_row(row, index, outcome, None)
            if isinstance(outcome, Completion)
            else self._storable_row(row, index, _no_response(outcome), str(outcome))
            for (row, index), outcome in outcomes.items()
        ]
        self._inputs.spooled.update(((sample["prompt_id"], sample["sample_index"]), sample) for sample in samples)
        for _ in samples:
            self._on_sample()
        if lost_cost:
            self._lost_cost += lost_cost
            lost = RefusedPromptError("requests without a response", lost_cost)
            samples.append(self._row(0, -1, _no_response(lost), str(lost)))
        if self._spool is not None and samples:
            self._spool.add(self._block, *samples)

    async def _sample(self, row: int, index: int) -> Row:
        """Return one sample of a prompt, from the spool or from the backend."""
        spooled = self._inputs.spooled.get((self._inputs.prompts[row]["prompt_id"], index))
        if spooled is not None:
            return spooled
        completion, error = await self._respond(row, index)
        sample = self._storable_row(row, index, completion, error)
        self._on_sample()
        if self._spool is not None:
            self._spool.add(self._block, sample)
        return sample

    async def _respond(self, row: int, index: int) -> tuple[Completion, str | None]:
        """Return the backend's response, or an empty one with the error for which there is none.

        Raises:
            Exception: the backend is dead, or the stage must stop.
        """
        request_id = f"{self._job.output}/{self._inputs.prompts[row]['prompt_id']}/{index}/{self._name}"
        completion, error = _no_response(), None
        for tries in range(1, self._row_tries + 1):
            try:
                return await self._request(row, index, f"{request_id}/{tries}"), None
            except RefusedPromptError as refusal:
                return _no_response(refusal), str(refusal)
            except self._backend.fatal as stop:
                self._spool_lost_cost(row, stop)
                raise
            except Exception as failure:
                if self._backend.dead:
                    raise
                completion, error = _no_response(failure), f"failed {tries} times: {failure}"
        return completion, error

    async def _request(self, row: int, index: int, request_id: str) -> Completion:
        job, rendered = self._job, self._inputs.rendered[row]
        prompt_id = self._inputs.prompts[row]["prompt_id"]
        if isinstance(rendered, Exception):
            raise RefusedPromptError(str(rendered))
        if job.responses is not None:
            return await self._backend.score(rendered, self._inputs.responses[prompt_id, index], request_id)
        seed = sample_seed(job.seed, job.seed_round, job.role, prompt_id, index)
        return await self._backend.complete(rendered, job.decoding, seed, request_id)

    def _spool_lost_cost(self, row: int, stop: Exception) -> None:
        """Record the money of a request without a response, which counts towards the cap."""
        cost: float = getattr(stop, "cost", 0.0)
        if self._spool is not None and cost:
            self._spool.add(self._block, self._row(row, -1, _no_response(stop), str(stop)))

    def _storable_row(self, row: int, index: int, completion: Completion, error: str | None) -> Row:
        """Return a sample; an error row if it was paid for and the columns cannot hold it.

        Whatever a server says, its response must not fail the block, or it would be paid again.
        """
        sample = self._row(row, index, completion, error)
        if self._spool is None or (problem := self._spool.problem(sample)) is None:
            return sample
        reason = f"the response cannot be stored: {problem}".encode(errors="replace").decode()[:_MOST_ERROR]
        return self._row(row, index, replace(_no_response(), cost=completion.cost), reason)

    def _row(self, row: int, index: int, completion: Completion, error: str | None) -> Row:
        job = self._job
        return {
            "prompt_id": self._inputs.prompts[row]["prompt_id"],
            "sample_index": index,
            "role": job.role,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "logprob": completion.logprob,
            "num_tokens": completion.num_tokens,
            "finish_reason": completion.finish_reason,
            "error": error,
            "model": job.model,
            "round": job.round,
            "reasoning": completion.reasoning,
            "prompt_tokens": completion.prompt_tokens,
            "cost": completion.cost,
        }


def _in_order(rows: int, hints: Hints) -> list[list[int]]:
    """Return the rows in the groups to sample in turn: all unsuspected rows, then each piece."""
    suspects = {row for piece in hints.pieces for row in piece}
    pieces = [[row for row in piece if row not in hints.poison] for piece in hints.pieces]
    return [[row for row in range(rows) if row not in suspects], *filter(None, pieces)]


def _no_response(error: Exception | None = None) -> Completion:
    """Return the completion of an error row, with the money that the error cost."""
    return Completion("", [], 0, None, "error", cost=getattr(error, "cost", 0.0))
