"""Fit of an engine: its memory on a device, and its arguments for the model and the node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plad_dist.config import Config
from plad_dist.planning.engine_memory import EngineArguments, engine_memory, memory_share
from plad_dist.planning.engines import EngineSpec
from plad_dist.planning.hardware import USABLE_SHARE, Hardware
from plad_dist.planning.memory import Memory
from plad_dist.planning.problem import Problem, gib, parameters_text
from plad_dist.planning.sizes import ModelSize
from plad_dist.sampling.engine_arguments import generates_by_transformers


def engine_problems(config: Config, spec: EngineSpec, size: ModelSize, hardware: Hardware) -> Iterator[Problem]:
    """Yield the problems of engines that run one model on this hardware."""
    engine = spec.sampling.engine
    tensor = int(engine.get("tensor_parallel_size", 1))
    key = f"{spec.key}.engine.tensor_parallel_size"
    if (problem := _context_problem(spec, size)) is not None:
        yield problem
    if hardware.gpu and tensor > hardware.gpus_per_node:
        yield Problem(
            f"{key}: {tensor}: a node has {hardware.gpus_per_node} GPUs",
            (f"{key}={hardware.gpus_per_node}, and pipeline_parallel_size over nodes",),
        )
        return
    if size.heads % tensor:
        divisors = [n for n in range(1, max(hardware.gpus_per_node, tensor) + 1) if size.heads % n == 0]
        yield Problem(
            f"{key}: {tensor}: does not divide the {size.heads} heads of {size.name}",
            (f"{key} of {', '.join(map(str, divisors))}",),
        )
        return
    needed, share = memory_of_engine(config, spec, size, hardware, engine).device, engine_share(engine, hardware)
    if needed <= share:
        return
    enough = smallest_parallelism(config, spec, size, hardware)
    remedies = [f"{key}={enough}"] if enough else []
    if generates_by_transformers(engine):
        remedies.append(f"a smaller {spec.key}.engine.max_num_seqs")
    if "kv_cache_memory_bytes" in engine:
        remedies.append(f"a smaller {spec.key}.engine.kv_cache_memory_bytes")
    remedies.append("a smaller max_length of the model, or a quantized one")
    yield Problem(
        f"{spec.label}: an engine of {size.name} ({parameters_text(size)}) takes {gib(needed)} GiB of each of "
        f"{spec.devices} {hardware.name}, {gib(share)} GiB are available",
        tuple(remedies),
    )


def _context_problem(spec: EngineSpec, size: ModelSize) -> Problem | None:
    """Return the problem of a config that allows longer sequences than the model supports."""
    max_length = spec.model.max_length
    is_extended = "hf_overrides" in spec.sampling.engine
    if max_length is None or size.positions is None or max_length <= size.positions or is_extended:
        return None
    return Problem(
        f"{spec.model_key}.max_length: {max_length:,}: {size.name} has {size.positions:,} positions",
        (f"{spec.model_key}.max_length={size.positions}",),
    )


def engine_share(engine: EngineArguments, hardware: Hardware) -> float:
    """Return the bytes of a device that an engine may take."""
    return (memory_share(engine) if hardware.gpu else USABLE_SHARE) * hardware.device_memory


def memory_of_engine(
    config: Config, spec: EngineSpec, size: ModelSize, hardware: Hardware, engine: dict[str, Any]
) -> Memory:
    """Return the memory of an engine on one device.

    Args:
        engine: arguments of the engine; those of `spec`, or a variation of them.
    """
    max_model_len = engine.get("max_model_len")
    context = size.context
    if isinstance(max_model_len, int) and max_model_len > 0:
        context = min(context, max_model_len)
    longest = min(context, (config.prompts.max_tokens or context) + spec.sampling.max_tokens)
    if max_model_len in (-1, "auto"):  # the engine chooses a length that fits
        longest = 1
    return engine_memory(size, engine, longest, hardware.device, engine_share(engine, hardware))


def smallest_parallelism(config: Config, spec: EngineSpec, size: ModelSize, hardware: Hardware) -> int | None:
    """Return the fewest GPUs of a node that hold a model and one sequence, or None.

    The GPUs must divide the model's heads. Transformers generates on one.
    """
    if hardware.gpu is None or generates_by_transformers(spec.sampling.engine):
        return None
    for tensor in (n for n in (1, 2, 4, 8, 16, 32) if n <= hardware.gpus_per_node and size.heads % n == 0):
        engine = {**spec.sampling.engine, "tensor_parallel_size": tensor}
        if memory_of_engine(config, spec, size, hardware, engine).device <= engine_share(engine, hardware):
            return tensor
    return None
