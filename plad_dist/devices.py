"""What devices can do, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as users type it.
        mark: what the name that the driver gives holds.
        memory: bytes that CUDA reports in all.
        flops: dense bfloat16 peak in FLOP/s.
        bandwidth: of its memory, in bytes a second.
    """

    name: str
    mark: str
    memory: float
    flops: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200-180g", "B200", 178.4 * GIB, 2250e12, 8.0e12),
        Gpu("h200-141g", "H200", 139.8 * GIB, 989e12, 4.8e12),
        Gpu("h100-80g", "H100", 79.1 * GIB, 989e12, 3.35e12),
        Gpu("h20-96g", "H20", 95.1 * GIB, 148e12, 4.0e12),
        Gpu("a100-80g", "A100-SXM4-80", 79.1 * GIB, 312e12, 2.0e12),
        Gpu("a100-40g", "A100", 39.4 * GIB, 312e12, 1.55e12),
        Gpu("l40s-48g", "L40S", 44.4 * GIB, 362e12, 0.86e12),
        Gpu("a10-24g", "A10", 22.1 * GIB, 125e12, 0.6e12),
        Gpu("l4-24g", "L4", 22.0 * GIB, 121e12, 0.3e12),
    )
}


def gpu_of(name: str) -> Gpu | None:
    """The kind of the GPU that a driver, or Ray, calls so; None where it is not known. The first that matches is the one."""
    plain = name.upper().replace(" ", "-")
    if "A100" in plain and "80G" in plain:
        return GPUS["a100-80g"]
    return next((gpu for gpu in GPUS.values() if gpu.mark in plain), None)
