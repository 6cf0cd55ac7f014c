"""Plan of a run: memory, disk, hours and cost, before a device is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plad_dist.config import Config, LlmJudge
from plad_dist.devices import GPUS, gpu_of
from plad_dist.errors import UserError
from plad_dist.phases import phases_of
from plad_dist.planning.cost import estimate_cost, overspending
from plad_dist.planning.disk import disk_bytes
from plad_dist.planning.engine_fit import engine_problems, memory_of_engine, smallest_parallelism
from plad_dist.planning.engines import EngineSpec, endpoint_specs, engine_specs, gpu_needs
from plad_dist.planning.fit import check_fits, shortest_context, sizes_of, trained_size
from plad_dist.planning.hardware import Hardware, local_hardware, local_host
from plad_dist.planning.hours import (
    ENGINE_EFFICIENCY,
    TRAINING_UTILISATION,
    RunHours,
    estimate_hours,
    mean_cached_tokens,
    responses_at_once,
)
from plad_dist.planning.problem import gib
from plad_dist.planning.sizes import ModelSize
from plad_dist.planning.training_fit import group_fits, longest_group, smallest_group, workers_per_node
from plad_dist.planning.training_memory import training_memory
from plad_dist.planning.workload import Workload, workload_of
from plad_dist.training.model.deepspeed_config import is_offloaded, load_deepspeed


def choose_hardware(gpu: str | None, nodes: int | None, gpus_per_node: int | None, config: Config) -> Hardware:
    """Return the hardware to plan for.

    Args:
        gpu: a kind of GPU, or `cpu` for machines like this one without GPUs. None for the GPUs of
            this machine, or else this machine if the config fits it, or else H100s.
        nodes: None for as many as needed.
        gpus_per_node: None for as many as this machine has, or else 8.

    Raises:
        UserError: the kind is not known.
    """
    if gpu == "cpu":
        return replace(local_host(), nodes=nodes or 1)
    if gpu is not None:
        kind = GPUS.get(gpu.lower()) or gpu_of(gpu)
        if kind is None:
            raise UserError(f"--gpu {gpu!r}: not known; expected one of {', '.join(GPUS)}, or cpu")
        return Hardware(kind, nodes, gpus_per_node or 8, None)
    here = local_hardware()
    here = replace(here, nodes=nodes or 1, gpus_per_node=gpus_per_node or here.gpus_per_node if here.gpu else 0)
    if here.gpu is not None or (nodes is None and not check_fits(config, here)):
        return here
    return Hardware(GPUS["h100-80g"], nodes, gpus_per_node or 8, None, source="assumed; choose others with --gpu")


def plan_run(
    config: Config,
    hardware: Hardware,
    *,
    prompts: int | None = None,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
    rates: dict[str, float] | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """Return the plan of a run as JSON. Memory is the peak of one device, in GiB.

    Args:
        prompts, prompt_tokens, response_tokens: in place of measured or bounded values.
        rates: tokens a second and device by `teacher`, `student` and `train`, if measured.
        price: of a device per hour.

    Raises:
        UserError: a model cannot be sized.
    """
    sizes = sizes_of(config, hardware.device)
    work = workload_of(config, prompts, prompt_tokens, response_tokens, shortest_context(sizes))
    problems = check_fits(config, hardware)
    # The hours of a run that does not fit mean nothing.
    time = estimate_hours(config, hardware, sizes, work, rates or {}) if not problems else None
    time_json = time.to_json() if time is not None else None
    cost = estimate_cost(config, work, time_json["device_hours"] if time_json is not None else None, price)
    problems += overspending(config, cost or {})
    fewest, most = gpu_needs(config)
    return {
        "fits": not problems,
        "problems": [problem.to_json() for problem in problems],
        "hardware": {
            "device": hardware.name,
            "memory_gib": gib(hardware.device_memory),
            "devices_per_node": hardware.gpus_per_node or None,
            "nodes": hardware.nodes or hardware.nodes_for(fewest),
            "source": hardware.source,
        },
        "gpus": {"fewest": fewest, "most": most} if hardware.gpu else {"fewest": 0, "most": 0},
        "models": {name: _model(size) for name, size in sizes.items()},
        "training": {name: _plan_phase(config, name, sizes, hardware) for name in phases_of(config)},
        "sampling": {
            spec.label: _plan_engine(config, spec, sizes[spec.label], hardware, work) for spec in engine_specs(config)
        },
        "disk_gib": _in_gib(disk_bytes(config, work, sizes, hardware.device)),
        "work": {
            "prompts": work.prompts,
            "sampled_prompts": work.sampled_prompts,
            "heldout_prompts": work.heldout_prompts,
            "prompt_tokens": work.prompt_tokens,
            "response_tokens": work.response_tokens,
        },
        "time": time_json,
        "cost": cost,
        "assumptions": _assumptions(config, sizes["student"], work, rates or {}, time),
    }


def _model(size: ModelSize) -> dict[str, Any]:
    return {
        "name": size.name,
        "parameters": size.parameters,
        "active_parameters": size.active_parameters,
        "is_mixture": size.is_mixture,
    }


def _plan_phase(config: Config, name: str, sizes: dict[str, ModelSize], hardware: Hardware) -> dict[str, Any]:
    """Return the memory of a training phase with the smallest worker group."""
    training, size = config.training, trained_size(name, sizes)
    optimizer = phases_of(config)[name].optimizer
    fewest, most = training.workers
    memory = training_memory(size, training, optimizer, fewest, hardware.device)
    memory_at_most = training_memory(size, training, optimizer, most, hardware.device)
    return {
        "workers": [fewest, most],
        "smallest_workers": smallest_group(lambda count: group_fits(training, optimizer, size, hardware, count)),
        "device_gib": gib(memory.device),
        "parts_gib": _in_gib({**memory.parts, **memory.alternatives}),
        "largest_alternative_counts": list(memory.alternatives),
        "host_gib_per_worker": gib(memory.host),
        "host_gib_per_node": gib(memory.host * workers_per_node(hardware, training, fewest)),
        "device_gib_at_most_workers": gib(memory_at_most.device),
        "fits": group_fits(training, optimizer, size, hardware, fewest),
    }


def _plan_engine(
    config: Config, spec: EngineSpec, size: ModelSize, hardware: Hardware, work: Workload
) -> dict[str, Any]:
    """Return the memory of the engines of one model."""
    engine = spec.sampling.engine
    memory = memory_of_engine(config, spec, size, hardware, engine)
    cached_tokens = mean_cached_tokens(spec, memory, size, hardware, work)
    return {
        "tensor_parallel_size": int(engine.get("tensor_parallel_size", 1)),
        "smallest_tensor_parallel_size": smallest_parallelism(config, spec, size, hardware),
        "devices_per_engine": spec.devices,
        "replicas": spec.sampling.replicas,
        "min_replicas": spec.sampling.min_replicas,
        "device_gib": gib(memory.device),
        "parts_gib": _in_gib(memory.parts),
        "kv_cache_tokens": round(cached_tokens),
        "responses_at_once": round(responses_at_once(spec, cached_tokens, hardware, work)),
        "fits": not any(engine_problems(config, spec, size, hardware)),
    }


def _assumptions(
    config: Config, student: ModelSize, work: Workload, rates: Mapping[str, float], time: RunHours | None
) -> list[str]:
    """Return where the figures come from, and what they leave out."""
    lines = [f"{name.replace('_', ' ')}: {source}" for name, source in work.sources.items()]
    if any(isinstance(judge, LlmJudge) and judge.model.endpoint for judge in config.evaluation.judges.values()):
        lines.append("the cost of judges behind endpoints is not included")
    if time is not None:
        lines += _time_assumptions(config, time)
    longest, capacity = longest_group(config, student), config.training.micro_batch_tokens
    if longest > capacity:
        lines.append(
            f"a prompt with the responses of its pairs has up to {longest:,} tokens, but training.micro_batch_tokens "
            f"is {capacity:,}: longer groups are refused, or cut by training.max_group_tokens and training.over_long"
        )
    if is_offloaded(load_deepspeed(config.training.deepspeed)):
        lines.append("transfers of offloading between a GPU and its node are not included, so training takes longer")
    if "train" not in rates:
        lines.append(
            f"training at {TRAINING_UTILISATION:.0%} of the device's peak (measured: 20% at 1.1B, 28% at 6.7B "
            "parameters)"
        )
    if not {"teacher", "student"} <= rates.keys():
        lines.append(
            f"engines at {ENGINE_EFFICIENCY:.0%} of memory bandwidth and arithmetic: assumed; give --teacher-rate and "
            "--student-rate"
        )
    if "student" in rates and any(spec.role == "rejected" for spec in engine_specs(config)):
        lines.append("engines of the model that writes the rejected responses are as fast as --student-rate says")
    return lines


def _time_assumptions(config: Config, time: RunHours) -> list[str]:
    lines = [
        f"sample {server.label}: the server's speed is unknown, so its time is not included; set its "
        f"requests_per_minute{', or give --teacher-rate' if server.role == 'teacher' else ''}"
        for server in endpoint_specs(config)
        if time.endpoints[f"sample {server.label}"].hours is None
    ]
    lines.append("hours exclude the start of engines and workers, likelihoods, judges and reward models")
    if any(endpoint_specs(config)):
        lines.append("endpoints respond while engines sample; the longer of the two counts")
    return lines


def _in_gib(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: gib(size) for name, size in sizes.items()}
