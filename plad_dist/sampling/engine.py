"""One vLLM async engine, with arguments that are safe on the device at hand and errors that can be read."""

from __future__ import annotations

import ast
import asyncio
import difflib
import importlib.util
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from plad_dist.config import Decoding, Model
from plad_dist.data.models import head_size, load_model_config
from plad_dist.data.templates import Messages, Renderer
from plad_dist.errors import UserError, first_line
from plad_dist.fleet.protocol import EngineStartError
from plad_dist.sampling.backend import Completion, RefusedPromptError, Response
from plad_dist.sampling.engine_placement import spanning

_CPU_KV_CACHE_BYTES = 1 << 30
_CPU_BATCHED_TOKENS = 16_384
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # that vLLM's attention on CPUs is compiled for


def check_engine_args(engine: dict[str, Any], key: str) -> None:
    """Raise :class:`UserError` for a name that vLLM's engine does not know; `key` is where the config has them."""
    known = _engine_arg_names()
    for name in engine:
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise UserError(f"{key}.{name}: vLLM's engine has no such argument{hint}")
    for name in ("model", "tokenizer", "seed", "revision", "trust_remote_code"):
        if name in engine:
            raise UserError(f"{key}.{name}: is set by the run itself; use the model's config section")
    if "hf_token" in engine:
        raise UserError(f"{key}.hf_token: secrets are not kept in configs; set the HF_TOKEN environment variable")
    for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
        value = engine.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{key}.{name}: expected a whole number of at least 1, got {value!r:.60}")
    share = engine.get("gpu_memory_utilization")
    if share is not None and (not isinstance(share, (int, float)) or not 0 < share <= 1):
        raise UserError(f"{key}.gpu_memory_utilization: expected a number above 0, at most 1, got {share!r:.60}")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        size = engine.get(name, 1)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{key}.{name}: expected a whole number of at least 1, got {size!r}")
        if name == "data_parallel_size" and size != 1:
            raise UserError(f"{key}.{name}: set replicas instead: each is an engine of its own, which may come and go")


def check_cpu_heads(config: Any) -> None:
    """Raise :class:`UserError` for a model, by its transformers config, that vLLM starts on CPUs and dies of when it is asked."""
    size = head_size(config)
    if size is not None and size not in CPU_HEAD_SIZES and not hasattr(config.get_text_config(), "kv_lora_rank"):
        raise UserError(
            f"attention heads of {size}: vLLM has none of that size on CPUs, only {', '.join(map(str, CPU_HEAD_SIZES))}. Set "
            "another number of heads or another width (head_dim), or use GPUs"
        )


@cache
def _engine_arg_names() -> frozenset[str]:
    """Fields of vLLM's AsyncEngineArgs, read from its source: importing vLLM takes many seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise UserError("vLLM is not installed; install the `gpu` extra, or `cpu` on a machine without a GPU")
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("EngineArgs")]
    return frozenset(
        item.target.id
        for node in classes
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


class Engine:
    """A running vLLM engine. Create it inside a running event loop.

    Raises:
        UserError: vLLM refused to start, with its own reason, or the model has no usable tokenizer or template.
        EngineStartError: its process died.
    """

    paid, retries = False, 0
    fatal: tuple[type[Exception], ...] = ()

    def __init__(self, path: str, settings: Model, engine: dict[str, Any], seed: int) -> None:
        self._renderer = Renderer(path, settings)
        from vllm.platforms import current_platform

        is_cpu = current_platform.is_cpu()
        if is_cpu:
            check_cpu_heads(load_model_config(path, settings))
        self.path: str | None = path
        self._args: dict[str, Any] = {
            "revision": settings.revision,
            "trust_remote_code": settings.trust_remote_code,
            "max_model_len": settings.max_length,
            "seed": seed,
            "disable_log_stats": True,
            **(CPU_DEFAULTS if is_cpu else {}),
            **spanning(engine),
        }
        self._llm = self._started(path)
        self.max_model_len = int(self._llm.model_config.max_model_len)
        self._aborted = False
        self._change: asyncio.Task[None] | None = None

    def _started(self, path: str) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=path, **self._args))
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever its layers raise
            kind = EngineStartError if _silent_death(error) is not None else UserError
            raise kind(_readable(error, path)) from None

    async def check(self) -> str | None:
        """A running engine has been checked by its start."""
        return None

    def render(self, prompts: Sequence[Messages]) -> Sequence[list[int] | UserError]:
        """Token ids of prompts, or why the template cannot render one."""
        try:
            return self._renderer.prompt_ids(prompts)
        except UserError:
            return [self._rendered(messages) for messages in prompts]

    def _rendered(self, messages: Messages) -> list[int] | UserError:
        try:
            return self._renderer.prompt_ids([messages])[0]
        except UserError as error:
            return error

    async def complete(self, prompt_ids: list[int], decoding: Decoding, seed: int, request_id: str) -> Completion:
        """Draw one response. Raises :class:`RefusedPromptError` for a prompt that the engine will not answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self.max_model_len - len(prompt_ids)
        if room < 1:
            raise RefusedPromptError(
                f"prompt has {len(prompt_ids)} tokens, the context {self.max_model_len}: no room to answer"
            )
        params = SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            min_p=decoding.min_p,
            max_tokens=min(decoding.max_tokens, room),
            stop=decoding.stop or None,
            seed=seed if decoding.temperature > 0 else None,
            logprobs=0,
        )
        output = (await self._answer(prompt_ids, params, request_id)).outputs[0]
        if output.finish_reason not in _FINISHED:
            raise RuntimeError(f"vLLM ended the response with {output.finish_reason!r}")
        return Completion(
            text=output.text,
            token_ids=output.token_ids,
            num_tokens=len(output.token_ids),
            logprob=output.cumulative_logprob,
            finish_reason=_FINISHED[output.finish_reason],
            prompt_tokens=len(prompt_ids),
        )

    async def score(self, prompt_ids: list[int], response: Response, request_id: str) -> Completion:
        """A given response with the log-likelihood of its tokens, the end-of-sequence token included where it finished.

        None where it does not fit into the context, or was none.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids = list(response.token_ids)
        if not ids:
            ids = self._renderer.response_ids([response.text])[0]
            ids = ids if response.finish_reason == "stop" else ids[:-1]
        logprob: float | None = None if response.finish_reason == "error" else 0.0
        if ids and len(prompt_ids) + len(ids) >= self.max_model_len:  # vLLM wants room for one token more
            logprob = None
        elif ids:
            params = SamplingParams(
                output_kind=RequestOutputKind.FINAL_ONLY, temperature=0.0, max_tokens=1, prompt_logprobs=0
            )
            answer = await self._answer([*prompt_ids, *ids], params, request_id)
            places = answer.prompt_logprobs[len(prompt_ids) :]
            logprob = sum(place[token].logprob for place, token in zip(places, ids, strict=True))
        return Completion(response.text, ids, len(ids), logprob, response.finish_reason, prompt_tokens=len(prompt_ids))

    async def _answer(self, ids: list[int], params: Any, request_id: str) -> Any:
        """vLLM's final output for a prompt."""
        from vllm.exceptions import VLLMClientError

        requests = self._llm.generate({"prompt_token_ids": ids}, params, request_id=request_id)
        try:
            outputs = [output async for output in requests]  # one, since only the final output is asked for
        except (ValueError, VLLMClientError) as error:
            raise RefusedPromptError(str(error)) from None
        if (
            outputs[-1].outputs[0].finish_reason == "abort"
        ):  # it is told to end, cuts everything short, and goes cleanly
            self._aborted = True
            raise RuntimeError("the engine was told to end (SIGTERM or SIGINT) and cut its responses short")
        return outputs[-1]

    async def load_weights(self, path: str) -> None:
        """Answer with the weights of another folder of the same architecture, by an engine that is started anew.

        vLLM can exchange weights in a running engine, in a fraction of the time. On CPUs it then answers like neither model (it
        keeps copies of some matrices in another layout), without a word; so it is not asked to.
        """
        if self._change is not None and not self._change.done():
            # Whoever asked for it was cancelled, which an engine that starts cannot be.
            await asyncio.shield(self._change)
        if path == self.path:
            return
        self._change = asyncio.create_task(self._start_anew(path))
        await asyncio.shield(self._change)

    async def _start_anew(self, path: str) -> None:
        self.path = None  # neither the old weights nor the new ones, until all is done
        self._llm.shutdown()
        self._llm = await asyncio.to_thread(self._started, path)  # heartbeats go on
        self.path = path

    @property
    def dead(self) -> bool:
        return self._aborted or bool(self._llm.errored)

    @property
    def tokens(self) -> int:
        """By vLLM's own records: it tells nothing before a response is finished, and one that thinks for an hour is not hung."""
        if self.path is None:
            return 0
        under_way = list(self._llm.output_processor.request_states.values())
        return sum(state.detokenizer.num_output_tokens() for state in under_way if state.detokenizer is not None)

    async def close(self) -> None:
        """Stop the engine's processes."""
        self._llm.shutdown()


# vLLM's reasons for an end that leave a usable response. Repetition: it stopped a loop, as the token limit would have.
_FINISHED = {"stop": "stop", "length": "length", "repetition": "length"}

# A seeded request whose prompt is prefilled in several chunks kills the CPU engine, so no prompt is ever split there.
CPU_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": _CPU_BATCHED_TOKENS,
    "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES,
}


def _readable(error: Exception, path: str) -> str:
    """vLLM's reason for not starting."""
    reason = root_cause(error)
    hint = ""
    if re.search(r"memory|KV cache", reason, re.IGNORECASE):
        hint = (
            " Free memory, or change sampling.<role>.engine: gpu_memory_utilization, kv_cache_memory_bytes, "
            "max_model_len, or a larger tensor_parallel_size."
        )
    return f"{path}: vLLM could not start: {reason}{hint}"


def root_cause(error: Exception) -> str:
    """What went wrong in an engine. Its processes only print it, so it is looked for in what this process has printed."""
    if (printed := _printed(error)) is not None:
        return printed
    return _silent_death(error) or first_line(error)


_OF_ANOTHER_PROCESS = re.compile(
    r"root cause|initialization failed|EngineDeadError|encountered an issue", re.IGNORECASE
)


def _printed(error: Exception) -> str | None:
    """What another process of the engine has printed; None where the error is this process's own, or nothing was."""
    if not _OF_ANOTHER_PROCESS.search(str(error)):
        return None
    return next(filter(None, map(_last_error_printed, (2, 1))), None)


def _silent_death(error: Exception) -> str | None:
    """That a process of the engine has died and left no word of why; None where it has, or none has died."""
    if not _OF_ANOTHER_PROCESS.search(str(error)) or _printed(error) is not None:
        return None
    return f"its process died without a word: was it killed, or out of memory? ({first_line(error)})"


def _last_error_printed(stream: int) -> str | None:
    """The last error message in the file that a standard stream goes to, as Ray arranges for its workers."""
    path = Path(f"/proc/{os.getpid()}/fd/{stream}").resolve()
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200_000))
        text = file.read().decode(errors="replace")
    found: list[str] = re.findall(r"\b(?:\w+Error|\w*Exception): (.+)", text)
    causes = [line for line in found if not re.search(r"\(above\)|root cause above|EngineCore encountered", line)]
    return causes[-1].strip() if causes else None
