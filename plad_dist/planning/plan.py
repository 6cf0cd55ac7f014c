"""The plan of a run: memory part by part, disk, time and money, before a device is held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from plad_dist.config import Config, LlmJudge
from plad_dist.phases import phases_of
from plad_dist.planning.duration import (
    ENGINE_EFFICIENCY,
    TRAINING_UTILISATION,
    cached_tokens,
    cost_of,
    responses_at_once,
    time_of,
)
from plad_dist.planning.fit import (
    Problem,
    capacity,
    check_fits,
    engine_problems,
    fits_workers,
    gib,
    longest_group,
    memory_of_engine,
    nodes_for,
    size_trained,
    sizes_of,
    smallest,
    smallest_parallelism,
    workers_on_a_node,
)
from plad_dist.planning.hardware import Hardware
from plad_dist.planning.memory import Memory, training_memory
from plad_dist.planning.needs import EngineNeed, engines_of, gpu_needs
from plad_dist.planning.sizes import ModelSize
from plad_dist.planning.workload import Workload, disk_bytes, workload_of
from plad_dist.training.model.deepspeed_config import is_offloaded, load_deepspeed


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
    """The plan of a run as JSON has it. Memory is in GiB, of one device, at the worst moment.

    Args:
        prompts, prompt_tokens, response_tokens: in the place of what is measured or bounded.
        rates: tokens a second and device by `teacher`, `student` and `train`, in the place of what is modelled.
        price: of a device for an hour.

    Raises:
        UserError: a model's config cannot be had.
    """
    sizes = sizes_of(config, hardware.device)
    work = workload_of(config, prompts, prompt_tokens, response_tokens)
    problems = check_fits(config, hardware)
    fewest, most = gpu_needs(config)
    # What does not fit takes no time that means anything.
    time = time_of(config, hardware, sizes, work, rates or {}) if not problems else None
    cost = cost_of(config, time, work, price)
    problems += _overspent(config, cost or {})
    return {
        "fits": not problems,
        "problems": [asdict(problem) for problem in problems],
        "hardware": {
            "device": hardware.name,
            "memory_gib": gib(capacity(hardware)),
            "devices_per_node": hardware.gpus_per_node or None,
            "nodes": hardware.nodes or nodes_for(fewest, hardware),
            "source": hardware.source,
        },
        "gpus": {"fewest": fewest, "most": most} if hardware.gpu else {"fewest": 0, "most": 0},
        "models": {name: {"name": size.name, "parameters": size.parameters} for name, size in sizes.items()},
        "training": {name: _phase_plan(config, name, sizes, hardware) for name in phases_of(config)},
        "sampling": {need.role: _engine_plan(config, need, sizes, hardware, work) for need in engines_of(config)},
        "disk_gib": _gibs(disk_bytes(config, work, sizes, hardware.device)),
        "work": {
            "prompts": work.prompts,
            "sampled_prompts": work.sampled,
            "heldout_prompts": work.heldout,
            "prompt_tokens": work.prompt_tokens,
            "response_tokens": work.response_tokens,
        },
        "time": time,
        "cost": cost,
        "assumptions": _assumptions(config, sizes["student"], work, rates or {}, time),
    }


def _phase_plan(config: Config, name: str, sizes: dict[str, ModelSize], hardware: Hardware) -> dict[str, Any]:
    training, size = config.training, size_trained(name, sizes)
    optimizer = phases_of(config)[name].optimizer

    def memory(workers: int) -> Memory:
        return training_memory(size, training, optimizer, workers, hardware.device)

    fewest, most = training.workers
    found = memory(fewest)
    return {
        "workers": [fewest, most],
        "smallest_workers": smallest(lambda count: fits_workers(training, optimizer, size, hardware, count)),
        "device_gib": gib(found.device),
        "parts_gib": _gibs({**found.parts, **found.alternatives}),
        "largest_alternative_counts": list(found.alternatives),
        "host_gib_per_worker": gib(found.host),
        "host_gib_per_node": gib(found.host * workers_on_a_node(hardware, training, fewest)),
        "device_gib_at_most_workers": gib(memory(most).device),
        "fits": fits_workers(training, optimizer, size, hardware, fewest),
    }


def _engine_plan(
    config: Config, need: EngineNeed, sizes: dict[str, ModelSize], hardware: Hardware, work: Workload
) -> dict[str, Any]:
    size, engine = sizes[need.role], need.sampling.engine
    found = memory_of_engine(config, need, size, hardware, engine)
    cached = cached_tokens(size, engine, hardware, found, work)
    return {
        "tensor_parallel_size": int(engine.get("tensor_parallel_size", 1)),
        "smallest_tensor_parallel_size": smallest_parallelism(config, need, size, hardware),
        "devices_per_engine": need.devices,
        "replicas": need.sampling.replicas,
        "min_replicas": need.sampling.min_replicas,
        "device_gib": gib(found.device),
        "parts_gib": _gibs(found.parts),
        "kv_cache_tokens": round(cached),
        "responses_at_once": round(responses_at_once(need, cached, work)),
        "fits": not any(engine_problems(config, need, size, hardware)),
    }


def _overspent(config: Config, cost: dict[str, float]) -> list[Problem]:
    """Endpoints that would stop before they have answered all."""
    found = []
    for name, teacher in config.all_teachers().items():
        limit, spent = teacher.endpoint.max_spend if teacher.endpoint else None, cost.get(f"endpoint {name}", 0.0)
        if limit is not None and spent > limit:
            key = f"teachers.{name}" if config.teachers else "teacher"
            what = f"{key}.endpoint.max_spend: {limit:,.2f}: its answers cost about {spent:,.2f}, so that the stage would stop"
            found.append(
                Problem(
                    what, (f"{key}.endpoint.max_spend={math.ceil(spent)}", "a smaller sampling.limit"), always=False
                )
            )
    return found


def _assumptions(
    config: Config, size: ModelSize, work: Workload, rates: dict[str, float], time: dict[str, Any] | None
) -> list[str]:
    lines = [f"{name.replace('_', ' ')}: {source}" for name, source in work.sources.items()]
    if any(isinstance(judge, LlmJudge) and judge.model.endpoint for judge in config.evaluation.judges.values()):
        lines.append("money for judges behind endpoints is not counted")
    stages = time["stages"] if time is not None else {}
    lines += [
        f"{stage}: nothing says how fast the server is, so its time is in no sum: set its requests_per_minute, or give --teacher-rate"
        for stage, found in stages.items()
        if found["hours"] is None
    ]
    if stages:
        lines.append(
            "in no hours: starts of engines and workers; likelihoods, judges and reward models that are asked for"
        )
    if any(teacher.endpoint for teacher in config.all_teachers().values()) and stages:
        lines.append("servers answer while engines sample: of these the longer counts in all")
    longest, held = longest_group(config, size.context), config.training.micro_batch_tokens
    if longest > held:
        lines.append(
            f"a prompt with the responses of its pairs has up to {longest:,} tokens, training.micro_batch_tokens holds {held:,}: what is "
            "longer is refused, or cut by training.max_group_tokens and training.over_long"
        )
    if is_offloaded(load_deepspeed(config.training.deepspeed)):
        lines.append("what offloading moves between a GPU and its node is not counted: training takes longer")
    if "train" not in rates:
        lines.append(
            f"training at {TRAINING_UTILISATION:.0%} of the device's peak (measured: 20% at 1.1B, 28% at 6.7B parameters)"
        )
    if not {"teacher", "student"} <= rates.keys():
        lines.append(
            f"engines at {ENGINE_EFFICIENCY:.0%} of memory bandwidth and arithmetic: assumed; give --teacher-rate, --student-rate"
        )
    return lines


def _gibs(values: Mapping[str, float]) -> dict[str, float]:
    return {name: gib(value) for name, value in values.items()}
