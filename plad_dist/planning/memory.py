"""Memory of one process: bytes by purpose, on its device and on its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plad_dist.devices import GIB
from plad_dist.planning.sizes import Device

GPU_CONTEXT = 1.5 * GIB  # CUDA and NCCL
_ALLOCATOR_OVERHEAD = 1.03  # allocators reserve more than they are asked for


@dataclass(frozen=True)
class Memory:
    """Memory of one process.

    Attributes:
        parts: bytes on its device by purpose.
        alternatives: parts of which only the largest counts, because they never coexist.
        host: bytes of its node's memory beside those on a device.
    """

    parts: Mapping[str, float]
    alternatives: Mapping[str, float]
    host: float

    @property
    def device(self) -> float:
        """Peak bytes on its device."""
        return sum(self.parts.values()) + max(self.alternatives.values(), default=0.0)


def process_memory(
    parts: Mapping[str, float], alternatives: Mapping[str, float], host: float, device: Device
) -> Memory:
    """Return the memory of a process, with what its device and its allocator add.

    On CPUs the device is the node's memory: the process itself counts too, and alternatives add up,
    because the process keeps memory that it has freed.
    """
    reserved = {name: size * _ALLOCATOR_OVERHEAD for name, size in alternatives.items()}
    if device == "cpu":
        return Memory({"process": host, **parts, **reserved}, {}, 0.0)
    return Memory({"CUDA and NCCL": GPU_CONTEXT, **parts}, reserved, host)
