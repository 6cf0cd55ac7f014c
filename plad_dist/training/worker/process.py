"""Training process of one rank, in which torch, DeepSpeed and the device live.

It is a child of a Ray Train worker (:mod:`plad_dist.training.worker.entry`), which passes on what
it tells.
"""

from __future__ import annotations

import datetime as dt
import os
import pickle
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from plad_dist.data.models import model_fingerprint
from plad_dist.nursery.child import Parent
from plad_dist.timeline import StartClock
from plad_dist.training.agreement import from_rank_zero
from plad_dist.training.job import PhaseJob
from plad_dist.training.messages import Message
from plad_dist.training.worker.loop import train_loop
from plad_dist.training.worker.seat import Seat

_AFTER_A_DEATH_S = 5.0


@dataclass(frozen=True)
class RelayedMailbox:
    """Mailbox of the driver, reached through the Ray worker."""

    parent: Parent

    def post(self, message: Message) -> None:
        """Add a message for the driver."""
        self.parent.tell("post", message)

    def wants_yield(self) -> int:
        """Return the number of the group that is asked to yield, as known so far; 0 for none."""
        return int(self.parent.ask("wants_yield"))

    def yielded(self, group: int) -> None:
        """Record that a group has committed a checkpoint and waits."""
        self.parent.tell("yielded", group)

    def leaving_nodes(self) -> tuple[list[str], float | None]:
        """Return the nodes that will leave, and when in seconds since the epoch if it is known."""
        nodes, deadline = self.parent.ask("leaving_nodes")
        return nodes, deadline


def train(parent: Parent, jobs: bytes, seat: Seat) -> None:
    """Join the other ranks, and train the phases that have no model yet, in order.

    Args:
        jobs: pickled list of the phases' jobs.
    """
    os.environ.update(
        RANK=str(seat.rank),
        WORLD_SIZE=str(seat.world_size),
        LOCAL_RANK=str(seat.local_rank),
        LOCAL_WORLD_SIZE=str(seat.local_world_size),
        NODE_RANK=str(seat.node_rank),
    )
    clock = _start_clock(parent, seat)
    if seat.device is not None:
        torch.cuda.set_device(seat.device)
    dist.init_process_group(
        "gloo" if seat.device is None else "nccl",
        init_method=f"tcp://{seat.address}",
        rank=seat.rank,
        world_size=seat.world_size,
        timeout=dt.timedelta(seconds=seat.timeout_s),
    )
    clock.end("rendezvous")
    phases: list[PhaseJob] = pickle.loads(jobs)  # noqa: S301 - from the driver
    for job in phases:
        if from_rank_zero(partial(model_fingerprint, job.folder("models"))) != job.fingerprint:
            try:
                train_loop(replace(job, mailbox=RelayedMailbox(parent)), clock)
            except RuntimeError:
                # Mostly a connection that broke because another worker died, which must be
                # reported first.
                time.sleep(_AFTER_A_DEATH_S)
                raise
            if from_rank_zero(partial(job.storage.exists, job.stopped_key)):
                break
            clock = StartClock()
    dist.destroy_process_group()


def _start_clock(parent: Parent, seat: Seat) -> StartClock:
    """Return the clock of this start, with the parts until this process has its imports."""
    clock = StartClock(seat.began)
    clock.end("workers", at=seat.met)
    clock.end("process", at=parent.met)
    clock.end("imports")
    return clock
