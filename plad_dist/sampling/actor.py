"""The sampling actor: one engine, many blocks in flight, each committed by the actor itself.

Rows never pass through the driver: an actor reads its block's prompts from storage and writes their samples there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from plad_dist.compat.vllm import root_cause
from plad_dist.data.schemas import SAMPLES, is_answer
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Part
from plad_dist.errors import RunFailed, UserError
from plad_dist.fleet.protocol import BlockKey, BlockResult, EngineDiedError, Heartbeat, Hints, UnderWay
from plad_dist.sampling.backend import Backend, Completion, RefusedPromptError, Response
from plad_dist.sampling.endpoint.backend import MICRO
from plad_dist.sampling.job import SamplingJob, sample_seed
from plad_dist.sampling.spool import Spool

logger = logging.getLogger("plad")

_LAST_WORDS_S = 5.0
_SPOOL_EVERY_S = 2.0


class Sampler:
    """Owns one engine for its life. An engine that died ends the actor, so that its leases go back.

    Args:
        make_backend: starts the engine, or the client of a server; called in the actor, inside its event loop.
        row_tries: failures of one row after which it is an error row.
    """

    def __init__(self, storage: Storage, make_backend: Callable[[], Backend], row_tries: int = 3) -> None:
        self._storage, self._make_backend, self._row_tries = storage, make_backend, row_tries
        self._weights = asyncio.Condition()
        self._blocks = self._finished = 0
        self._last_heartbeat: Heartbeat | None = None
        self._under_way: dict[BlockKey, set[int]] = {}
        self._death: EngineDiedError | None = None
        self._spools: dict[str, Spool] = {}
        self._flusher: asyncio.Task[None] | None = None

    async def start(self) -> str | None:
        """Start the engine. Returns what the user must mend, None when it runs."""
        try:
            self._backend = self._make_backend()
            problem = await self._backend.check()
        except UserError as error:
            return str(error)
        if self._backend.paid:
            self._flusher = asyncio.create_task(self._flush_now_and_then())
        return problem

    async def work(self, job: SamplingJob, block: int, attempt: str, hints: Hints) -> BlockResult:
        """Sample every prompt of a block and commit the part.

        Raises:
            EngineDiedError: the engine is dead; the actor leaves within seconds.
        """
        key = (job.output, block)
        try:
            await self._use_weights(job.weights)
            try:
                return await self._sample_block(job, block, attempt, hints)
            finally:
                async with self._weights:
                    self._blocks -= 1
                    self._weights.notify_all()
        except Exception as error:
            if self._backend.dead:
                raise self._last_words(error) from None
            raise
        finally:
            if not self._backend.dead:
                self._under_way.pop(key, None)

    async def heartbeat(self) -> Heartbeat:
        """A sign of life, compared with the one before."""
        heartbeat = Heartbeat(
            finished=self._finished,
            in_flight=sum(map(len, self._under_way.values())),
            tokens=self._backend.tokens,
            retries=self._backend.retries,
            changes=self._backend.path is None,
        )
        unchanged, self._last_heartbeat = heartbeat == self._last_heartbeat, heartbeat
        # A server that answers nobody says nothing of the rows.
        return replace(heartbeat, stuck=self._rows_under_way()) if unchanged and not self._backend.paid else heartbeat

    def _rows_under_way(self) -> UnderWay:
        return {key: tuple(sorted(rows)) for key, rows in self._under_way.items() if rows}

    def _last_words(self, error: Exception) -> EngineDiedError:
        """Why the engine died and what was under way then. Nothing else may be sampled here: the actor ends."""
        if self._death is None:
            self._death = EngineDiedError(root_cause(error), self._rows_under_way())
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
        return self._death

    async def _use_weights(self, weights: str) -> None:
        """Enter a block under its job's weights; changing them waits until no other block is in flight."""
        async with self._weights:
            while self._backend.path != weights and self._blocks:
                await self._weights.wait()
            await self._backend.load_weights(weights)
            self._blocks += 1

    async def _sample_block(self, job: SamplingJob, block: int, attempt: str, hints: Hints) -> BlockResult:
        started = time.monotonic()
        dataset = job.dataset(self._storage)
        # An attempt that was given up, or whose answer was lost with its actor, may have committed it.
        there = await asyncio.to_thread(dataset.find, block, job.fingerprint)
        if there is not None:
            return BlockResult(there, first=False, seconds=time.monotonic() - started)
        prompts, rendered, given, kept, lost = await asyncio.to_thread(self._read, job, block)
        self._under_way[job.output, block] = set()
        samples: dict[int, list[dict[str, Any]]] = {}

        async def sample_row(row: int) -> None:
            self._under_way[job.output, block].add(row)
            if row in hints.poison:
                refused = RefusedPromptError(hints.poison[row])
                found = [self._row(job, prompts[row], index, _failed(refused), str(refused)) for index in range(job.n)]
            else:
                draw = partial(self._sample, job, block, prompts[row], rendered[row], attempt, kept, given)
                calls = (draw(index) for index in range(job.n))
                found = list(await asyncio.gather(*calls)) if job.n > 1 else [await next(iter(calls))]
            samples[row] = found
            self._under_way[job.output, block].discard(row)

        for rows in _order(len(prompts), hints):
            outcomes = await asyncio.gather(*map(sample_row, rows), return_exceptions=True)
            # None may still be running when the block has failed.
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
        if self._backend.dead:
            raise RuntimeError("the engine died while the block was finished")
        rows_in_order = [sample for row in range(len(prompts)) for sample in samples[row]]
        part, first = await asyncio.to_thread(self._commit, job, block, rows_in_order, attempt, lost)
        errors = (row for row in rows_in_order if row["error"] is not None)
        worst = next(errors, None)
        return BlockResult(
            part=part,
            first=first,
            seconds=time.monotonic() - started,
            first_error=f"prompt {worst['prompt_id']}: {worst['error']}" if worst else None,
        )

    def _read(
        self, job: SamplingJob, block: int
    ) -> tuple[list[dict[str, Any]], Sequence[Any], dict[Any, Response], dict[Any, dict[str, Any]], float]:
        """A block's prompts, the same as the engine takes them, the responses that are to be scored, what of it was answered before,
        and money lost on it.
        """
        prompts = job.input(self._storage).read_block(block).slice(0, job.cut.get(block)).to_pylist()
        rendered = self._backend.render([prompt["messages"] for prompt in prompts])
        spooled = self._spool(job).load(block) if self._backend.paid else ({}, 0.0)
        return prompts, rendered, self._given(job, block), *spooled

    def _given(self, job: SamplingJob, block: int) -> dict[Any, Response]:
        """The responses that a block's prompts are to be scored with."""
        if job.responses is None:
            return {}
        columns = ["prompt_id", "sample_index", "text", "token_ids", "finish_reason"]
        rows = Dataset(self._storage, job.responses, SAMPLES).read_block(block).select(columns).to_pylist()
        return {
            (row["prompt_id"], row["sample_index"]): Response(
                row["text"], row["token_ids"] if job.own_tokens else [], row["finish_reason"]
            )
            for row in rows
        }

    def _commit(
        self, job: SamplingJob, block: int, rows: list[dict[str, Any]], attempt: str, lost: float
    ) -> tuple[Part, bool]:
        counts = {
            "tokens": sum(row["num_tokens"] for row in rows),
            "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
            "errors": sum(row["error"] is not None for row in rows),
            "finished": sum(is_answer(row) for row in rows),
        }
        if self._backend.paid:
            counts["cost_micros"] = round((lost + sum(row["cost"] for row in rows)) * MICRO)
        table = pa.Table.from_pylist(rows, schema=SAMPLES)
        dataset = job.dataset(self._storage)
        committed = dataset.commit(block, table, fingerprint=job.fingerprint, attempt=attempt, counts=counts)
        if self._backend.paid:
            try:
                self._spool(job).discard(block)
            except RunFailed as error:  # what stays is not counted again
                logger.warning("spooled answers of a committed block stay: %s", error)
        return committed

    async def _sample(
        self,
        job: SamplingJob,
        block: int,
        prompt: dict[str, Any],
        rendered: Any,
        attempt: str,
        kept: dict[Any, dict[str, Any]],
        given: Mapping[Any, Response],
        index: int,
    ) -> dict[str, Any]:
        """One row of the samples."""
        prompt_id = prompt["prompt_id"]
        if (prompt_id, index) in kept:
            return kept[prompt_id, index]
        seed = sample_seed(job.seed, job.seed_round, job.role, prompt_id, index)
        request_id = f"{job.output}/{prompt_id}/{index}/{attempt}"
        error: str | None = None
        for tries in range(1, self._row_tries + 1):
            try:
                if isinstance(rendered, Exception):
                    raise RefusedPromptError(str(rendered))
                if job.responses is None:
                    completion = await self._backend.complete(rendered, job.decoding, seed, f"{request_id}/{tries}")
                else:
                    response = given[prompt_id, index]
                    completion = await self._backend.score(rendered, response, f"{request_id}/{tries}")
                error = None
                break
            except RefusedPromptError as refusal:
                completion, error = _failed(refusal), str(refusal)
                break
            except self._backend.fatal as stop:
                if self._backend.paid and (cost := getattr(stop, "cost", 0.0)):
                    lost = self._row(job, prompt, -1, Completion("", [], 0, None, "error", cost=cost), str(stop))
                    self._spool(job).add(block, lost)
                raise
            except Exception as failure:
                if self._backend.dead:
                    raise
                completion, error = _failed(failure), f"failed {tries} times: {failure}"
        row = self._row(job, prompt, index, completion, error)
        self._finished += 1
        if self._backend.paid:
            self._spool(job).add(block, row)
        return row

    def _row(
        self, job: SamplingJob, prompt: dict[str, Any], index: int, completion: Completion, error: str | None
    ) -> dict[str, Any]:
        return {
            "prompt_id": prompt["prompt_id"],
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
            "prompt_tokens": completion.prompt_tokens,
            "cost": completion.cost,
        }

    def _spool(self, job: SamplingJob) -> Spool:
        if job.output not in self._spools:
            self._spools[job.output] = Spool(job.dataset(self._storage), job.fingerprint)
        return self._spools[job.output]

    async def _flush_now_and_then(self) -> None:
        """Keep paid answers safe while their blocks are not committed."""
        while True:
            await asyncio.sleep(_SPOOL_EVERY_S)
            try:
                await asyncio.to_thread(self._flush)
            except Exception as error:  # noqa: BLE001 - the rows stay in memory for the next time
                logger.warning("answers could not be kept yet: %s", error)

    def _flush(self) -> None:
        for spool in list(self._spools.values()):
            spool.flush()

    async def stop(self) -> None:
        """Stop the engine, so that its processes and memory are gone before the actor is, and keep the last paid answers."""
        try:
            await self._backend.close()
        finally:
            await asyncio.to_thread(self._flush)


def _order(rows: int, hints: Hints) -> list[list[int]]:
    """Rows in the groups that are sampled one after the other: the unsuspected ones first."""
    suspects = {row for piece in hints.pieces for row in piece}
    pieces = [[row for row in piece if row not in hints.poison] for piece in hints.pieces]
    return [[row for row in range(rows) if row not in suspects], *filter(None, pieces)]


def _failed(error: Exception) -> Completion:
    return Completion("", [], 0, None, "error", cost=getattr(error, "cost", 0.0))
