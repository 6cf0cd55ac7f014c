"""Fit of a training phase: the memory of its workers, compared with that of devices and nodes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any

from plad_dist.config import Config, Optimizer, Training
from plad_dist.planning.hardware import USABLE_SHARE, Hardware
from plad_dist.planning.memory import Memory
from plad_dist.planning.problem import Problem, gib, parameters_text
from plad_dist.planning.sizes import ModelSize
from plad_dist.planning.training_memory import training_memory
from plad_dist.planning.workload import rejected_role, role_sampling

_MAX_WORKERS = 4096


def worker_share(hardware: Hardware, training: Training, workers: int) -> float:
    """Return the bytes of a device that each worker of a group may take.

    On CPUs, workers share their node.
    """
    sharing = 1 if hardware.gpu else workers_per_node(hardware, training, workers)
    return USABLE_SHARE * hardware.device_memory / sharing


def workers_per_node(hardware: Hardware, training: Training, workers: int) -> int:
    """Return the number of a group's workers on the fullest node.

    Ray Train packs workers onto nodes.
    """
    if hardware.gpu:
        return min(workers, hardware.gpus_per_node)
    if hardware.cpus is not None:
        return max(1, min(workers, int(hardware.cpus / training.cpus_per_worker)))
    return math.ceil(workers / (hardware.nodes or 1))


def group_fits(training: Training, optimizer: Optimizer, size: ModelSize, hardware: Hardware, workers: int) -> bool:
    """Return True if a group of so many workers fits its devices and its nodes."""
    memory = training_memory(size, training, optimizer, workers, hardware.device)
    on_node = memory.host * workers_per_node(hardware, training, workers)
    return memory.device <= worker_share(hardware, training, workers) and on_node <= (hardware.host_memory or math.inf)


def smallest_group(fits: Callable[[int], bool], least: int = 1) -> int | None:
    """Return the fewest workers that fit, or None if no number does.

    Args:
        fits: tells if a number of workers fits. If one number fits, all larger ones must fit too.
        least: smallest number to consider.
    """
    upper = least
    while not fits(upper):
        if upper >= _MAX_WORKERS:
            return None
        least, upper = upper + 1, min(2 * upper, _MAX_WORKERS)
    return least + bisect.bisect_left(range(least, upper), True, key=fits)


def longest_group(config: Config, size: ModelSize) -> int:
    """Return the tokens that a micro-batch must hold: the longest prompt with the longest responses
    of its pairs."""
    if config.training.max_group_tokens is not None:
        return config.training.max_group_tokens
    chosen, rejected = config.sampling.teacher, role_sampling(config, rejected_role(config))
    pairs = config.pairing.kept_pairs
    of_chosen, of_rejected = min(chosen.n, pairs), min(rejected.n, pairs)
    prompt = config.prompts.max_tokens or size.context
    if size.shares_prompts:
        return prompt + of_chosen * chosen.max_tokens + of_rejected * rejected.max_tokens
    return (of_chosen + of_rejected) * (prompt + max(chosen.max_tokens, rejected.max_tokens))


def training_problem(
    training: Training, optimizer: Optimizer, size: ModelSize, hardware: Hardware, longest: int
) -> Problem | None:
    """Return why the smallest worker group cannot train a model on this hardware, if so.

    Args:
        longest: tokens that a micro-batch must hold.
    """
    fewest, most = training.workers

    def fits(settings: Training, workers: int) -> bool:
        return group_fits(settings, optimizer, size, hardware, workers)

    if fits(training, fewest):
        return None
    changes = _memory_savings(training, optimizer, longest)
    remedies = [_settings(training, change) for change in changes if fits(training.model_copy(update=change), fewest)][
        :2
    ]
    enough = smallest_group(lambda workers: fits(training, workers), fewest)
    if enough is not None:
        remedies.append(f"training.num_workers={enough} or more")
    elif not remedies:
        remedies.append("a device with more memory, or training.lora")
    memory = training_memory(size, training, optimizer, fewest, hardware.device)
    excess = _excess(memory, training, hardware)
    description = f"training of {size.name} ({parameters_text(size)}) takes {excess}"
    return Problem(description, tuple(remedies), always=not fits(training, most))


def _memory_savings(training: Training, optimizer: Optimizer, longest: int) -> list[dict[str, Any]]:
    """Return changes of training settings that save memory, the cheapest first."""
    recompute = {"gradient_checkpointing": True}
    smaller = [tokens for tokens in (8192, 4096, 2048) if longest <= tokens < training.micro_batch_tokens]
    changes: list[dict[str, Any]] = [recompute, *(recompute | {"micro_batch_tokens": tokens} for tokens in smaller)]
    if optimizer.name != "adamw_8bit":  # DeepSpeed cannot offload it
        changes.append(recompute | {"deepspeed": "zero3_offload"})
    return changes


def _excess(memory: Memory, training: Training, hardware: Hardware) -> str:
    """Return how far the smallest worker group exceeds the memory of its devices or nodes."""
    workers = training.workers[0]
    share, on_node = worker_share(hardware, training, workers), workers_per_node(hardware, training, workers)
    if memory.device > share:
        device = hardware.name if hardware.gpu else "node's memory"
        sharing = ""
        if not hardware.gpu and on_node > 1:
            sharing = f" ({on_node} share a node of {gib(hardware.device_memory)} GiB)"
        return (
            f"{gib(memory.device)} GiB of a {device} with {workers_text(workers)}, {gib(share)} GiB are "
            f"available{sharing}"
        )
    return (
        f"{gib(memory.host * on_node)} GiB of a node's memory with {workers_text(on_node)} on it, "
        f"{gib(hardware.host_memory or 0)} GiB are available"
    )


def _settings(training: Training, changes: Mapping[str, object]) -> str:
    """Return changes as `key=value` arguments, without those that the config has already."""
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return " ".join(f"training.{key}={values[key]}" for key in changes if changes[key] != getattr(training, key))


def workers_text(number: int) -> str:
    """Return a number of workers in words, such as `2 workers`."""
    return f"{number} worker{'s' * (number > 1)}"
