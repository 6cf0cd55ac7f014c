"""Interfaces of the Linux kernel that no library of ours wraps: control groups and `/proc`.

Written for control groups of version 2 (kernel 4.5 and later; the unified hierarchy of current
distributions, Docker and Kubernetes). Relies on:

- `/proc/self/cgroup`: one line `0::/PATH` that names this process's group (man 7 cgroups);
- `memory.max`, one number of bytes or `max`, and `cpu.max`, `QUOTA PERIOD` in microseconds with
  `max` for no quota (Documentation/admin-guide/cgroup-v2.rst in the kernel's source);
- `F_SETSIG` and `O_ASYNC`: a signal of the process's choice when a pipe can be read or ends (man 2
  fcntl);
- `SO_PEERCRED`: process, user and group of a peer (man 7 unix), and the state, the times and the
  start in `/proc/PID/stat` (man 5 proc);
- `/proc/PID/fd/N`: a link to the file that a process has opened as number N (man 5 proc);
- `oom_kill N` in `/proc/vmstat` (kernel 4.13 and later), counted before the process is killed.

Nothing is asserted at import, since a missing file has a meaning: the kernel sets no limit, or the
output is not redirected to a file.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_SET_SIGNAL = 10  # F_SETSIG, which Python's module fcntl does not name
_CREDENTIALS = struct.Struct("3i")  # process, user and group
_CGROUP_ROOT, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_VMSTAT = Path("/proc/vmstat")


def cgroup_limits(root: Path = _CGROUP_ROOT, own: Path = _OWN_CGROUP) -> tuple[float, float]:
    """Return the memory in bytes and the number of CPUs that this process's control group allows.

    A limit of a parent group also holds in its children, so the smallest limit on the path to the
    root counts. Each value is infinite if no group sets that limit. Missing files set none, as with
    version 1 of control groups.
    """
    line = re.search(r"^0::/(.*)$", own.read_text(), re.MULTILINE) if own.exists() else None
    group = root / line[1] if line else root
    memory, cpus = [float("inf")], [float("inf")]
    for folder in (group, *group.parents):
        if root in (folder, *folder.parents):
            if (limit := _words(folder / "memory.max")) and limit[0] != "max":
                memory.append(float(limit[0]))
            if (limit := _words(folder / "cpu.max")) and limit[0] != "max":
                cpus.append(float(limit[0]) / float(limit[1]))
    return min(memory), min(cpus)


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []


def redirected_output(stream: int, last_bytes: int = 200_000) -> str | None:
    """Return the end of the file to which a standard stream of this process is redirected.

    Ray redirects both streams of its workers to files, which the processes that a worker starts
    share.

    Args:
        stream: 1 for standard output, 2 for standard error.

    Returns:
        None if the stream is not redirected to a file.
    """
    path = Path(f"/proc/{os.getpid()}/fd/{stream}").resolve()
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - last_bytes))
        return file.read().decode(errors="replace")


def die_with(lifeline: int) -> None:
    """Let the kernel kill this process when the write end of a pipe is closed.

    It works at once, even if this process is stopped or runs code that heeds no signal.
    """
    fcntl.fcntl(lifeline, _SET_SIGNAL, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # closed before the signal was set
        os.kill(os.getpid(), signal.SIGKILL)


def set_environment(environment: Mapping[str, str]) -> None:
    """Replace the environment variables of this process.

    Only those that differ are touched, because the title of a process is written over the memory of
    its first ones.
    """
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def processor_time(pid: int) -> int | None:
    """Return the processor time of a process in ticks; None if it is dead or stopped."""
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return None if fields[0] in "TtZX" else int(fields[11]) + int(fields[12])


def oom_kills(file: Path = _VMSTAT) -> int:
    """Return how many processes of this machine the kernel has killed for lack of memory so far.

    0 where the kernel does not count them.
    """
    count = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE) if file.exists() else None
    return int(count[1]) if count else 0


def process_began() -> float:
    """Return the time at which this process was started or forked, as `time.monotonic()` has it."""
    started = int(_stat(os.getpid())[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def _stat(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` from the third one, the state, on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Peer(NamedTuple):
    """Process at the other end of a local socket, or the one that listens to it."""

    process: int
    user: int


def peer_of(connection: socket.socket) -> Peer:
    """Return the process and the user at the other end of a connected local socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return Peer(process, user)
