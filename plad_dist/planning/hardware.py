"""The hardware of a cluster: nodes, their devices and their memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from plad_dist.compat.linux import cgroup_limits
from plad_dist.devices import GPUS, Gpu, gpu_of
from plad_dist.errors import UserError
from plad_dist.planning.sizes import Device
from plad_dist.sampling.engine_placement import engines_use_gpus


@dataclass(frozen=True)
class Hardware:
    """A cluster of like nodes.

    Attributes:
        gpu: None for nodes without any.
        nodes: None for as many as are needed.
        host_memory: bytes of a node, None where it is not known.
        cpus: of a node, None where it is not known.
        source: how it is known, for the reader.
    """

    gpu: Gpu | None
    nodes: int | None
    gpus_per_node: int
    host_memory: float | None
    cpus: float | None = None
    source: str = "given"

    @property
    def device(self) -> Device:
        return "gpu" if self.gpu else "cpu"

    @property
    def name(self) -> str:
        return self.gpu.name if self.gpu else "cpu"


def hardware_here() -> Hardware:
    """This machine. Raises :class:`UserError` where its GPUs are of a kind that is not known."""
    import torch

    if not torch.cuda.is_available():
        return this_host()
    name = torch.cuda.get_device_name(0)
    gpu = gpu_of(name)
    if gpu is None:
        raise UserError(
            f"{name}: this GPU is not a kind that is known; name one like it to `plad plan` by --gpu: {', '.join(GPUS)}"
        )
    return replace(this_host(), gpu=gpu, gpus_per_node=torch.cuda.device_count())


def this_host() -> Hardware:
    """This machine without its GPUs, as far as its container lets it go."""
    memory = min(float(psutil.virtual_memory().total), cgroup_limits()[0])
    return Hardware(None, 1, 0, memory, source="this machine")


def hardware_of_nodes(nodes: Sequence[Mapping[str, float]]) -> Hardware | None:
    """The hardware of a cluster by its nodes' resources, those of its largest ones where they differ; None where nothing can be said.

    A cluster may grow, so the number of GPU nodes is not held against a config.
    """
    if engines_use_gpus() or any(node.get("GPU") for node in nodes):
        found = [
            Hardware(gpu, None, int(node["GPU"]), _node_memory(node))
            for node in nodes
            for name in node
            if name.startswith("accelerator_type:") and node.get("GPU", 0) >= 1
            if (gpu := gpu_of(name.partition(":")[2])) is not None
        ]
        return max(found, key=lambda one: (one.gpu.memory if one.gpu else 0, one.gpus_per_node), default=None)
    with_cpus = [node for node in nodes if node.get("CPU")]
    if not with_cpus:
        return None
    largest = max(with_cpus, key=_node_memory)
    return Hardware(None, len(with_cpus), 0, _node_memory(largest), largest["CPU"])


def _node_memory(node: Mapping[str, float]) -> float:
    """Bytes of a node: Ray takes a part of them for its objects."""
    return node.get("memory", 0.0) + node.get("object_store_memory", 0.0)
