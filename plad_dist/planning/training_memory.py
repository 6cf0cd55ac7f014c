"""Memory of a training worker, and the size of a checkpoint.

Sources: states of mixed-precision Adam and their partition, Rajbhandari et al. 2020 (ZeRO, arXiv
1910.02054), section 3; activations that a transformer layer keeps for its backward pass,
Korthikanti et al. 2022 (arXiv 2205.05198), recounted for layers with RMSNorm and a gated MLP as
transformers computes them. Sizes of buffers are those of the installed DeepSpeed and of the
project's own code. ``docs/benchmarks.md`` compares the results with measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plad_dist.config import Optimizer, Training
from plad_dist.devices import GIB
from plad_dist.planning.memory import Memory, process_memory
from plad_dist.planning.sizes import Device, ModelSize
from plad_dist.training.model.deepspeed_config import is_offloaded, load_deepspeed

_CHUNK_ELEMENTS = {"gpu": 1 << 26, "cpu": 1 << 24}  # of a chunk's logits, as in plad_dist.training.model.logprobs
# Copies of the gradients during an optimizer step: the gradients once more, and temporaries of
# torch's AdamW, which has no fused kernels on CPUs.
_STEP_COPIES = {"gpu": 2, "cpu": 4}
_PROCESS = {"gpu": 4.0 * GIB, "cpu": 0.5 * GIB}  # a worker with its libraries, before it loads a model


def training_memory(size: ModelSize, training: Training, optimizer: Optimizer, workers: int, device: Device) -> Memory:
    """Return the memory of one worker of a group.

    Args:
        workers: number of workers in the group.
        device: `gpu`, or `cpu` for workers whose device is their node's memory.
    """
    deepspeed = load_deepspeed(training.deepspeed)
    zero = deepspeed["zero_optimization"]
    offloads_optimizer = is_offloaded(deepspeed)
    offloads_weights = (zero.get("offload_param") or {}).get("device", "none") != "none"
    width = trained_width(training, device)
    own_parameters = _trained_parameters(size, training) / workers  # each worker updates its share
    weights = _weight_bytes(size, training, zero, workers, width)
    optimizer_states = own_parameters * (_moment_bytes(optimizer) + (4 if width == 2 else 0))
    gradients = 4 * own_parameters
    step = 4 * _STEP_COPIES[device] * min(own_parameters, _number(zero, "sub_group_size", 1e9))
    parts = {
        "weights": 0.0 if offloads_weights else weights,
        "gradients": 0.0 if offloads_optimizer else gradients,
        "optimizer": 0.0 if offloads_optimizer else optimizer_states,
        "gathers": _gather_bytes(size, zero, workers, width),
    }
    alternatives = {
        "activations and log-prob chunk": _activation_bytes(size, training, width)
        + _logprob_chunk_bytes(size, training, width, device),
        "optimizer step": 0.0 if offloads_optimizer else step,
    }
    host = _PROCESS[device] + (optimizer_states + gradients + step if offloads_optimizer else 0.0)
    if offloads_weights:
        host += weights
    return process_memory(parts, alternatives, host, device)


def checkpoint_bytes(size: ModelSize, training: Training, device: Device) -> float:
    """Return the bytes of a checkpoint: weights, float32 masters and the optimizer's moments."""
    return _trained_parameters(size, training) * (12.0 + trained_width(training, device))


def trained_width(training: Training, device: Device) -> int:
    """Return the bytes of a trained weight."""
    return 4 if training.dtype == "float32" or (training.dtype == "auto" and device == "cpu") else 2


def _trained_parameters(size: ModelSize, training: Training) -> int:
    return size.adapters(training.lora) if training.lora else size.parameters


def _weight_bytes(size: ModelSize, training: Training, zero: Mapping[str, Any], workers: int, width: int) -> float:
    """Return the bytes of a worker's weights under ZeRO, with the second partition of hpZ."""
    parameters = size.parameters + (_trained_parameters(size, training) if training.lora else 0)
    weights = width * parameters / (workers if zero["stage"] == 3 else 1)
    partition = math.gcd(int(_number(zero, "zero_hpz_partition_size", 1)), workers)
    return weights + (width * parameters / partition if partition > 1 else 0)


def _gather_bytes(size: ModelSize, zero: Mapping[str, Any], workers: int, width: int) -> float:
    """Return the bytes of gathered weights, and of the buckets of communication."""
    buckets = width * _number(zero, "stage3_prefetch_bucket_size", 5e7) + 4 * _number(zero, "reduce_bucket_size", 5e8)
    # Weights that are used again soon stay gathered. A single worker has all weights and gathers
    # nothing.
    live = min(size.parameters, _number(zero, "stage3_max_live_parameters", 1e9)) if workers > 1 else 0
    gathered = width * max(live, 2 * size.layer_parameters + size.output_parameters) if zero["stage"] == 3 else 0
    return gathered + min(buckets, (width + 4) * size.parameters)


def _activation_bytes(size: ModelSize, training: Training, width: int) -> float:
    """Return the bytes that the layers keep of a micro-batch for the backward pass."""
    tokens = training.micro_batch_tokens
    layer = tokens * _layer_bytes_per_token(size, width)
    adapted = size.adapted_experts(training.lora) if training.lora else []
    merged = width * sum(map(math.prod, adapted)) / size.layers  # experts plus adapters, whole on every worker
    layer += merged
    if training.gradient_checkpointing:  # each layer's input, and one layer that is recomputed
        return size.layers * tokens * width * size.hidden + layer + merged  # and the gradient of its experts
    return size.layers * layer + merged


def _layer_bytes_per_token(size: ModelSize, width: int) -> float:
    """Return the bytes that one layer keeps per token.

    They are two norms (the input in float32, the normalised and the scaled values), queries, keys,
    values and outputs of the attention, its scores if they are stored (also in float32), and four
    hidden layers of a gated MLP.
    """
    norms = 2 * (4 + 2 * width) * size.hidden
    attention = width * (3 * size.hidden + 2 * size.key_width)
    return norms + attention + (4 + 2 * width) * size.scores_width + 4 * width * size.mlp_width


def _logprob_chunk_bytes(size: ModelSize, training: Training, width: int, device: Device) -> float:
    """Return the bytes of one chunk of log-probabilities, and of the output layer's gradient."""
    elements = min(_CHUNK_ELEMENTS[device], training.micro_batch_tokens * size.vocabulary)
    return 2.5 * 4 * elements + (0 if training.lora else (4 + width) * size.output_parameters)


def _moment_bytes(optimizer: Optimizer) -> float:
    """Return the bytes of a parameter's moments.

    Muon keeps one, as most parameters are in matrices.
    """
    return {"adamw": 8.0, "adamw_8bit": 2.0, "muon": 4.0}[optimizer.name]


def _number(zero: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of a DeepSpeed config, in which `auto` stands for DeepSpeed's default."""
    value = zero.get(key)
    return value if isinstance(value, (int, float)) else default
