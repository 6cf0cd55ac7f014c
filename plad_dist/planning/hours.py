"""Hours of a run: measured rates, or else a model of what the devices can do at best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plad_dist.config import Config
from plad_dist.phases import phases_of
from plad_dist.planning.engine_fit import memory_of_engine
from plad_dist.planning.engine_memory import kv_cache_bytes, kv_cache_tokens
from plad_dist.planning.engines import (
    EndpointSpec,
    EngineSpec,
    endpoint_specs,
    engine_specs,
    gpu_needs,
    teacher_share,
)
from plad_dist.planning.fit import trained_size
from plad_dist.planning.hardware import Hardware
from plad_dist.planning.memory import Memory
from plad_dist.planning.sizes import ModelSize
from plad_dist.planning.workload import Workload
from plad_dist.sampling.engine_arguments import max_sequences

# Share of the device's peak; docs/benchmarks.md has 0.20 for 1.1B and 0.28 for 6.7B parameters on
# one H200.
TRAINING_UTILISATION = 0.25
ENGINE_EFFICIENCY = 0.5  # share of memory bandwidth and arithmetic in generation; assumed, not measured


@dataclass(frozen=True)
class StageHours:
    """Time of one stage.

    Attributes:
        tokens: tokens that the stage generates or computes.
        rate: tokens a second and device, None if the speed is unknown, as for a server without
            limits.
        devices: devices that the stage uses.
    """

    tokens: float
    rate: float | None
    devices: int

    @property
    def hours(self) -> float | None:
        """None if the speed is unknown."""
        return self.tokens / (self.rate * self.devices) / 3600 if self.rate else None

    def to_json(self, cluster_devices: int) -> dict[str, float | None]:
        """Return rounded figures; `device_hours` are those of the whole cluster."""
        hours = self.hours
        return {
            "tokens": round(self.tokens),
            "tokens_per_s_per_device": round(self.rate, 1) if self.rate else None,
            "hours": round(hours, 3) if hours is not None else None,
            "device_hours": round(hours * cluster_devices, 2) if hours is not None else None,
        }


@dataclass(frozen=True)
class RunHours:
    """Time of a run, by stage.

    Attributes:
        devices: devices of the whole cluster.
    """

    devices: int
    endpoints: dict[str, StageHours]
    engines: dict[str, StageHours]
    training: dict[str, StageHours]

    @property
    def hours(self) -> float:
        """Hours of the run.

        Endpoints work beside the engines, so the longest counts; unknown hours count as 0.
        """
        endpoints = [stage.hours or 0.0 for stage in self.endpoints.values()]
        return max(_total(self.engines), 0.0, *endpoints) + _total(self.training)

    def to_json(self) -> dict[str, Any]:
        """Return rounded figures by stage and of the run."""
        stages = self.endpoints | self.engines | self.training
        return {
            "devices": self.devices,
            "stages": {name: stage.to_json(self.devices) for name, stage in stages.items()},
            "hours": round(self.hours, 2),
            "device_hours": round(self.hours * self.devices, 1),
        }


def _total(stages: Mapping[str, StageHours]) -> float:
    return sum(stage.hours or 0.0 for stage in stages.values())


def estimate_hours(
    config: Config,
    hardware: Hardware,
    sizes: dict[str, ModelSize],
    work: Workload,
    rates: Mapping[str, float],
) -> RunHours | None:
    """Return the hours of a run, or None if the prompts or the devices' speed are unknown.

    Starts of engines and workers are not included.

    Args:
        rates: measured tokens a second and device by `teacher`, `student` and `train`. The
            engines of another writer of rejected responses are taken to have the student's.
    """
    if work.prompts is None or (hardware.gpu is None and not {"teacher", "student", "train"} <= rates.keys()):
        return None
    nodes = hardware.nodes or hardware.nodes_for(gpu_needs(config)[0])
    devices = nodes * (hardware.gpus_per_node or 1)
    endpoints, engines, training = dict[str, StageHours](), dict[str, StageHours](), dict[str, StageHours]()
    for server in endpoint_specs(config):
        tokens = server.share * work.generated_tokens(config, server.role)
        rate = rates.get(server.role) or _endpoint_rate(server, work)
        endpoints[f"sample {server.label}"] = StageHours(tokens, rate, 1)
    for spec in engine_specs(config):
        if not spec.is_judge:
            is_teacher = spec.role == "teacher"
            share = teacher_share(config, spec.label.removeprefix("teachers.")) if is_teacher else 1.0
            tokens = share * work.generated_tokens(config, spec.role)
            measured = rates.get("student" if spec.role == "rejected" else spec.role)
            rate = measured or _engine_rate(config, spec, sizes[spec.label], hardware, work)
            engines[f"sample {spec.label}"] = StageHours(tokens, rate, _engine_devices_used(spec, devices))
    for name, phase in phases_of(config).items():
        rate = rates.get("train") or _training_rate(trained_size(name, sizes), hardware)
        used = min(config.training.workers[1], devices, phase.batch_groups)  # further workers are idle in every step
        training[f"train {name}"] = StageHours(work.trained_tokens(config, name), rate, used)
    return RunHours(devices, endpoints, engines, training)


def responses_at_once(spec: EngineSpec, cached_tokens: float, hardware: Hardware, work: Workload) -> float:
    """Return the responses that an engine generates at once: as many as its KV cache holds, up to
    `max_num_seqs`."""
    most = float(max_sequences(spec.sampling.engine, hardware.device))
    return max(1.0, min(most, cached_tokens / _mean_length(spec, work)))


def mean_cached_tokens(spec: EngineSpec, memory: Memory, size: ModelSize, hardware: Hardware, work: Workload) -> float:
    """Return the tokens that an engine's KV cache holds if all sequences are of the mean length."""
    length = work.prompt_tokens + max(work.response_tokens.values())
    return kv_cache_tokens(memory, size, spec.sampling.engine, length, hardware.device)


def _engine_devices_used(spec: EngineSpec, devices: int) -> int:
    """Return the devices of all engines of one kind that the cluster has room for."""
    room = devices // spec.devices
    replicas = room if spec.sampling.replicas == "auto" else spec.sampling.replicas
    return max(1, min(replicas, room)) * spec.devices


def _endpoint_rate(spec: EndpointSpec, work: Workload) -> float | None:
    """Return the tokens a second that a server's limits allow, or None if it has no limits."""
    endpoint, response = spec.endpoint, work.response_tokens[spec.role]
    limits = []
    if endpoint.requests_per_minute is not None:
        limits.append(endpoint.requests_per_minute * response / 60)
    if endpoint.tokens_per_minute is not None:
        limits.append(endpoint.tokens_per_minute * response / (work.prompt_tokens + response) / 60)
    return min(limits, default=None)


def _training_rate(size: ModelSize, hardware: Hardware) -> float:
    """Return tokens a second and device: 6 FLOPs per parameter and token (Chowdhery et al. 2022,
    appendix B)."""
    assert hardware.gpu is not None
    return TRAINING_UTILISATION * hardware.gpu.flops / (6 * size.active_parameters)


def _engine_rate(config: Config, spec: EngineSpec, size: ModelSize, hardware: Hardware, work: Workload) -> float | None:
    """Return tokens a second and device, or None if the speed of the device is unknown.

    Each step reads all weights once, and the keys and values of all responses in progress.
    """
    if hardware.gpu is None:
        return None
    engine = spec.sampling.engine
    memory = memory_of_engine(config, spec, size, hardware, engine)
    responses = responses_at_once(spec, mean_cached_tokens(spec, memory, size, hardware, work), hardware, work)
    cache = responses * kv_cache_bytes(size, engine, _mean_length(spec, work), "gpu")
    read_s = (memory.parts["weights"] + cache) / hardware.gpu.bandwidth
    prompt_tokens_per_token = work.prompt_tokens / max(1.0, spec.sampling.n * work.response_tokens[spec.role])
    flops = 2 * size.active_parameters * responses * (1 + prompt_tokens_per_token)
    compute_s = flops / (hardware.gpu.flops * spec.devices)
    return ENGINE_EFFICIENCY * responses / max(read_s, compute_s) / spec.devices


def _mean_length(spec: EngineSpec, work: Workload) -> float:
    """Return the mean tokens of a sequence while it is generated."""
    return work.prompt_tokens + work.response_tokens[spec.role] / 2
