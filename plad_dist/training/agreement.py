"""What all ranks of a phase must see and do alike, or some would wait for ever for the others."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from plad_dist.errors import RunFailed, UserError

T = TypeVar("T")


class StoppedError(Exception):
    """Training must not go on, and to try again would end alike. Every rank raises it in the same place.

    Attributes:
        by_user: the user must mend an input; otherwise the run failed.
    """

    def __init__(self, message: str, *, by_user: bool = False) -> None:
        super().__init__(message)
        self.by_user = by_user


def from_rank_zero(look: Callable[[], T]) -> T:
    """What the first rank finds, on all ranks. Each looking by itself, some could see an older state of a shared file system.

    Raises what the first rank raises, on all ranks.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [(look(), None)]
        except (UserError, RunFailed) as error:
            found = [(None, error)]
    dist.broadcast_object_list(found, src=0)
    value, problem = found[0]
    if problem is not None:
        raise problem
    return value


def check_on_every_rank(look: Callable[[], object]) -> None:
    """Let every rank look at what may be wrong on its node alone; all raise what one of them found, with the node.

    Raises:
        UserError: all found something.
        RunFailed: some did; on other nodes it may go well.
    """
    problem = None
    try:
        look()
    except UserError as error:
        problem = f"node {socket.gethostname()}: {error}"
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    if first := next(filter(None, found), None):
        raise UserError(first) if all(found) else RunFailed(first)


@contextmanager
def agreed() -> Iterator[None]:
    """Turn what is wrong with the data, which every rank meets in the same place, into a stop."""
    try:
        yield
    except UserError as error:
        raise StoppedError(str(error), by_user=True) from None
