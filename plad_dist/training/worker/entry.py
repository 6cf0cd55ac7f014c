"""Entry point of a Ray Train worker, which relays between the driver and its training process.

It imports neither torch nor DeepSpeed, because every restart of a group waits for it. If only a
training process dies, the group stays: its Ray workers agree through the mailbox to restart their
processes, and meet again. If the group ends, its Ray workers end their processes and wait for the
next one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.util
from ray.train.collective import broadcast_from_rank_zero

from plad_dist.compat.ray_worker_group import group_id
from plad_dist.errors import RunFailed
from plad_dist.nursery.actor import server_path
from plad_dist.nursery.child import ChildFailed
from plad_dist.nursery.client import ChildDied, ChildKilled, start_child
from plad_dist.training.messages import Message
from plad_dist.training.worker.seat import NURSERY, Seat

_ANSWER_TIMEOUT_S = 60.0  # for what the mailbox has announced
_LATE_NEWS_S = 2.0  # from a worker whose process died to the others

_relay: _Relay | None = None  # of the training function that runs


class GroupEnded(Exception):
    """The group of this worker has ended, and another one begins."""


def train_jobs(settings: dict[str, Any]) -> None:
    """Train the phases that have no model yet, in order, in a process of its own.

    Ray Train calls this on every worker of every attempt.

    Args:
        settings: the pickled jobs of the phases (`jobs`), the driver's mailbox (`mailbox`), the
            seconds that a collective may take (`timeout_s`), and those after which a silent process
            is given up (`silence_s`).
    """
    global _relay
    relay = _relay = _Relay(settings["mailbox"])
    while not _train_in_a_process(settings, relay):
        if relay.must_end.is_set():
            raise GroupEnded


def end_training() -> None:
    """Ask the training function that runs in this worker to end, with its process."""
    if _relay is not None:
        _relay.must_end.set()


def _train_in_a_process(settings: dict[str, Any], relay: _Relay) -> bool:
    """Train in a child. Return False if all workers must restart theirs."""
    began = time.monotonic()
    arguments = (settings["jobs"], _seat(settings["timeout_s"], began, relay))
    nursery = _nursery() if relay.may_start_warm() else None
    try:
        with start_child("plad:train", "plad_dist.training.worker.process:train", arguments, nursery) as child:
            child.serve(
                {
                    "post": relay.post,
                    "wants_yield": relay.wants_yield,
                    "yielded": relay.yielded,
                    "leaving_nodes": relay.leaving_nodes,
                },
                settings["silence_s"],
                relay.processes_restart,
            )
    except ChildKilled:
        return False
    except (ChildDied, ChildFailed) as death:
        # A process raises or aborts mostly because another one has died, which is told soon.
        if isinstance(death, ChildFailed) or death.is_aborted:
            may_restart = relay.processes_restart(wait_s=_LATE_NEWS_S)
        else:
            may_restart = relay.may_restart(f"worker {arguments[1].rank} died: {death}")
        if not may_restart:
            raise
        return False
    return relay.may_finish()


def _nursery() -> Path | None:
    with contextlib.suppress(RunFailed, OSError):
        return server_path(NURSERY)
    return None


def _seat(timeout_s: float, began: float, relay: _Relay) -> Seat:
    """Agree with the other workers on an address, and return the place of this one."""
    context = ray.train.get_context()
    address = relay.meet(context.get_world_rank())
    return Seat(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_rank(),
        context.get_local_world_size(),
        context.get_node_rank(),
        _device(),
        address,
        timeout_s,
        began,
        time.monotonic(),
    )


def _device() -> int | None:
    """Return the index of this worker's GPU among the visible ones, which all workers share.

    Raises:
        RunFailed: it is not among them.
    """
    ids = [str(gpu) for gpu in ray.get_gpu_ids()]
    if not ids:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and ids[0].isdecimal():
        return int(ids[0])
    if ids[0] not in (visible or "").split(","):
        raise RunFailed(f"CUDA_VISIBLE_DEVICES={visible}: lacks GPU {ids[0]}, which Ray has given this worker")
    return (visible or "").split(",").index(ids[0])


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    is_ipv6 = ":" in host
    with socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET) as free:
        free.bind(("", 0))
        return f"[{host}]:{free.getsockname()[1]}" if is_ipv6 else f"{host}:{free.getsockname()[1]}"


class _Relay:
    """Handlers of what a training process tells the driver, and asks of it and of Ray Train.

    Attributes:
        must_end: set when the group ends.
    """

    def __init__(self, mailbox: Any) -> None:
        self.must_end = threading.Event()
        self._mailbox = mailbox
        self._pending_reply: Any = None
        self._yield_group = 0
        self._group: int | None = self._answer(mailbox.present_group.remote())
        self._restarts = 0  # of the processes of the group, as far as this worker knows
        self._pending_restart: Any = None

    def meet(self, rank: int) -> str:
        """Return the address at which the first rank waits, and note the restarts before it.

        The mailbox tells it. Ray's own exchange needs an actor that starts with each group.
        """
        address = _free_address() if rank == 0 else None
        met = None if self._group is None else self._answer(self._mailbox.meet.remote(self._group, group_id(), address))
        if met is None:  # the driver or the group has ended
            return str(broadcast_from_rank_zero(address))
        address, self._restarts = met
        self._pending_restart = self._mailbox.processes_restart.remote(self._group, self._restarts)
        return str(address)

    def may_start_warm(self) -> bool:
        """Return False if the processes must start without a nursery."""
        return self._answer(self._mailbox.may_start_warm.remote()) is not False

    def processes_restart(self, wait_s: float = 0.0) -> bool:
        """Return True if all workers must restart their processes, or the group has ended."""
        if self.must_end.is_set():
            return True
        if self._pending_restart is None or not ray.wait([self._pending_restart], timeout=wait_s)[0]:
            return False
        restarts = self._answer(self._pending_restart)
        if restarts is None:  # the group has ended, or the driver has
            self._pending_restart = None
            return False
        self._restarts = restarts
        return True

    def may_restart(self, reason: str) -> bool:
        """Ask all workers to restart. Return False if the whole group must instead."""
        if self._group is None:
            return False
        may = self._answer(self._mailbox.restart_processes.remote(self._group, self._restarts, reason))
        return bool(may) and self.processes_restart(wait_s=_ANSWER_TIMEOUT_S)

    def may_finish(self) -> bool:
        """Return False if another worker has asked to restart before this one finished."""
        if self._group is None or self._answer(self._mailbox.finish.remote(self._group, self._restarts)) is not False:
            return True
        return not self.processes_restart(wait_s=_ANSWER_TIMEOUT_S)

    @staticmethod
    def _answer(reference: Any) -> Any:
        """Return an answer of the mailbox, or None if it is dead."""
        try:
            return ray.get(reference)
        except ray.exceptions.RayError:
            return None

    def post(self, message: Message) -> None:
        self._mailbox.post.remote(message, self._restarts)

    def yielded(self, group: int) -> None:
        self._mailbox.yielded.remote(group)

    def wants_yield(self) -> int:
        """Return the reply to the previous request, if it has arrived, and send the next one."""
        with contextlib.suppress(ray.exceptions.RayError):
            if self._pending_reply is not None and ray.wait([self._pending_reply], timeout=0)[0]:
                reply, self._pending_reply = self._pending_reply, None
                self._yield_group = int(ray.get(reply))
            if self._pending_reply is None:
                self._pending_reply = self._mailbox.wants_yield.remote()
        return self._yield_group

    def leaving_nodes(self) -> tuple[list[str], float | None]:
        info = ray.train.get_preemption_info()
        if info is None:
            return [], None
        return list(info.preempted_node_to_ranks), None if info.deadline_ms is None else info.deadline_ms / 1000
