"""Decisions that all ranks of a phase must share.

Ranks that disagree would call different collectives and wait for each other until a timeout.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from plad_dist.errors import RunFailed, UserError

T = TypeVar("T")


class StoppedError(Exception):
    """Training must not continue, and a retry would end the same way.

    Every rank raises it in the same place.

    Attributes:
        by_user: True if the user must correct an input; otherwise the run failed.
    """

    def __init__(self, message: str, *, by_user: bool = False) -> None:
        super().__init__(message)
        self.by_user = by_user


def from_rank_zero(read: Callable[[], T]) -> T:
    """Return the result of a function on the first rank, on all ranks.

    If each rank called the function, some could see an older state of a shared file system.

    Raises:
        UserError, RunFailed: the function raised it on the first rank.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(read(), None)]
        except (UserError, RunFailed) as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    value, failure = outcome[0]
    if failure is not None:
        raise failure
    return value


def check_on_every_rank(check: Callable[[], object]) -> None:
    """Run a check of the local node on every rank.

    If it fails on one rank, all ranks raise its error with the node's name.

    Raises:
        UserError: the check failed on all ranks.
        RunFailed: it failed on some; an attempt on other nodes may succeed.
    """
    problem = None
    try:
        check()
    except UserError as error:
        problem = f"node {socket.gethostname()}: {error}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise UserError(first) if all(problems) else RunFailed(first)


@contextmanager
def agreed() -> Iterator[None]:
    """Turn a :class:`UserError` that every rank raises into a :class:`StoppedError`."""
    try:
        yield
    except UserError as error:
        raise StoppedError(str(error), by_user=True) from None
