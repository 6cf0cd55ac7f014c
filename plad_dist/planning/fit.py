"""Whether a config fits a cluster: what every worker and every engine takes, against what its device and its node have."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from plad_dist.config import Config, Optimizer, Training
from plad_dist.devices import GIB, GPUS, gpu_of
from plad_dist.errors import UserError
from plad_dist.holders import Holder
from plad_dist.phases import TEACHER, phases_of
from plad_dist.planning.hardware import Hardware, hardware_here, this_host
from plad_dist.planning.memory import Memory, engine_memory, memory_share, training_memory
from plad_dist.planning.needs import EngineNeed, engines_of, gpu_needs
from plad_dist.planning.sizes import Device, ModelSize, size_of
from plad_dist.rundir import RunDir

_SPARE = 0.97  # of a device's memory that is planned with
_MOST_WORKERS = 4096


def hardware_of(gpu: str | None, nodes: int | None, gpus_per_node: int | None, config: Config) -> Hardware:
    """The cluster that is asked about.

    Args:
        gpu: a kind of GPU, or `cpu` for machines as this one without any; None for the GPUs here, else this machine where the config fits
            it, else for H100s.
        nodes: None for as many as are needed.
        gpus_per_node: None for as many as are here, or 8.

    Raises:
        UserError: no such kind.
    """
    if gpu == "cpu":
        return replace(this_host(), nodes=nodes or 1)
    if gpu is not None:
        kind = GPUS.get(gpu.lower()) or gpu_of(gpu)
        if kind is None:
            raise UserError(f"--gpu {gpu!r}: not known; expected one of {', '.join(GPUS)}, or cpu")
        return Hardware(kind, nodes, gpus_per_node or 8, None)
    here = hardware_here()
    here = replace(here, nodes=nodes or 1, gpus_per_node=gpus_per_node or here.gpus_per_node if here.gpu else 0)
    if here.gpu is not None or (nodes is None and not check_fits(config, here)):
        return here
    return Hardware(GPUS["h100-80g"], nodes, gpus_per_node or 8, None, source="assumed: name others by --gpu")


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


def check_fits(config: Config, hardware: Hardware, remaining: Collection[Holder] | None = None) -> list[Problem]:
    """What of a config does not fit.

    Args:
        remaining: parts of the run that are still to do; None for all.

    Raises:
        UserError: a model cannot be sized.
    """
    sizes = sizes_of(config, hardware.device)
    longest = longest_group(config, sizes["student"].context)
    found: dict[str, Problem] = {}
    for name, phase in phases_of(config).items():
        if remaining is None or Holder("train", name) in remaining:
            problem = training_problem(config.training, phase.optimizer, size_trained(name, sizes), hardware, longest)
            if problem is not None:
                found[problem.what] = problem
    for need in engines_of(config):
        if remaining is None or need.holder in remaining:
            found |= {problem.what: problem for problem in engine_problems(config, need, sizes[need.role], hardware)}
    if hardware.gpu and hardware.nodes is not None:
        fewest, _ = gpu_needs(config)
        if fewest > hardware.nodes * hardware.gpus_per_node:
            what = (
                f"the config needs {fewest} GPUs at least, the cluster has {hardware.nodes} x {hardware.gpus_per_node}"
            )
            remedy = f"{nodes_for(fewest, hardware)} nodes, or fewer training.num_workers and sampling.*.min_replicas"
            found[what] = Problem(what, (remedy,))
    return list(found.values())


def sizes_of(config: Config, device: Device) -> dict[str, ModelSize]:
    """Size by role of every model that engines run or the trainer trains. Raises :class:`UserError` where one cannot be sized."""
    made = RunDir.of(config).storage.local_root
    sizes = {}
    for need in engines_of(config):
        sizes[need.role] = size_of(need.model, device, made / "models" / f"{need.speaker}-init" if made else None)
    return sizes


def capacity(hardware: Hardware) -> float:
    """Bytes of a device; on CPUs, of a node."""
    return hardware.gpu.memory if hardware.gpu else hardware.host_memory or math.inf


def share_of_worker(hardware: Hardware, training: Training, workers: int) -> float:
    """Bytes of the device that one of so many workers may take: on CPUs they share a node."""
    together = 1 if hardware.gpu else workers_on_a_node(hardware, training, workers)
    return _SPARE * capacity(hardware) / together


def workers_on_a_node(hardware: Hardware, training: Training, workers: int) -> int:
    """Workers on the fullest node: Ray Train packs them."""
    if hardware.gpu:
        return min(workers, hardware.gpus_per_node)
    if hardware.cpus is not None:
        return max(1, min(workers, int(hardware.cpus / training.cpus_per_worker)))
    return math.ceil(workers / (hardware.nodes or 1))


def smallest(fits: Callable[[int], bool], least: int = 1) -> int | None:
    """The fewest workers that fit, where more never take more of a device."""
    enough = least
    while not fits(enough):
        if enough >= _MOST_WORKERS:
            return None
        least, enough = enough + 1, min(2 * enough, _MOST_WORKERS)
    return least + bisect.bisect_left(range(least, enough), True, key=fits)


def size_trained(name: str, sizes: dict[str, ModelSize]) -> ModelSize:
    """The size of the model that a phase trains."""
    return sizes["teacher" if name == TEACHER else "student"]


def fits_workers(training: Training, optimizer: Optimizer, size: ModelSize, hardware: Hardware, workers: int) -> bool:
    """Whether so many workers fit their devices and their nodes."""
    takes = training_memory(size, training, optimizer, workers, hardware.device)
    host = takes.host * workers_on_a_node(hardware, training, workers)
    return takes.device <= share_of_worker(hardware, training, workers) and host <= (hardware.host_memory or math.inf)


def longest_group(config: Config, context: int) -> int:
    """Tokens that a micro-batch must hold: a prompt and the responses of its pairs, at their longest."""
    if config.training.max_group_tokens is not None:
        return config.training.max_group_tokens
    teacher, student = config.sampling.teacher, config.sampling.student
    kept = config.pairing.kept_pairs
    responses = min(teacher.n, kept) * teacher.max_tokens + min(student.n, kept) * student.max_tokens
    return (config.prompts.max_tokens or context) + responses


def training_problem(
    training: Training, optimizer: Optimizer, size: ModelSize, hardware: Hardware, longest: int
) -> Problem | None:
    """What is wrong with training a model on this hardware by its fewest workers.

    Args:
        longest: tokens that a micro-batch must hold.
    """
    fewest, most = training.workers

    def fits(settings: Training, workers: int) -> bool:
        return fits_workers(settings, optimizer, size, hardware, workers)

    if fits(training, fewest):
        return None
    takes = training_memory(size, training, optimizer, fewest, hardware.device)
    share, together = share_of_worker(hardware, training, fewest), workers_on_a_node(hardware, training, fewest)
    recomputed = {"gradient_checkpointing": True}
    smaller = [tokens for tokens in (8192, 4096, 2048) if longest <= tokens < training.micro_batch_tokens]
    offloaded = [recomputed | {"deepspeed": "zero3_offload"}] if optimizer.name != "adamw_8bit" else []
    changes: list[dict[str, Any]] = [
        recomputed,
        *(recomputed | {"micro_batch_tokens": tokens} for tokens in smaller),
        *offloaded,
    ]
    remedies = [_settings(training, one) for one in changes if fits(training.model_copy(update=one), fewest)][:2]
    enough = smallest(lambda workers: fits(training, workers), fewest)
    if enough is not None:
        remedies.append(f"training.num_workers={enough} or more")
    elif not remedies:
        remedies.append("a device with more memory, or training.lora")
    if takes.device > share:
        of = hardware.name if hardware.gpu else "node's memory"
        shared = (
            f" ({together} share a node of {gib(capacity(hardware))} GiB)" if not hardware.gpu and together > 1 else ""
        )
        figures = f"{gib(takes.device)} GiB of a {of} with {workers_text(fewest)}, {gib(share)} GiB are there{shared}"
    else:
        figures = f"{gib(takes.host * together)} GiB of a node's memory with {workers_text(together)} on it, {gib(hardware.host_memory or 0)} GiB are there"
    what = f"training of {size.name} ({_billions(size)}) takes {figures}"
    return Problem(what, tuple(remedies), always=not fits(training, most))


def _settings(training: Training, changes: Mapping[str, object]) -> str:
    """Changes as they are typed, without what is so already."""
    words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return " ".join(f"training.{key}={words[key]}" for key in changes if changes[key] != getattr(training, key))


def engine_problems(config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware) -> Iterator[Problem]:
    """What is wrong with one kind of engines on this hardware."""
    longest, tensor = need.model.max_length, int(need.sampling.engine.get("tensor_parallel_size", 1))
    key = f"{need.key}.engine.tensor_parallel_size"
    stretched = "hf_overrides" in need.sampling.engine
    if longest is not None and size.positions is not None and longest > size.positions and not stretched:
        yield Problem(
            f"{need.model_key}.max_length: {longest:,}: {size.name} has {size.positions:,} positions",
            (f"{need.model_key}.max_length={size.positions}",),
        )
    if hardware.gpu and tensor > hardware.gpus_per_node:
        yield Problem(
            f"{key}: {tensor}: a node has {hardware.gpus_per_node} GPUs",
            (f"{key}={hardware.gpus_per_node}, and pipeline_parallel_size over nodes",),
        )
        return
    if size.heads % tensor:
        divisors = ", ".join(str(n) for n in range(1, max(hardware.gpus_per_node, tensor) + 1) if size.heads % n == 0)
        yield Problem(
            f"{key}: {tensor}: does not divide the {size.heads} heads of {size.name}", (f"{key} of {divisors}",)
        )
        return
    takes = memory_of_engine(config, need, size, hardware, need.sampling.engine).device
    if takes <= engine_share(need.sampling.engine, hardware):
        return
    enough = smallest_parallelism(config, need, size, hardware)
    remedies = [f"{need.key}.engine.tensor_parallel_size={enough}"] if enough else []
    if "kv_cache_memory_bytes" in need.sampling.engine:
        remedies.append(f"a smaller {need.key}.engine.kv_cache_memory_bytes")
    remedies.append("a smaller max_length of the model, or a quantized one")
    yield Problem(
        f"{need.role}: an engine of {size.name} ({_billions(size)}) takes {gib(takes)} GiB of each of {need.devices} {hardware.name}, "
        f"{gib(engine_share(need.sampling.engine, hardware))} GiB are there",
        tuple(remedies),
    )


def engine_share(engine: Mapping[str, Any], hardware: Hardware) -> float:
    """Bytes of a device that an engine lets itself take."""
    return memory_share(engine) * capacity(hardware) if hardware.gpu else _SPARE * capacity(hardware)


def memory_of_engine(
    config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware, engine: dict[str, Any]
) -> Memory:
    own = engine.get("max_model_len")
    context = min(size.context, own) if isinstance(own, int) and own > 0 else size.context
    longest = min(context, (config.prompts.max_tokens or context) + need.sampling.max_tokens)
    if own in (-1, "auto"):  # the engine takes what fits
        longest = 1
    return engine_memory(size, engine, longest, hardware.device, engine_share(engine, hardware))


def smallest_parallelism(config: Config, need: EngineNeed, size: ModelSize, hardware: Hardware) -> int | None:
    """Fewest GPUs of a node that hold a model with room for one sequence; its heads must divide among them."""
    if hardware.gpu is None:
        return None
    for tensor in (n for n in (1, 2, 4, 8, 16, 32) if n <= hardware.gpus_per_node and size.heads % n == 0):
        engine = {**need.sampling.engine, "tensor_parallel_size": tensor}
        if memory_of_engine(config, need, size, hardware, engine).device <= engine_share(engine, hardware):
            return tensor
    return None


def nodes_for(devices: int, hardware: Hardware) -> int:
    return max(1, math.ceil(devices / hardware.gpus_per_node)) if hardware.gpu else 1


def gib(value: float) -> float:
    return round(value / GIB, 2)


def workers_text(number: int) -> str:
    return f"{number} worker{'s' * (number > 1)}"


def _billions(size: ModelSize) -> str:
    return f"{size.parameters / 1e9:.1f}B" if size.parameters >= 1e8 else f"{size.parameters / 1e6:.1f}M"
