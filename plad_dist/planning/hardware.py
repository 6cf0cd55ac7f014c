"""Hardware of a cluster: its nodes, their devices and their memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from plad_dist.compat.linux import cgroup_limits
from plad_dist.devices import GPUS, Gpu, gpu_of
from plad_dist.errors import UserError
from plad_dist.planning.sizes import Device
from plad_dist.sampling.engine_placement import engines_use_gpus

USABLE_SHARE = 0.97  # of a device's memory; plans leave the rest free


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes.

    Attributes:
        gpu: kind of the GPUs, None for nodes without GPUs.
        nodes: number of nodes, None for as many as needed.
        host_memory: bytes of a node's memory, None if unknown.
        cpus: CPUs of a node, None if unknown.
        source: where the values come from, for messages.
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
        """Kind of GPU as in :data:`~plad_dist.devices.GPUS`, such as `h200-141g`, or `cpu`."""
        return self.gpu.name if self.gpu else "cpu"

    @property
    def device_memory(self) -> float:
        """Bytes of a device; on CPUs, of a node."""
        return self.gpu.memory if self.gpu else self.host_memory or math.inf

    def nodes_for(self, devices: int) -> int:
        """Return the number of nodes with so many devices; without GPUs, one node is enough."""
        return max(1, math.ceil(devices / self.gpus_per_node)) if self.gpu else 1


def local_hardware() -> Hardware:
    """Return the hardware of this machine.

    Raises :class:`UserError` if the kind of its GPUs is unknown.
    """
    import torch

    if not torch.cuda.is_available():
        return local_host()
    name = torch.cuda.get_device_name(0)
    gpu = gpu_of(name)
    if gpu is None:
        raise UserError(
            f"{name}: this kind of GPU is not known; give a similar kind to `plad plan` with --gpu: {', '.join(GPUS)}"
        )
    return replace(local_host(), gpu=gpu, gpus_per_node=torch.cuda.device_count())


def local_host() -> Hardware:
    """Return this machine without its GPUs, with the memory that its container may use."""
    memory = min(float(psutil.virtual_memory().total), cgroup_limits()[0])
    return Hardware(None, 1, 0, memory, source="this machine")


def hardware_of_nodes(nodes: Sequence[Mapping[str, float]]) -> Hardware | None:
    """Return the hardware of a cluster, or None if it cannot be told.

    If the nodes differ, the largest ones count. The number of GPU nodes is left open, because a
    cluster may grow.

    Args:
        nodes: resources of each node, as Ray reports them.
    """
    if engines_use_gpus() or any(node.get("GPU") for node in nodes):
        candidates = [
            Hardware(gpu, None, int(node["GPU"]), _node_memory(node))
            for node in nodes
            for name in node
            if name.startswith("accelerator_type:") and node.get("GPU", 0) >= 1
            if (gpu := gpu_of(name.partition(":")[2])) is not None
        ]
        return max(candidates, key=lambda node: (node.gpu.memory if node.gpu else 0, node.gpus_per_node), default=None)
    with_cpus = [node for node in nodes if node.get("CPU")]
    if not with_cpus:
        return None
    largest = max(with_cpus, key=_node_memory)
    return Hardware(None, len(with_cpus), 0, _node_memory(largest), largest["CPU"])


def _node_memory(node: Mapping[str, float]) -> float:
    """Return the bytes of a node. Ray reports the share of its object store separately."""
    return node.get("memory", 0.0) + node.get("object_store_memory", 0.0)
