"""How long a run takes and what it costs, from measured or given rates, or from what its devices can do at best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plad_dist.config import Config, Endpoint
from plad_dist.phases import phases_of
from plad_dist.planning.fit import Hardware, memory_of_engine, nodes_for, size_trained
from plad_dist.planning.memory import Memory, sequence_bytes
from plad_dist.planning.needs import EngineNeed, engines_of, gpu_needs
from plad_dist.planning.sizes import ModelSize
from plad_dist.planning.workload import Workload

# Of the peak; docs/benchmarks.md has 0.20 for 1.1B and 0.28 for 6.7B parameters on one H200.
TRAINING_UTILISATION = 0.25
ENGINE_EFFICIENCY = 0.5  # of memory bandwidth and arithmetic while an engine writes; assumed, not measured


def time_of(
    config: Config,
    hardware: Hardware,
    sizes: dict[str, ModelSize],
    work: Workload,
    rates: dict[str, float],
) -> dict[str, Any] | None:
    """Hours of the stages, None where the prompts or the device's speed are not known."""
    if work.prompts is None or (hardware.gpu is None and not {"teacher", "student", "train"} <= rates.keys()):
        return None
    devices = (hardware.nodes or nodes_for(gpu_needs(config)[0], hardware)) * hardware.gpus_per_node or 1
    rounds = config.rounds.most
    stages: dict[str, dict[str, float]] = {}

    def add(name: str, tokens: float, rate: float, used: int) -> None:
        hours = tokens / (rate * used) / 3600
        stages[name] = {"tokens": round(tokens), "tokens_per_s_per_device": round(rate, 1), "hours": round(hours, 3),
                        "device_hours": round(hours * devices, 2)}  # fmt: skip

    for need in engines_of(config):
        if need.judges:
            continue
        role = need.speaker
        rate = rates.get(role) or _engine_rate(config, need, sizes[need.role], hardware, work)
        times = rounds if role == "student" else 1
        share = 1.0
        if config.teachers and role == "teacher":
            name = need.role.removeprefix("teachers.")
            share = config.teachers[name].share / sum(teacher.share for teacher in config.teachers.values())
        most = devices // need.devices if need.sampling.replicas == "auto" else need.sampling.replicas
        used = max(1, min(most, devices // need.devices)) * need.devices
        add(f"sample {need.role}", share * times * work.sampled_tokens(config, role), rate, used)
    for name, phase in phases_of(config).items():
        rate = rates.get("train") or _training_rate(size_trained(name, sizes), hardware)
        groups = phase.epochs * work.prompts
        if phase.max_steps:
            groups = min(groups, phase.max_steps * phase.batch_groups)
        tokens = groups * work.trained_tokens(config, name)
        add(f"train {name}", tokens, rate, min(config.training.workers[1], devices))
    hours = sum(stage["hours"] for stage in stages.values())
    return {"devices": devices, "stages": stages, "hours": round(hours, 2), "device_hours": round(hours * devices, 1)}


def _training_rate(size: ModelSize, hardware: Hardware) -> float:
    """Tokens a second and device: 6 FLOPs for each parameter that a token meets (Chowdhery et al. 2022, appendix B)."""
    assert hardware.gpu is not None
    return TRAINING_UTILISATION * hardware.gpu.flops / (6 * size.active)


def _engine_rate(config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware, work: Workload) -> float:
    """Tokens a second and device: a step reads all weights, and the keys and values of all responses under way, once."""
    assert hardware.gpu is not None
    engine = need.sampling.engine
    memory = memory_of_engine(config, need, size, hardware, engine)
    at_once = responses_at_once(need, cached_tokens(size, engine, hardware, memory, work), work)
    length = _mean_length(need, work)
    read = (memory.parts["weights"] + at_once * sequence_bytes(size, engine, length, "gpu")) / hardware.gpu.bandwidth
    prefilled = work.prompt_tokens / max(
        1.0, need.sampling.n * work.response_tokens[need.speaker]
    )  # prompt tokens for one that is written
    computed = 2 * size.active * at_once * (1 + prefilled) / (hardware.gpu.flops * need.devices)
    return ENGINE_EFFICIENCY * at_once / max(read, computed) / need.devices


def cached_tokens(
    size: ModelSize, engine: Mapping[str, Any], hardware: Hardware, memory: Memory, work: Workload
) -> float:
    """Tokens that the cache holds, of sequences of the mean length."""
    length = work.prompt_tokens + max(work.response_tokens.values())
    return memory.parts["KV cache"] / sequence_bytes(size, engine, length, hardware.device) * length


def _mean_length(need: EngineNeed, work: Workload) -> float:
    """Tokens of a sequence while it is written."""
    return work.prompt_tokens + work.response_tokens[need.speaker] / 2


def responses_at_once(need: EngineNeed, cached_tokens: float, work: Workload) -> float:
    length = _mean_length(need, work)
    return max(1.0, min(float(need.sampling.engine.get("max_num_seqs") or 256), cached_tokens / length))


def cost_of(
    config: Config, time: dict[str, Any] | None, work: Workload, price: float | None
) -> dict[str, float] | None:
    """Money for devices, where a price is given, and for endpoints that have prices."""
    cost: dict[str, float] = {}
    if time is not None and price is not None:
        cost["devices"] = round(price * time["device_hours"], 2)
    teachers = config.all_teachers()
    shares = sum(teacher.share for teacher in teachers.values())
    for name, teacher in teachers.items():
        if teacher.endpoint is not None and work.prompts is not None:
            spent = _spent(teacher.endpoint, work, work.prompts * teacher.share / shares, config.sampling.teacher.n)
            if spent is not None:
                cost[f"endpoint {name}"] = round(spent, 2)
    return cost or None


def _spent(endpoint: Endpoint, work: Workload, prompts: float, n: int) -> float | None:
    """Every response is a request of its own, which pays for the prompt again."""
    if endpoint.input_price is None or endpoint.output_price is None:
        return None
    tokens = work.prompt_tokens * endpoint.input_price + work.response_tokens["teacher"] * endpoint.output_price
    return prompts * n * tokens / 1e6
