"""Bytes that training and sampling take, part by part.

Sources: states of mixed-precision Adam and their partition, Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3; what a
transformer layer keeps for its backward, Korthikanti et al. 2022 (arXiv 2205.05198), counted anew for layers with RMSNorm and a
gated MLP as transformers computes them; keys and values, Kwon et al. 2023 (vLLM, arXiv 2309.06180). Widths of buffers are those of
the installed DeepSpeed and of the project's own code. ``docs/benchmarks.md`` holds them against measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plad_dist.config import Optimizer, Training
from plad_dist.devices import GIB
from plad_dist.planning.sizes import Device, ModelSize, quantized_width
from plad_dist.sampling.engine_arguments import CPU_DEFAULTS
from plad_dist.training.model.deepspeed_config import is_offloaded, load_deepspeed

_CHUNK_ELEMENTS = {
    "gpu": 1 << 26,
    "cpu": 1 << 24,
}  # of a chunk's logits, as plad_dist.training.model.logprobs takes them
# While an optimizer steps: the gradients once more, and what torch's AdamW makes on the way, on CPUs without fused kernels.
_STEP_COPIES = {"gpu": 2, "cpu": 4}
_GPU_CONTEXT = 1.5 * GIB  # CUDA and NCCL
_HOST_WORKER = {"gpu": 4.0 * GIB, "cpu": 0.5 * GIB}  # a process as it stands, with its libraries
_HOST_ENGINE = {"gpu": 6.0 * GIB, "cpu": 0.75 * GIB}
_ALLOCATOR = 1.03  # what allocators hold beyond what is asked of them
_CUDA_GRAPHS = 1.0 * GIB
_UTILIZATION = 0.92  # vLLM's own gpu_memory_utilization
_BATCHED_TOKENS, _ENGINE_SEQUENCES = 8192, 256  # vLLM's own for a server


@dataclass(frozen=True)
class Memory:
    """What one process takes.

    Attributes:
        parts: bytes on its device by what they are for.
        alternatives: parts of which only the largest is there at a time.
        host: bytes in the memory of its node, beside those on a device.
    """

    parts: Mapping[str, float]
    alternatives: Mapping[str, float]
    host: float

    @property
    def device(self) -> float:
        """Bytes on its device at the worst moment."""
        return sum(self.parts.values()) + max(self.alternatives.values(), default=0.0)


def training_memory(size: ModelSize, training: Training, optimizer: Optimizer, workers: int, device: Device) -> Memory:
    """What one of so many workers takes.

    Args:
        device: `gpu`, or `cpu`, whose device is the memory of its node.
    """
    deepspeed = load_deepspeed(training.deepspeed)
    zero = deepspeed["zero_optimization"]
    offloaded = is_offloaded(deepspeed)
    weights_offloaded = (zero.get("offload_param") or {}).get("device", "none") != "none"
    width = _trained_width(training, device)
    learning = size.adapters(training.lora) if training.lora else size.parameters
    held = size.parameters + (learning if training.lora else 0)
    mine = learning / workers
    weights = width * held / (workers if zero["stage"] == 3 else 1)
    second = math.gcd(int(_number(zero, "zero_hpz_partition_size", 1)), workers)
    if second > 1:
        weights += width * held / second
    optimizer_states = mine * (_moments(optimizer) + (4 if width == 2 else 0))
    gradients = 4 * mine
    tokens = training.micro_batch_tokens
    layer = tokens * _kept_of_layer(size, width)
    kept = (
        size.layers * tokens * width * size.hidden + layer if training.gradient_checkpointing else size.layers * layer
    )
    elements = min(_CHUNK_ELEMENTS[device], tokens * size.vocabulary)
    chunk = 2.5 * 4 * elements + (0 if training.lora else (4 + width) * size.output)
    buckets = width * _number(zero, "stage3_prefetch_bucket_size", 5e7) + 4 * _number(zero, "reduce_bucket_size", 5e8)
    # What is used again soon stays gathered; a worker alone has all of its weights and gathers nothing that it would keep.
    alive = min(size.parameters, _number(zero, "stage3_max_live_parameters", 1e9)) if workers > 1 else 0
    gathered = width * max(alive, 2 * size.layer + size.output) if zero["stage"] == 3 else 0
    step = 4 * _STEP_COPIES[device] * min(mine, _number(zero, "sub_group_size", 1e9))
    parts = {
        "weights": 0.0 if weights_offloaded else weights,
        "gradients": 0.0 if offloaded else gradients,
        "optimizer": 0.0 if offloaded else optimizer_states,
        "gathers": gathered + min(buckets, (width + 4) * size.parameters),
    }
    alternatives = {
        "activations and log-prob chunk": kept + chunk,
        "optimizer step": 0.0 if offloaded else step,
    }
    host = _HOST_WORKER[device] + (optimizer_states + gradients + step if offloaded else 0.0)
    if weights_offloaded:
        host += weights
    return _of_device(parts, alternatives, host, device)


def engine_memory(size: ModelSize, engine: Mapping[str, Any], longest: int, device: Device, share: float) -> Memory:
    """What one device of a vLLM engine takes, its cache of keys and values filling what is left.

    Args:
        longest: tokens of the longest prompt and response together; the cache must hold them.
        share: bytes of the device that it lets itself take.
    """
    if device == "cpu":
        engine = {**CPU_DEFAULTS, **engine}
    devices = engine_devices(engine)
    sequences = int(engine.get("max_num_seqs") or _ENGINE_SEQUENCES)
    batched = int(engine.get("max_num_batched_tokens") or _BATCHED_TOKENS)
    width = 4 if device == "cpu" else 2
    forward = batched * width * (4 * size.hidden + 3 * size.mlp_width) + 3 * 4 * sequences * size.vocabulary
    offloaded = float(engine.get("cpu_offload_gb") or 0) * GIB
    weights = _weight_width(size, engine, device) * size.parameters / devices
    parts = {"weights": max(0.0, weights - offloaded), "forward": forward / devices}
    if device == "gpu" and not engine.get("enforce_eager"):
        parts["CUDA graphs"] = _CUDA_GRAPHS
    given = engine.get("kv_cache_memory_bytes")
    if given is not None:
        parts["KV cache"] = float(given)
    else:
        left = share - sum(parts.values()) - _GPU_CONTEXT
        parts["KV cache"] = max(left, sequence_bytes(size, engine, longest, device))
    return _of_device(parts, {}, _HOST_ENGINE[device] + offloaded, device)


def memory_share(engine: Mapping[str, Any]) -> float:
    """Share of a GPU's memory that an engine lets itself take."""
    return float(engine.get("gpu_memory_utilization") or _UTILIZATION)


def sequence_bytes(size: ModelSize, engine: Mapping[str, Any], tokens: float, device: Device) -> float:
    """Bytes of the keys and values of a sequence on one device of an engine."""
    width = 1 if str(engine.get("kv_cache_dtype", "auto")).startswith("fp8") else 4 if device == "cpu" else 2
    tensor, pipeline = (int(engine.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    kept = (size.layers - size.windowed) * tokens + size.windowed * min(tokens, size.window or tokens)
    return width * size.kv_width * kept / (min(tensor, size.kv_heads) * pipeline)


def engine_devices(engine: Mapping[str, Any]) -> int:
    """Devices of one engine."""
    return int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))


def checkpoint_bytes(size: ModelSize, training: Training, device: Device) -> float:
    """One checkpoint: weights, their float32 masters and the optimizer's moments."""
    width = _trained_width(training, device)
    learning = size.adapters(training.lora) if training.lora else size.parameters
    return learning * (12.0 + width)


def _trained_width(training: Training, device: Device) -> int:
    """Bytes of a weight that is trained."""
    return 4 if training.dtype == "float32" or (training.dtype == "auto" and device == "cpu") else 2


def _moments(optimizer: Optimizer) -> float:
    """Bytes of the moments of a parameter; Muon keeps one of a matrix, which nearly all parameters are in."""
    return {"adamw": 8.0, "adamw_8bit": 2.0, "muon": 4.0}[optimizer.name]


def _kept_of_layer(size: ModelSize, width: int) -> float:
    """Bytes that one layer keeps of a token: two norms (their input in float32, the normalised and the scaled values), queries,
    keys, values and outputs of attention, its scores where they are held (also in float32), and four hidden layers of a gated MLP."""
    norms = 2 * (4 + 2 * width) * size.hidden
    attention = width * (3 * size.hidden + 2 * size.key_width)
    return norms + attention + (4 + 2 * width) * size.scores_width + 4 * width * size.mlp_width


def _weight_width(size: ModelSize, engine: Mapping[str, Any], device: Device) -> float:
    if size.quantized is not None:
        return size.quantized
    if engine.get("quantization"):
        return quantized_width(str(engine["quantization"]))
    return 4.0 if engine.get("dtype") == "float32" or device == "cpu" else 2.0


def _number(zero: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a DeepSpeed config, which takes `auto` for its own default."""
    value = zero.get(key)
    return value if isinstance(value, (int, float)) else default


def _of_device(parts: dict[str, float], alternatives: dict[str, float], host: float, device: Device) -> Memory:
    """On a CPU the process itself is on the device, and keeps what it has once taken: nothing takes the place of something else."""
    spare = {name: value * _ALLOCATOR for name, value in alternatives.items()}
    if device == "cpu":
        return Memory({"process": host, **parts, **spare}, {}, 0.0)
    return Memory({"CUDA and NCCL": _GPU_CONTEXT, **parts}, spare, host)
