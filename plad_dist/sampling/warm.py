"""Warm engines: nurseries that import an engine's library before the engine is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from plad_dist.config import Config
from plad_dist.config.sampling import TRANSFORMERS
from plad_dist.fleet.fleet import Fleet
from plad_dist.fleet.placement import Placement
from plad_dist.nursery.actor import NurseryPlan, nurseries
from plad_dist.sampling.engine_actor import EngineActor
from plad_dist.sampling.engine_arguments import generates_by_transformers
from plad_dist.sampling.engine_choice import chosen_engine
from plad_dist.sampling.engine_placement import engine_environment, engines_use_gpus

_VLLM = "engine"
# Modules that a nursery imports, by the first part of its kind.
_MODULES = {
    _VLLM: (
        "plad_dist.sampling.engine_process",
        "plad_dist.sampling.engine",
        "vllm.v1.engine.core",
        "vllm.v1.engine.async_llm",
    ),
    TRANSFORMERS: (
        "plad_dist.sampling.engine_process",
        "plad_dist.sampling.generation.engine",
        "plad_dist.sampling.generation.model",
    ),
}


def nursery_of(engine: Mapping[str, Any], cpus: float) -> str:
    """Return the kind of the nurseries for engines with some arguments and CPU cores."""
    return f"{TRANSFORMERS if generates_by_transformers(engine) else _VLLM}-{max(1, int(cpus))}"


def modules_of(kind: str) -> tuple[str, ...]:
    """Return the modules that nurseries of a kind import."""
    return _MODULES[kind.partition("-")[0]]


@contextmanager
def warm_engines(config: Config, fleets: Sequence[Fleet]) -> Iterator[None]:
    """Keep nurseries for fleets while the block runs, on nodes that have room for their engines."""
    plans: dict[str, NurseryPlan] = {}
    placements: dict[str, list[Placement]] = {}
    for fleet in fleets:
        if fleet.worker is EngineActor and config.cluster.warm_starts:
            kind, blocks = str(fleet.arguments[0]), sum(len(assignment.blocks) for assignment in fleet.assignments)
            most = blocks if fleet.replicas == "auto" else min(blocks, 2 * fleet.replicas + 2)
            placements.setdefault(kind, []).append(fleet.placement)
            most += plans[kind].most_nodes if kind in plans else 0
            plans[kind] = NurseryPlan(kind, modules_of(kind), fleet.environment, _HasRoom(placements[kind]), most)
    with _kept(plans):
        yield


@contextmanager
def warm_local_engines(config: Config, after: str | None) -> Iterator[None]:
    """Keep nurseries for all engines of a config on the only node of a local Ray.

    Args:
        after: kind of a nursery that is needed earlier, so its imports come first; None for none.
    """
    plans: dict[str, NurseryPlan] = {}
    for _, model, _, sampling in config.responders():
        if model.endpoint is None and config.cluster.warm_starts:
            kind = nursery_of(chosen_engine(model, sampling.engine), sampling.cpus)
            environment, modules = engine_environment(sampling.cpus, has_gpus=engines_use_gpus()), modules_of(kind)
            plans[kind] = NurseryPlan(kind, modules, environment, lambda resources: True, most_nodes=1, after=after)
    with _kept(plans):
        yield


@contextmanager
def _kept(plans: Mapping[str, NurseryPlan]) -> Iterator[None]:
    with ExitStack() as kept:
        for plan in plans.values():
            kept.enter_context(nurseries(plan))
        yield


class _HasRoom:
    """Test if a node could hold an engine with one of some placements."""

    def __init__(self, placements: Sequence[Placement]) -> None:
        self._placements = placements

    def __call__(self, resources: Mapping[str, float]) -> bool:
        return any(
            resources.get("CPU", 0) >= placement.cpus and resources.get("GPU", 0) >= placement.gpus
            for placement in self._placements
        )
