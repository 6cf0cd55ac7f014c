"""Processes that run out of memory: the kernel kills them, or refuses what they ask for."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nodes import wait

_ROOTS = {  # of the control groups for memory, with the files of their limits
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),  # version 1
    Path("/sys/fs/cgroup"): ("memory.max", "memory.swap.max"),  # version 2
}


@contextlib.contextmanager
def small_group(size: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that moves a process to a control group, which its later children join.

    When the processes of the group need `size` bytes more than they had before, the kernel kills
    one of them. All must end before the block does. Skip the test where it may make no such group.
    """
    root = next(root for root in _ROOTS if root.is_dir())
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="plad-test-", dir=root))
        limit, swap = (folder / name for name in _ROOTS[root])
        limit.write_text(str(size))
        if swap.exists():
            swap.write_text(str(size))
    except OSError as error:
        if folder is not None:
            folder.rmdir()
        pytest.skip(f"no control groups for memory here: {error}")
    members = folder / "cgroup.procs"
    try:
        yield lambda pid: members.write_text(str(pid))
    finally:
        wait(lambda: _is_removed(folder), 60, "the processes of a group to end")


def _is_removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def limit_address_space(pid: int, more: int) -> None:
    """Refuse a process and its later children all but some bytes more than the process has now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
