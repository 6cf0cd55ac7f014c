"""Place of a rank in its worker group."""

from __future__ import annotations

from typing import NamedTuple

NURSERY = "train"  # kind of the nurseries that training processes come from


class Seat(NamedTuple):
    """Place of a rank in its worker group.

    Attributes:
        device: index of its GPU among the visible ones; None to train on the CPU.
        address: `host:port` of the first rank, where all ranks meet.
        timeout_s: seconds that a collective may take.
        began: `time.monotonic()` of this machine when Ray's worker was called.
        met: the same when all workers had the address.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    device: int | None
    address: str
    timeout_s: float
    began: float
    met: float
