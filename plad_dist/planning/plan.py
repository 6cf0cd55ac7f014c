"""Whether a config fits a cluster, and what it takes there: memory part by part, disk, time and money, before a device is held."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from plad_dist.config import Config, Endpoint, LlmJudge, Optimizer, Training
from plad_dist.devices import GIB, GPUS, Gpu, gpu_of
from plad_dist.errors import UserError
from plad_dist.phases import TEACHER, phases_of
from plad_dist.planning.memory import Memory, engine_memory, memory_share, sequence_bytes, training_memory
from plad_dist.planning.needs import EngineNeed, engines_of, gpu_needs
from plad_dist.planning.sizes import Device, ModelSize, size_of
from plad_dist.planning.workload import Workload, disk_bytes, workload_of
from plad_dist.rundir import RunDir

_SPARE = 0.97  # of a device's memory that is planned with
_TRAINING_UTILISATION = (
    0.25  # of the peak; docs/benchmarks.md has 0.20 for 1.1B and 0.28 for 6.7B parameters on one H200
)
_ENGINE_EFFICIENCY = 0.5  # of memory bandwidth and arithmetic while an engine writes; assumed, not measured
_EVEN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Hardware:
    """A cluster of like nodes.

    Attributes:
        gpu: None for nodes without any.
        nodes: None for as many as are needed.
        host_memory: bytes of a node, None where it is not known.
        cpus: of a node, None where it is not known.
    """

    gpu: Gpu | None
    nodes: int | None
    gpus_per_node: int
    host_memory: float | None
    cpus: float | None = None

    @property
    def device(self) -> Device:
        return "gpu" if self.gpu else "cpu"

    @property
    def name(self) -> str:
        return self.gpu.name if self.gpu else "cpu"


def hardware_of(gpu: str | None, nodes: int | None, gpus_per_node: int, config: Config) -> Hardware:
    """The cluster that is asked about: a kind of GPU, `cpu` for this machine's memory, or None for what suits the config.

    Raises:
        UserError: no such kind.
    """
    here = Hardware(None, nodes or 1, 0, float(psutil.virtual_memory().total))
    if gpu == "cpu":
        return here
    if gpu is not None:
        kind = GPUS.get(gpu.lower()) or gpu_of(gpu)
        if kind is None:
            raise UserError(f"--gpu {gpu}: not known; expected one of {', '.join(GPUS)}, or cpu")
        return Hardware(kind, nodes, gpus_per_node, None)
    found = _gpu_here()
    if found is not None:
        return Hardware(found[0], nodes or 1, found[1], here.host_memory)
    if nodes is None and not check_fits(config, here):
        return here
    return Hardware(GPUS["h100-80g"], nodes, gpus_per_node, None)


def _gpu_here() -> tuple[Gpu, int] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = gpu_of(torch.cuda.get_device_name(0))
    return (gpu, torch.cuda.device_count()) if gpu else None


@dataclass(frozen=True)
class Problem:
    """Something that does not fit.

    Attributes:
        what: with the figures.
        remedies: config keys to change, the cheapest first.
        always: it would not fit with the most workers either; else a group that shrinks to its fewest would run out of memory.
    """

    what: str
    remedies: tuple[str, ...]
    always: bool = True

    def __str__(self) -> str:
        return self.what + "".join(f"\n    {remedy}" for remedy in self.remedies)


def check_fits(config: Config, hardware: Hardware, holds: Collection[str] | None = None) -> list[Problem]:
    """What of a config does not fit.

    Args:
        holds: what is still to do, of `train <phase>`, `sample teacher`, `sample student` and `judge`; None for all.

    Raises:
        UserError: a model cannot be sized.
    """
    sizes = sizes_of(config, hardware.device)
    found: dict[str, Problem] = {}
    for name, phase in phases_of(config).items():
        if holds is None or f"train {name}" in holds:
            problem = _of_training(config.training, phase.optimizer, _trained(name, sizes), hardware)
            if problem is not None:
                found[problem.what] = problem
    for need in engines_of(config):
        if holds is None or need.held_by in holds:
            found |= {problem.what: problem for problem in _of_engine(config, need, sizes[need.role], hardware)}
    if hardware.gpu and hardware.nodes is not None:
        fewest, _ = gpu_needs(config)
        if fewest > hardware.nodes * hardware.gpus_per_node:
            what = (
                f"the config needs {fewest} GPUs at least, the cluster has {hardware.nodes} x {hardware.gpus_per_node}"
            )
            remedy = f"--nodes {_nodes(fewest, hardware)}, or fewer training.num_workers and sampling.*.min_replicas"
            found[what] = Problem(what, (remedy,))
    return list(found.values())


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
    time = _time(config, hardware, sizes, work, rates or {})
    return {
        "fits": not problems,
        "problems": [asdict(problem) for problem in problems],
        "hardware": {
            "device": hardware.name,
            "memory_gib": _gib(_capacity(hardware)),
            "devices_per_node": hardware.gpus_per_node or None,
            "nodes": hardware.nodes or _nodes(fewest, hardware),
        },
        "gpus": {"fewest": fewest, "most": most} if hardware.gpu else {"fewest": 0, "most": 0},
        "models": {name: {"name": size.name, "parameters": size.parameters} for name, size in sizes.items()},
        "training": {name: _phase_plan(config, name, sizes, hardware) for name in phases_of(config)},
        "sampling": {need.role: _engine_plan(config, need, sizes, hardware, work) for need in engines_of(config)},
        "disk_gib": _gibs(disk_bytes(config, work, sizes, hardware.device)),
        "work": {"prompts": work.prompts, "prompt_tokens": work.prompt_tokens, "response_tokens": work.response_tokens},
        "time": time,
        "cost": _cost(config, time, work, price),
        "assumptions": _assumptions(config, work, rates or {}),
    }


def sizes_of(config: Config, device: Device) -> dict[str, ModelSize]:
    """Size by role of every model that engines run or the trainer trains. Raises :class:`UserError` where one cannot be sized."""
    made = RunDir.of(config).storage.local_root
    sizes = {}
    for need in engines_of(config):
        sizes[need.role] = size_of(need.model, device, made / "models" / f"{need.speaker}-init" if made else None)
    return sizes


# ------------------------------------------------------------------------------------------------------------ memory


def _capacity(hardware: Hardware) -> float:
    """Bytes of a device; on CPUs, of a node."""
    return hardware.gpu.memory if hardware.gpu else hardware.host_memory or math.inf


def _share(hardware: Hardware, training: Training, workers: int) -> float:
    """Bytes of the device that one of so many workers may take: on CPUs they share a node."""
    together = 1 if hardware.gpu else _on_a_node(hardware, training, workers)
    return _SPARE * _capacity(hardware) / together


def _on_a_node(hardware: Hardware, training: Training, workers: int) -> int:
    """Workers on the fullest node: Ray Train packs them."""
    if hardware.gpu:
        return min(workers, hardware.gpus_per_node)
    if hardware.cpus is not None:
        return max(1, min(workers, int(hardware.cpus / training.cpus_per_worker)))
    return math.ceil(workers / (hardware.nodes or 1))


def _trained(name: str, sizes: dict[str, ModelSize]) -> ModelSize:
    return sizes["teacher" if name == TEACHER else "student"]


def _of_training(training: Training, optimizer: Optimizer, size: ModelSize, hardware: Hardware) -> Problem | None:
    fewest, most = training.workers

    def fits(settings: Training, workers: int) -> bool:
        takes = training_memory(size, settings, optimizer, workers, hardware.device)
        host = takes.host * _on_a_node(hardware, settings, workers)
        return takes.device <= _share(hardware, settings, workers) and host <= (hardware.host_memory or math.inf)

    if fits(training, fewest):
        return None
    takes = training_memory(size, training, optimizer, fewest, hardware.device)
    share, together = _share(hardware, training, fewest), _on_a_node(hardware, training, fewest)
    recomputed = {"gradient_checkpointing": True}
    smaller = [tokens for tokens in (8192, 4096, 2048) if tokens < training.micro_batch_tokens]
    changes: list[dict[str, Any]] = [
        recomputed,
        *(recomputed | {"micro_batch_tokens": tokens} for tokens in smaller),
        recomputed | {"deepspeed": "zero3_offload"},
    ]
    remedies = [_settings(training, one) for one in changes if fits(training.model_copy(update=one), fewest)][:2]
    enough = next((workers for workers in _EVEN if workers > fewest and fits(training, workers)), None)
    if enough is not None:
        remedies.append(f"training.num_workers={enough} or more")
    elif not remedies:
        remedies.append("a device with more memory, or training.lora")
    if takes.device > share:
        figures = f"{_gib(takes.device)} GiB of a {hardware.name} with {_workers(fewest)}, {_gib(share)} GiB are there"
    else:
        figures = f"{_gib(takes.host * together)} GiB of a node's memory with {_workers(together)} on it, {_gib(hardware.host_memory or 0)} GiB are there"
    what = f"training of {size.name} ({_billions(size)}) takes {figures}"
    return Problem(what, tuple(remedies), always=not fits(training, most))


def _settings(training: Training, changes: Mapping[str, object]) -> str:
    """Changes as they are typed, without what is so already."""
    words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return " ".join(f"training.{key}={words[key]}" for key in changes if changes[key] != getattr(training, key))


def _of_engine(config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware) -> Iterator[Problem]:
    if hardware.gpu and int(need.sampling.engine.get("tensor_parallel_size", 1)) > hardware.gpus_per_node:
        yield Problem(
            f"{need.key}.engine.tensor_parallel_size: {need.devices}: a node has {hardware.gpus_per_node} GPUs",
            (
                f"{need.key}.engine.tensor_parallel_size={hardware.gpus_per_node}, and pipeline_parallel_size over nodes",
            ),
        )
        return
    takes = _engine_memory(config, need, size, hardware, need.sampling.engine).device
    if takes <= _engine_share(need.sampling.engine, hardware):
        return
    enough = _smallest_parallelism(config, need, size, hardware)
    remedies = [f"{need.key}.engine.tensor_parallel_size={enough}"] if enough else []
    if "kv_cache_memory_bytes" in need.sampling.engine:
        remedies.append(f"a smaller {need.key}.engine.kv_cache_memory_bytes")
    remedies.append("a smaller max_length of the model, or a quantized one")
    yield Problem(
        f"{need.role}: an engine of {size.name} ({_billions(size)}) takes {_gib(takes)} GiB of each of {need.devices} {hardware.name}, "
        f"{_gib(_engine_share(need.sampling.engine, hardware))} GiB are there",
        tuple(remedies),
    )


def _engine_share(engine: Mapping[str, Any], hardware: Hardware) -> float:
    """Bytes of a device that an engine lets itself take."""
    return memory_share(engine) * _capacity(hardware) if hardware.gpu else _SPARE * _capacity(hardware)


def _engine_memory(
    config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware, engine: dict[str, Any]
) -> Memory:
    own = engine.get("max_model_len")
    context = min(size.context, own) if isinstance(own, int) and own > 0 else size.context
    longest = min(context, (config.prompts.max_tokens or context) + need.sampling.max_tokens)
    return engine_memory(size, engine, longest, hardware.device, _engine_share(engine, hardware))


def _smallest_parallelism(config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware) -> int | None:
    """Fewest GPUs of a node that hold a model with room for one sequence; its heads must divide among them."""
    if hardware.gpu is None:
        return None
    for tensor in (n for n in _EVEN if n <= hardware.gpus_per_node and size.heads % n == 0):
        engine = {**need.sampling.engine, "tensor_parallel_size": tensor}
        if _engine_memory(config, need, size, hardware, engine).device <= _engine_share(engine, hardware):
            return tensor
    return None


def _phase_plan(config: Config, name: str, sizes: dict[str, ModelSize], hardware: Hardware) -> dict[str, Any]:
    training, size = config.training, _trained(name, sizes)
    optimizer = phases_of(config)[name].optimizer

    def memory(workers: int) -> Memory:
        return training_memory(size, training, optimizer, workers, hardware.device)

    fewest, most = training.workers
    smallest = next((w for w in _EVEN if memory(w).device <= _share(hardware, training, w)), None)
    found = memory(fewest)
    return {
        "workers": [fewest, most],
        "smallest_workers": smallest,
        "device_gib": _gib(found.device),
        "parts_gib": _gibs({**found.parts, **found.alternatives}),
        "largest_alternative_counts": list(found.alternatives),
        "host_gib_per_worker": _gib(found.host),
        "device_gib_at_most_workers": _gib(memory(most).device),
        "fits": _of_training(training, optimizer, size, hardware) is None,
    }


def _engine_plan(
    config: Config, need: EngineNeed, sizes: dict[str, ModelSize], hardware: Hardware, work: Workload
) -> dict[str, Any]:
    size, engine = sizes[need.role], need.sampling.engine
    found = _engine_memory(config, need, size, hardware, engine)
    cached = _cached_tokens(size, engine, hardware, found, work)
    return {
        "tensor_parallel_size": int(engine.get("tensor_parallel_size", 1)),
        "smallest_tensor_parallel_size": _smallest_parallelism(config, need, size, hardware),
        "devices_per_engine": need.devices,
        "replicas": need.sampling.replicas,
        "min_replicas": need.sampling.min_replicas,
        "device_gib": _gib(found.device),
        "parts_gib": _gibs(found.parts),
        "kv_cache_tokens": round(cached),
        "responses_at_once": round(_at_once(need, cached, work)),
        "fits": found.device <= _engine_share(engine, hardware),
    }


def _cached_tokens(
    size: ModelSize, engine: Mapping[str, Any], hardware: Hardware, memory: Memory, work: Workload
) -> float:
    """Tokens that the cache holds, of sequences of the mean length."""
    length = work.prompt_tokens + max(work.response_tokens.values())
    return memory.parts["KV cache"] / sequence_bytes(size, engine, length, hardware.device) * length


def _mean_length(need: EngineNeed, work: Workload) -> float:
    """Tokens of a sequence while it is written."""
    return work.prompt_tokens + work.response_tokens[need.speaker] / 2


def _at_once(need: EngineNeed, cached_tokens: float, work: Workload) -> float:
    length = _mean_length(need, work)
    return max(1.0, min(float(need.sampling.engine.get("max_num_seqs") or 256), cached_tokens / length))


# ---------------------------------------------------------------------------------------------------- time and money


def _time(
    config: Config,
    hardware: Hardware,
    sizes: dict[str, ModelSize],
    work: Workload,
    rates: dict[str, float],
) -> dict[str, Any] | None:
    """Hours of the stages, None where the prompts or the device's speed are not known."""
    if work.prompts is None or (hardware.gpu is None and not {"teacher", "student", "train"} <= rates.keys()):
        return None
    devices = (hardware.nodes or _nodes(gpu_needs(config)[0], hardware)) * hardware.gpus_per_node or 1
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
        rate = rates.get("train") or _training_rate(_trained(name, sizes), hardware)
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
    return _TRAINING_UTILISATION * hardware.gpu.flops / (6 * size.active)


def _engine_rate(config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware, work: Workload) -> float:
    """Tokens a second and device: a step reads all weights, and the keys and values of all responses under way, once."""
    assert hardware.gpu is not None
    engine = need.sampling.engine
    memory = _engine_memory(config, need, size, hardware, engine)
    at_once = _at_once(need, _cached_tokens(size, engine, hardware, memory, work), work)
    length = _mean_length(need, work)
    read = (memory.parts["weights"] + at_once * sequence_bytes(size, engine, length, "gpu")) / hardware.gpu.bandwidth
    prefilled = work.prompt_tokens / max(
        1.0, need.sampling.n * work.response_tokens[need.speaker]
    )  # prompt tokens for one that is written
    computed = 2 * size.active * at_once * (1 + prefilled) / (hardware.gpu.flops * need.devices)
    return _ENGINE_EFFICIENCY * at_once / max(read, computed) / need.devices


def _cost(config: Config, time: dict[str, Any] | None, work: Workload, price: float | None) -> dict[str, float] | None:
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


def _assumptions(config: Config, work: Workload, rates: dict[str, float]) -> list[str]:
    lines = [f"{name.replace('_', ' ')}: {source}" for name, source in work.sources.items()]
    if any(isinstance(judge, LlmJudge) and judge.model.endpoint for judge in config.evaluation.judges.values()):
        lines.append("money for judges behind endpoints is not counted")
    if "train" not in rates:
        lines.append(
            f"training at {_TRAINING_UTILISATION:.0%} of the device's peak (measured: 20% at 1.1B, 28% at 6.7B parameters)"
        )
    if not {"teacher", "student"} <= rates.keys():
        lines.append(
            f"engines at {_ENGINE_EFFICIENCY:.0%} of memory bandwidth and arithmetic: assumed; give --teacher-rate, --student-rate"
        )
    return lines


def _nodes(devices: int, hardware: Hardware) -> int:
    return max(1, math.ceil(devices / hardware.gpus_per_node)) if hardware.gpu else 1


def _gib(value: float) -> float:
    return round(value / GIB, 2)


def _gibs(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _gib(value) for name, value in values.items()}


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number > 1)}"


def _billions(size: ModelSize) -> str:
    return f"{size.parameters / 1e9:.1f}B" if size.parameters >= 1e8 else f"{size.parameters / 1e6:.1f}M"
