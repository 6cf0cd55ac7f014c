"""How long a run takes and what it costs, from measured or given rates, or from what its devices can do at best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plad_dist.config import Config, Endpoint
from plad_dist.phases import phases_of
from plad_dist.planning.fit import memory_of_engine, nodes_for, size_trained
from plad_dist.planning.hardware import Hardware
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
    rates: Mapping[str, float],
) -> dict[str, Any] | None:
    """Hours of the stages, None where the prompts or the device's speed are not known.

    A stage whose speed nothing tells (a server without limits) has hours of None and is in no sum; starts of engines and workers are in
    none either. Servers answer while engines sample, so of these the longer counts.
    """
    if work.prompts is None or (hardware.gpu is None and not {"teacher", "student", "train"} <= rates.keys()):
        return None
    devices = (hardware.nodes or nodes_for(gpu_needs(config)[0], hardware)) * (hardware.gpus_per_node or 1)
    stages: dict[str, dict[str, float | None]] = {}

    def add(name: str, tokens: float, rate: float | None, used: int) -> float:
        hours = tokens / (rate * used) / 3600 if rate else None
        stages[name] = {
            "tokens": round(tokens),
            "tokens_per_s_per_device": round(rate, 1) if rate else None,
            "hours": round(hours, 3) if hours is not None else None,
            "device_hours": round(hours * devices, 2) if hours is not None else None,
        }
        return hours or 0.0

    teachers = config.all_teachers()
    shares = sum(teacher.share for teacher in teachers.values())
    of_servers, of_engines, of_training = [0.0], 0.0, 0.0
    for name, teacher in teachers.items():
        if teacher.endpoint is not None:
            share = teacher.share / shares
            role = f"teachers.{name}" if config.teachers else "teacher"
            tokens = share * _written(config, work, "teacher")
            rate = rates.get("teacher") or _server_rate(teacher.endpoint, work)
            of_servers.append(add(f"sample {role}", tokens, rate, 1))
    for need in engines_of(config):
        if need.judges:
            continue
        role = need.speaker
        rate = rates.get(role) or _engine_rate(config, need, sizes[need.role], hardware, work)
        share = 1.0
        if config.teachers and role == "teacher":
            share = config.teachers[need.role.removeprefix("teachers.")].share / shares
        most = devices // need.devices if need.sampling.replicas == "auto" else need.sampling.replicas
        used = max(1, min(most, devices // need.devices)) * need.devices
        of_engines += add(f"sample {need.role}", share * _written(config, work, role), rate, used)
    for name, phase in phases_of(config).items():
        rate = rates.get("train") or _training_rate(size_trained(name, sizes), hardware)
        used = min(config.training.workers[1], devices, phase.batch_groups)  # more have nothing to do in a step
        of_training += add(f"train {name}", work.trained_tokens(config, name), rate, used)
    hours = max(of_engines, *of_servers) + of_training
    return {"devices": devices, "stages": stages, "hours": round(hours, 2), "device_hours": round(hours * devices, 1)}


def _written(config: Config, work: Workload, role: str) -> float:
    """Tokens that a role writes: for the pairs of every round, and in answer to held-out prompts."""
    rounds = config.rounds.most if role == "student" else 1
    return rounds * work.sampled_tokens(config, role) + work.heldout_answers(config, role) * work.response_tokens[role]


def _server_rate(endpoint: Endpoint, work: Workload) -> float | None:
    """Tokens a second that a server's limits let it write; None where it has none."""
    answer = work.response_tokens["teacher"]
    limits = []
    if endpoint.requests_per_minute is not None:
        limits.append(endpoint.requests_per_minute * answer / 60)
    if endpoint.tokens_per_minute is not None:
        limits.append(endpoint.tokens_per_minute * answer / (work.prompt_tokens + answer) / 60)
    return min(limits, default=None)


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
        if teacher.endpoint is not None and work.sampled is not None:
            requests = work.sampled * config.sampling.teacher.n + work.heldout_answers(config, "teacher")
            spent = _spent(teacher.endpoint, work, requests * teacher.share / shares)
            if spent is not None:
                cost[f"endpoint {name}"] = round(spent, 2)
    return cost or None


def _spent(endpoint: Endpoint, work: Workload, requests: float) -> float | None:
    """Every response is a request of its own, which pays for the prompt again."""
    if endpoint.input_price is None or endpoint.output_price is None:
        return None
    tokens = work.prompt_tokens * endpoint.input_price + work.response_tokens["teacher"] * endpoint.output_price
    return requests * tokens / 1e6
