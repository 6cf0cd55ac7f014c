"""Memory, speed and bandwidth of GPUs, from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A type of GPU.

    Attributes:
        name: name on the command line.
        driver_words: words that identify it in the names that drivers and Ray report.
        memory: total memory in bytes, as CUDA reports it.
        flops: dense bfloat16 peak in FLOP/s.
        bandwidth: memory bandwidth in bytes per second.
    """

    name: str
    driver_words: tuple[str, ...]
    memory: float
    flops: float
    bandwidth: float


# Of two types with the same word, the larger one comes first: it is assumed if a name is ambiguous.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200-180g", ("B200",), 178.4 * GIB, 2250e12, 8.0e12),
        Gpu("h200-141g", ("H200",), 139.8 * GIB, 989e12, 4.8e12),
        Gpu("h100-80g", ("H100",), 79.1 * GIB, 989e12, 3.35e12),
        Gpu("h20-96g", ("H20",), 95.1 * GIB, 148e12, 4.0e12),
        Gpu("a100-80g", ("A100",), 79.1 * GIB, 312e12, 2.0e12),
        Gpu("a100-40g", ("A100",), 39.4 * GIB, 312e12, 1.55e12),
        Gpu("l40s-48g", ("L40S",), 44.4 * GIB, 362e12, 0.86e12),
        Gpu("l40-48g", ("L40",), 44.4 * GIB, 181e12, 0.86e12),
        Gpu("a10g-24g", ("A10G",), 22.1 * GIB, 70e12, 0.6e12),
        Gpu("a10-24g", ("A10",), 22.1 * GIB, 125e12, 0.6e12),
        Gpu("l4-24g", ("L4",), 22.0 * GIB, 121e12, 0.3e12),
    )
}


def gpu_of(name: str) -> Gpu | None:
    """Return the type of a GPU by the name that a driver or Ray reports.

    None if the type is unknown or the device is a slice of a GPU (MIG).
    """
    words = re.split(r"[\s_:-]+", name.upper())
    if any("MIG" in word for word in words):
        return None
    if "A100" in words and any(word.startswith("40G") for word in words):
        return GPUS["a100-40g"]
    return next((gpu for gpu in GPUS.values() if any(word in words for word in gpu.driver_words)), None)
