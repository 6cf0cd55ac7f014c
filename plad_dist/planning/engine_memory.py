"""Memory of an engine, and the estimate of its KV cache.

Keys and values: Kwon et al. 2023 (vLLM, arXiv 2309.06180). vLLM takes a fixed share of a device:
weights, one forward pass and CUDA graphs come first, and the KV cache fills the rest. The cache of
transformers grows with the sequences of a batch, up to the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plad_dist.devices import GIB
from plad_dist.planning.memory import GPU_CONTEXT, Memory, process_memory
from plad_dist.planning.sizes import Device, ModelSize, quantized_width
from plad_dist.sampling.engine_arguments import CPU_DEFAULTS, generates_by_transformers, max_sequences

_PROCESS = {"gpu": 6.0 * GIB, "cpu": 0.75 * GIB}  # an engine with its libraries, before it loads a model
_CUDA_GRAPHS = 1.0 * GIB
_UTILIZATION = 0.92  # default of vLLM's gpu_memory_utilization
_BATCHED_TOKENS = 8192  # default of a vLLM server

EngineArguments = Mapping[str, Any]  # `sampling.<role>.engine`, with the name of an engine other than vLLM


def engine_memory(size: ModelSize, engine: EngineArguments, longest: int, device: Device, share: float) -> Memory:
    """Return the memory of an engine on one device.

    Args:
        longest: tokens of the longest sequence (prompt and response), which the KV cache must hold.
        share: bytes of the device that the engine may take.
    """
    by_transformers = generates_by_transformers(engine)
    if device == "cpu" and not by_transformers:
        engine = {**CPU_DEFAULTS, **engine}
    devices = engine_devices(engine)
    offloaded = float(engine.get("cpu_offload_gb") or 0) * GIB
    weights = _weight_width(size, engine, device) * size.parameters / devices
    parts = {
        "weights": max(0.0, weights - offloaded),
        "forward": _forward_bytes(size, engine, device) / devices,
    }
    if device == "gpu" and not by_transformers and not engine.get("enforce_eager"):
        parts["CUDA graphs"] = _CUDA_GRAPHS
    fixed_cache = engine.get("kv_cache_memory_bytes")
    free, one = share - sum(parts.values()) - GPU_CONTEXT, kv_cache_bytes(size, engine, longest, device)
    if by_transformers:
        parts["KV cache"] = max(0.0, min(free, max_sequences(engine, device) * one))
    else:
        parts["KV cache"] = max(free, one) if fixed_cache is None else float(fixed_cache)
    return process_memory(parts, {}, _PROCESS[device] + offloaded, device)


def kv_cache_bytes(size: ModelSize, engine: EngineArguments, tokens: float, device: Device) -> float:
    """Return the bytes of a sequence's keys and values on one device of an engine.

    Layers with a sliding window keep the last tokens only.
    """
    width = 1 if str(engine.get("kv_cache_dtype", "auto")).startswith("fp8") else 4 if device == "cpu" else 2
    tensor, pipeline = (int(engine.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    full_layers = size.layers - size.windowed_layers
    cached_tokens = full_layers * tokens + size.windowed_layers * min(tokens, size.window or tokens)
    return width * size.kv_width * cached_tokens / (min(tensor, size.kv_heads) * pipeline)


def kv_cache_tokens(
    memory: Memory, size: ModelSize, engine: EngineArguments, sequence_tokens: float, device: Device
) -> float:
    """Return the tokens that an engine's KV cache holds.

    Args:
        sequence_tokens: mean length of a sequence.
    """
    return memory.parts["KV cache"] / kv_cache_bytes(size, engine, sequence_tokens, device) * sequence_tokens


def memory_share(engine: EngineArguments) -> float:
    """Return the share of a GPU's memory that an engine may take."""
    return float(engine.get("gpu_memory_utilization") or _UTILIZATION)


def engine_devices(engine: EngineArguments) -> int:
    """Return the number of devices of one engine."""
    return int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))


def _forward_bytes(size: ModelSize, engine: EngineArguments, device: Device) -> float:
    """Return the bytes of one forward pass: hidden states, and float32 logits of the sequences."""
    tokens = int(engine.get("max_num_batched_tokens") or _BATCHED_TOKENS)
    width = 4 if device == "cpu" else 2
    logits = 3 * 4 * max_sequences(engine, device) * size.vocabulary
    return tokens * width * (4 * size.hidden + 3 * size.mlp_width) + logits


def _weight_width(size: ModelSize, engine: EngineArguments, device: Device) -> float:
    """Return the bytes per weight."""
    if size.stored_width is not None:
        return size.stored_width
    if engine.get("quantization"):
        return quantized_width(str(engine["quantization"]))
    return 4.0 if engine.get("dtype") == "float32" or device == "cpu" else 2.0
