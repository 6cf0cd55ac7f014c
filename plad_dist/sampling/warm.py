"""Warm engines: nurseries that import vLLM before an engine is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from plad_dist.config import Config, RoleSampling
from plad_dist.fleet.placement import Placement
from plad_dist.nursery.actor import NurseryPlan, nurseries
from plad_dist.sampling.engine_placement import engine_environment, engines_use_gpus, place

MODULES = (
    "plad_dist.sampling.engine_process",
    "plad_dist.sampling.engine",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
)
_ALL_NODES = 10**6


@contextmanager
def warm_engines(config: Config) -> Iterator[None]:
    """Keep nurseries on the nodes that engines can use while the block runs."""
    with ExitStack() as kept:
        for plan in _plans(config) if config.cluster.warm_starts else ():
            kept.enter_context(nurseries(plan))
        yield


def nursery_of(sampling: RoleSampling) -> str:
    """Return the kind of the nurseries for engines with the threads of a role."""
    return f"engine-{max(1, int(sampling.cpus))}"


def _plans(config: Config) -> list[NurseryPlan]:
    """Return the nurseries of all engines, one of each kind."""
    has_gpus = engines_use_gpus()
    plans: dict[str, NurseryPlan] = {}
    for _, model, _, sampling in config.responders():
        if model.endpoint is None:
            placement = place(sampling.engine, sampling.cpus, has_gpus=has_gpus)
            environment = engine_environment(sampling.cpus, has_gpus=has_gpus)
            most_nodes = _ALL_NODES if sampling.replicas == "auto" else 2 * sampling.replicas + 2
            kind = nursery_of(sampling)
            plans[kind] = NurseryPlan(kind, MODULES, environment, _HasRoom(placement), most_nodes)
    return list(plans.values())


class _HasRoom:
    """Test if a node could hold an engine."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def __call__(self, resources: Mapping[str, float]) -> bool:
        return resources.get("CPU", 0) >= self._placement.cpus and resources.get("GPU", 0) >= self._placement.gpus
