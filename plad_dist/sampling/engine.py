"""One asynchronous vLLM engine: its start, responses, scores, changes of weights, death."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import Any

from plad_dist.compat.linux import process_began
from plad_dist.compat.vllm import (
    assert_engine_internals,
    death_without_message,
    root_cause,
    tokens_in_flight,
)
from plad_dist.compat.vllm_processes import start_fork_server, use_fork_server
from plad_dist.compat.vllm_weights import WORKER_EXTENSION, computes_in_float32, exchange_weights
from plad_dist.config import Decoding, Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.models import load_model_config
from plad_dist.errors import UserError, first_line
from plad_dist.fleet.protocol import EngineStartError
from plad_dist.sampling.backend import Completion, RefusedPromptError, Response
from plad_dist.sampling.engine_arguments import CPU_DEFAULTS, check_cpu_heads, with_executor
from plad_dist.sampling.engine_texts import EngineTexts, room_for_response
from plad_dist.sampling.exchange import (
    CHECK_TEXTS,
    CHECK_TOKENS,
    CHECK_TOLERANCE,
    can_be_exchanged,
    largest_difference,
    logprobs_by_transformers,
)
from plad_dist.timeline import StartClock

logger = logging.getLogger("plad")

# vLLM's finish reasons of usable responses, by the name that samples have for them. With
# "repetition", vLLM cut a loop short, as the token limit would have.
_FINISH_REASONS = {"stop": "stop", "length": "length", "repetition": "length"}


class Engine:
    """A running vLLM engine. Create it inside a running event loop.

    Args:
        path: folder or hub name of the model.
        settings: the model's section of the config.
        engine: vLLM's engine arguments, which override the defaults.
        seed: the engine's own seed; each response has its own.

    Raises:
        UserError: vLLM refused to start, with its reason, or the model has no usable tokenizer or
            template.
        EngineStartError: a process of the engine died without an error message.
    """

    paid, retries = False, 0
    fatal: tuple[type[Exception], ...] = ()

    def __init__(self, path: str, settings: Model, engine: dict[str, Any], seed: int) -> None:
        self.start = StartClock(process_began())
        self.start.end("process")
        if not engine.get("numa_bind"):  # which replaces the interpreter of the engine's process
            start_fork_server()
            use_fork_server()
        self._texts, self._settings = EngineTexts(path, settings), settings
        from vllm.platforms import current_platform

        self.start.end("imports")
        is_cpu = current_platform.is_cpu()
        if is_cpu:
            check_cpu_heads(load_model_config(path, settings))
        self.path: str | None = path
        self._arguments: dict[str, Any] = {
            "revision": settings.revision,
            "trust_remote_code": settings.trust_remote_code,
            "max_model_len": settings.max_length,
            "seed": seed,
            "disable_log_stats": True,
            "worker_extension_cls": WORKER_EXTENSION,
            **(CPU_DEFAULTS if is_cpu else {}),
            **with_executor(engine),
        }
        self._llm = self._start(path)
        self.start.end("engine")
        assert_engine_internals(self._llm)
        self.max_model_len = int(self._llm.model_config.max_model_len)
        self._was_aborted = False
        self._change: asyncio.Task[None] | None = None
        self._check_texts: deque[list[int]] = deque(maxlen=CHECK_TEXTS)

    def _start(self, path: str) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=path, **self._arguments))
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever its layers raise
            kind = EngineStartError if death_without_message(error) is not None else UserError
            raise kind(_start_failure(error, path)) from None

    async def check(self) -> str | None:
        """Return None: the start of the engine has checked everything."""
        return None

    def render(self, prompts: Sequence[Conversation]) -> Sequence[list[int] | UserError]:
        """Return the token ids of each prompt, or the error why the template cannot render it."""
        rendered = self._texts.render(prompts)
        length = min(CHECK_TOKENS, self.max_model_len - 1)  # vLLM generates one more
        self._check_texts.extend(ids[-length:] for ids in rendered if isinstance(ids, list) and len(ids) > 1)
        return rendered

    async def complete(self, prompt_ids: list[int], decoding: Decoding, seed: int, request_id: str) -> Completion:
        """Draw one response.

        Raises:
            RefusedPromptError: the engine will never respond to this prompt.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = room_for_response(prompt_ids, self.max_model_len)
        params = SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k or 0,
            min_p=decoding.min_p or 0.0,
            presence_penalty=decoding.presence_penalty or 0.0,
            frequency_penalty=decoding.frequency_penalty or 0.0,
            repetition_penalty=decoding.repetition_penalty or 1.0,
            max_tokens=min(decoding.max_tokens, room),
            min_tokens=min(decoding.min_tokens, room),
            stop=decoding.stop or None,
            stop_token_ids=decoding.stop_token_ids or None,
            skip_special_tokens=False,  # what vanished from the text would still be in the tokens
            seed=seed if decoding.temperature > 0 else None,
            logprobs=0,
        )
        output = (await self._generate(prompt_ids, params, request_id)).outputs[0]
        if output.finish_reason not in _FINISH_REASONS:
            raise RuntimeError(f"vLLM ended the response with finish reason {output.finish_reason!r}")
        finish_reason = _FINISH_REASONS[output.finish_reason]
        return self._texts.drawn(prompt_ids, output.text, output.token_ids, output.cumulative_logprob, finish_reason)

    async def score(self, prompt_ids: list[int], response: Response, request_id: str) -> Completion:
        """Return a response with its log-likelihood, as :meth:`EngineTexts.scored` does."""

        def compute(ids: list[int]) -> Awaitable[float]:
            return self._logprob(prompt_ids, ids, request_id)

        # vLLM needs room for one more token, which it generates.
        return await self._texts.scored(prompt_ids, response, self.max_model_len - 1, compute)

    async def _logprob(self, prompt_ids: list[int], ids: list[int], request_id: str) -> float:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY, temperature=0.0, max_tokens=1, prompt_logprobs=0
        )
        output = await self._generate([*prompt_ids, *ids], params, request_id)
        positions = output.prompt_logprobs[len(prompt_ids) :]
        return float(sum(position[token].logprob for position, token in zip(positions, ids, strict=True)))

    async def _generate(self, ids: list[int], params: Any, request_id: str) -> Any:
        """Return vLLM's final output for a prompt."""
        from vllm.exceptions import VLLMClientError

        requests = self._llm.generate({"prompt_token_ids": ids}, params, request_id=request_id)
        try:
            # There is one output, because `params` ask for the final one only.
            outputs = [output async for output in requests]
        except (ValueError, VLLMClientError) as error:
            raise RefusedPromptError(str(error)) from None
        # After SIGTERM, vLLM ends every request as if it had finished, then exits cleanly.
        if outputs[-1].outputs[0].finish_reason == "abort":
            self._was_aborted = True
            raise RuntimeError("the engine received SIGTERM or SIGINT and cut its responses short")
        return outputs[-1]

    async def load_weights(self, path: str) -> None:
        """Respond with the weights in another folder, of the same architecture, from now on.

        They are exchanged in the running engine where that can be checked. Otherwise, and if the
        check fails, a new engine starts.
        """
        if self._change is not None and not self._change.done():
            # The caller that requested this change was cancelled. A starting engine cannot be.
            await asyncio.shield(self._change)
        if path == self.path:
            return
        self._change = asyncio.create_task(self._change_to(path))
        await asyncio.shield(self._change)

    async def _change_to(self, path: str) -> None:
        present, self.path = self.path, None  # neither the old nor the new weights until the engine is ready
        self.start = StartClock()
        is_exchanged = present is not None and await self._exchange(present, path)
        self.start.end("exchange")
        if not is_exchanged:
            self._llm.shutdown()
            self._llm = await asyncio.to_thread(self._start, path)  # heartbeats continue meanwhile
            self.start.end("engine")
        self.path = path

    async def _exchange(self, present: str, path: str) -> bool:
        """Return True if the running engine took other weights and passed the check."""
        try:
            if not (self._check_texts and computes_in_float32(self._llm) and can_be_exchanged(present, path)):
                return False
            await exchange_weights(self._llm, path)
            difference = await self._difference_to_transformers(path)
        except Exception as error:  # noqa: BLE001 - whatever it is, a new engine starts
            problem = first_line(error)
        else:
            if difference <= CHECK_TOLERANCE:
                return True
            problem = f"its log-likelihoods were off by up to {difference:.1e} of their values"
        logger.warning("%s: a new engine starts, since the running one did not take the weights: %s", path, problem)
        return False

    async def _difference_to_transformers(self, path: str) -> float:
        texts = list(self._check_texts)
        expected = await asyncio.to_thread(logprobs_by_transformers, path, self._settings, texts)
        requests = (self._logprob(ids[:1], ids[1:], f"check-{path}-{row}") for row, ids in enumerate(texts))
        return largest_difference(await asyncio.gather(*requests), expected)

    @property
    def dead(self) -> bool:
        """True if the engine will not respond any more."""
        return self._was_aborted or bool(self._llm.errored)

    @property
    def tokens(self) -> int:
        """Number of tokens generated for unfinished responses.

        It shows that an engine works on responses that take an hour, and does not hang.
        """
        return 0 if self.path is None else tokens_in_flight(self._llm)

    async def close(self) -> None:
        """Stop the processes of the engine."""
        self._llm.shutdown()


def _start_failure(error: Exception, path: str) -> str:
    """Return a message with vLLM's reason for not starting."""
    reason = root_cause(error)
    hint = ""
    if re.search(r"memory|KV cache", reason, re.IGNORECASE):
        hint = (
            " Free memory, or change sampling.<role>.engine: gpu_memory_utilization, kv_cache_memory_bytes, "
            "max_model_len, or a larger tensor_parallel_size."
        )
    return f"{path}: vLLM could not start: {reason}{hint}"
