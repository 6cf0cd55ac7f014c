"""Arguments of the engines: checks of a config's, and defaults that are safe on CPUs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from plad_dist.compat.vllm import cpu_head_sizes, engine_argument_names
from plad_dist.config.sampling import TRANSFORMERS
from plad_dist.data.models import head_size
from plad_dist.errors import UserError

_SET_BY_RUN = ("model", "tokenizer", "seed", "revision", "trust_remote_code")
_COUNTS = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes")

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_MAX_SEQUENCES = 256  # vLLM's `max_num_seqs` if it is not set; larger on large GPUs
_BATCH_SIZES = {"cpu": 32, "gpu": 128}  # that of transformers

# vLLM's CPU engine dies of a seeded request whose prompt is prefilled in several chunks, so prompts
# are never split there, and a batch has room for a whole prompt.
CPU_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 16_384,
    "kv_cache_memory_bytes": 1 << 30,
}


def generates_by_transformers(engine: Mapping[str, Any]) -> bool:
    """Return True if engine arguments name transformers."""
    return engine.get("name") == TRANSFORMERS


def max_sequences(engine: Mapping[str, Any], device: Literal["cpu", "gpu"]) -> int:
    """Return the number of sequences that an engine generates at once at most."""
    default = _BATCH_SIZES[device] if generates_by_transformers(engine) else _MAX_SEQUENCES
    return int(engine.get("max_num_seqs") or default)


def check_engine_args(engine: Mapping[str, Any], key: str) -> None:
    """Check the engine arguments of a config.

    Args:
        engine: arguments by name.
        key: config key that holds them, for the messages.

    Raises:
        UserError: the engine has no argument of that name, the run sets it, it holds a secret, or
            its value is out of range.
    """
    if generates_by_transformers(engine):
        _check_transformers_args(engine, key)
    else:
        _check_vllm_args(engine, key)


def _check_transformers_args(engine: Mapping[str, Any], key: str) -> None:
    for name in engine.keys() - {"name", "max_num_seqs", "dtype"}:
        raise UserError(f"{key}.{name}: transformers generates by `max_num_seqs` and `dtype` alone; remove it")
    if "max_num_seqs" in engine:
        _check_count(engine["max_num_seqs"], f"{key}.max_num_seqs")
    if engine.get("dtype", _DTYPES[0]) not in _DTYPES:
        raise UserError(f"{key}.dtype: expected one of {', '.join(_DTYPES)}, got {engine['dtype']!r:.60}")


def _check_vllm_args(engine: Mapping[str, Any], key: str) -> None:
    names = engine_argument_names()
    for name in engine:
        if name not in names:
            similar = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean `{similar[0]}`?" if similar else ""
            raise UserError(f"{key}.{name}: vLLM's engine has no such argument{hint}")
    for name in _SET_BY_RUN:
        if name in engine:
            raise UserError(f"{key}.{name}: is set by the run itself; use the model's config section")
    if "override_generation_config" in engine:
        raise UserError(
            f"{key}.override_generation_config: no response would follow it; set temperature, top_p and the other keys "
            f"beside engine, in {key.removesuffix('.engine')}"
        )
    if engine.get("logprobs_mode", "raw_logprobs") != "raw_logprobs":
        raise UserError(
            f"{key}.logprobs_mode: {engine['logprobs_mode']}: samples hold the likelihoods that the trainer computes, "
            "before temperature and penalties; remove it"
        )
    if "reasoning_parser" in engine:
        raise UserError(f"{key}.reasoning_parser: has no effect here; set reasoning_parser of the teacher")
    if "hf_token" in engine:
        raise UserError(f"{key}.hf_token: secrets are not kept in configs; set the HF_TOKEN environment variable")
    for name in _COUNTS:
        if engine.get(name) is not None:
            _check_count(engine[name], f"{key}.{name}")
    share = engine.get("gpu_memory_utilization")
    if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
        raise UserError(f"{key}.gpu_memory_utilization: expected a number above 0, at most 1, got {share!r:.60}")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        _check_count(engine.get(name, 1), f"{key}.{name}")
    if engine.get("data_parallel_size", 1) != 1:
        raise UserError(
            f"{key}.data_parallel_size: set `replicas` instead: each replica is an engine of its own, which can join "
            "and leave during a run"
        )


def _check_count(value: Any, key: str) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{key}: expected a whole number of at least 1, got {value!r:.60}")


def check_cpu_heads(config: Any) -> None:
    """Refuse a model that vLLM starts on CPUs and dies of at the first request.

    Args:
        config: transformers config of the model.

    Raises:
        UserError: vLLM's attention on CPUs does not support the width of the model's heads.
    """
    size, supported = head_size(config), cpu_head_sizes()
    # Models with latent attention (MLA), which have a `kv_lora_rank`, use other kernels.
    if size is not None and size not in supported and not hasattr(config.get_text_config(), "kv_lora_rank"):
        raise UserError(
            f"attention heads of {size}: vLLM supports only {', '.join(map(str, supported))} on CPUs. Set another "
            "number of heads or another width (head_dim), or use GPUs"
        )


def with_executor(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of vLLM's arguments, with Ray as the default executor of a pipeline.

    A pipeline is placed on several nodes, which needs Ray inside the engine. Without one, nothing
    is added and vLLM chooses. An executor that the arguments already name is kept.
    """
    if int(engine.get("pipeline_parallel_size", 1)) > 1:
        return {"distributed_executor_backend": "ray", **engine}
    return dict(engine)
