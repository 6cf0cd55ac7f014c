"""The sampling actor: one engine, many blocks in flight, each committed by the actor itself.

Rows never pass through the driver: an actor reads its block's prompts from storage and writes their samples there.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import pyarrow as pa

from plad_dist.config import Model
from plad_dist.data.schemas import SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.sampling.engine import Completion, Engine, RefusedPromptError, root_cause
from plad_dist.sampling.job import BlockResult, SamplingJob, sample_seed

_LAST_WORDS_S = 5.0


class EngineDiedError(RuntimeError):
    """The engine is dead and the actor ends; the message is the engine's own reason."""


class Sampler:
    """Owns one engine for its life. An engine that died ends the actor, so that its leases go back."""

    def __init__(self, storage: Storage, path: str, settings: Model, engine: dict[str, Any], seed: int) -> None:
        self._storage, self._settings = storage, settings
        self._path, self._engine_args, self._seed = path, engine, seed
        self._weights = asyncio.Condition()
        self._in_flight = 0

    async def start(self) -> str | None:
        """Start the engine. Returns what the user must mend, None when it runs."""
        try:
            self._renderer = Renderer(self._path, self._settings)
            self._engine = Engine(self._path, self._settings, self._engine_args, self._seed)
        except UserError as error:
            return str(error)
        return None

    async def sample_block(self, job: SamplingJob, block: int, attempt: str) -> BlockResult:
        """Sample every prompt of a block and commit the part.

        Raises:
            EngineDiedError: the engine is dead; the actor leaves within seconds.
        """
        try:
            await self._use_weights(job.weights)
            try:
                return await self._sample_block(job, block, attempt)
            finally:
                async with self._weights:
                    self._in_flight -= 1
                    self._weights.notify_all()
        except Exception as error:
            if self._engine.dead:
                # Time for the reason to reach the driver; nothing else may be sampled here.
                asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
                raise EngineDiedError(root_cause(error)) from None
            raise

    async def _use_weights(self, weights: str) -> None:
        """Enter a block under its job's weights; changing them waits until no other block is in flight."""
        async with self._weights:
            while self._engine.path != weights and self._in_flight:
                await self._weights.wait()
            await self._engine.load_weights(weights)
            self._in_flight += 1

    async def _sample_block(self, job: SamplingJob, block: int, attempt: str) -> BlockResult:
        started = time.monotonic()
        prompts = job.input(self._storage).read_block(block).slice(0, job.rows_in(block)).to_pylist()
        rendered = [self._rendered(prompt["messages"]) for prompt in prompts]
        answers = await asyncio.gather(
            *(
                self._sample(job, prompt["prompt_id"], prompt_ids, index, attempt)
                for prompt, prompt_ids in zip(prompts, rendered, strict=True)
                for index in range(job.n)
            ),
            return_exceptions=True,  # none may still be running when the block has failed
        )
        rows = [_row_or_raise(answer) for answer in answers]
        table = pa.Table.from_pylist(rows, schema=SAMPLES)
        part, first = await asyncio.to_thread(
            job.dataset(self._storage).commit, block, table, fingerprint=job.fingerprint, attempt=attempt
        )
        errors = [row["error"] for row in rows if row["error"] is not None]
        return BlockResult(
            part=part if first else None,
            rows=len(rows),
            errors=len(errors),
            first_error=errors[0] if errors else None,
            tokens=sum(row["num_tokens"] for row in rows),
            seconds=time.monotonic() - started,
        )

    def _rendered(self, messages: list[dict[str, str]]) -> list[int] | UserError:
        """A prompt's token ids, or why its template cannot render it."""
        try:
            return self._renderer.prompt_ids([messages])[0]
        except UserError as error:
            return error

    async def _sample(
        self, job: SamplingJob, prompt_id: str, prompt_ids: list[int] | UserError, index: int, attempt: str
    ) -> dict[str, Any]:
        seed = sample_seed(job.seed, job.seed_round, job.role, prompt_id, index)
        error = None
        try:
            if isinstance(prompt_ids, UserError):
                raise RefusedPromptError(str(prompt_ids))
            request_id = f"{job.output}/{prompt_id}/{index}/{attempt}"
            completion = await self._engine.complete(prompt_ids, job.decoding, seed, request_id)
        except RefusedPromptError as refusal:
            completion, error = Completion("", [], None, "error"), str(refusal)
        return {
            "prompt_id": prompt_id,
            "sample_index": index,
            "role": job.role,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "logprob": completion.logprob,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "error": error,
            "model": job.model,
            "round": job.round,
        }

    async def stop(self) -> None:
        """Stop the engine, so that its processes and memory are gone before the actor is."""
        self._engine.shutdown()


def _row_or_raise(answer: dict[str, Any] | BaseException) -> dict[str, Any]:
    if isinstance(answer, BaseException):
        raise answer
    return answer
