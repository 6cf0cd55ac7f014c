"""Claims: numbered objects that tell the latest of several writers from all earlier ones.

A writer claims the next number with an object that can be created only once. A writer that was
frozen or cut off and wakes up later finds a higher number and ends. Commands claim a whole run in
this way, worker groups a training phase.

A look at the claims and the write that follows it are not one atomic step, so a late write must be
harmless by design: parts and checkpoints are never overwritten, and money is reserved in storage
before it is spent.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
from typing import Any, TypeGuard

from plad_dist import __version__
from plad_dist.data.storage import Claim, Storage
from plad_dist.errors import RunFailed

RUN_CLAIMS = "claims"  # folder of the claims on a run
_NAME = re.compile(r"(\d{5,})\.json")
_MAX_SHOWN = 80
CHECK_INTERVAL_S = 3.0  # between the looks of a long job at its claim
_LONGEST_FAILURE_S = 30.0
_END_OF_TIME = 253_402_300_800  # the year 10,000


class SupersededError(RunFailed):
    """Another command has taken over the run. Nothing more is written."""


def take_claim(storage: Storage, folder: str, launch: str, **record: Any) -> Claim:
    """Claim the next number, which supersedes all earlier claims.

    Args:
        record: further values of the claim's object.
    """
    number = latest_number(storage, folder) + 1
    while not storage.create(claim_key(folder, number), encode_claim(launch, **record)):
        number += 1  # another writer was faster, or the listing was stale
    return Claim(folder, number, launch)


def claim_run(storage: Storage, command: str) -> Claim:
    """Claim a run for a command, which supersedes every command that is at work on it.

    Args:
        command: name of the command, for the messages of superseded ones.
    """
    return take_claim(
        storage,
        RUN_CLAIMS,
        os.urandom(6).hex(),
        command=command,
        host=socket.gethostname(),
        pid=os.getpid(),
        user=_user(),
        version=__version__,
    )


def is_superseded(storage: Storage, claim: Claim) -> bool:
    """Return True if there is a later claim."""
    return storage.read(claim_key(claim.folder, claim.number + 1)) is not None


def check_owned(storage: Storage) -> None:
    """Raise :class:`SupersededError` if a later command has claimed the run of a storage.

    A storage without a claim, such as that of a command that only reads, is not checked.
    """
    if (problem := owner_problem(storage)) is not None:
        raise SupersededError(problem)


def owner_problem(storage: Storage) -> str | None:
    """Return the message of :func:`check_owned` if a later command has claimed the run."""
    record = later_claim(storage)
    if record is None:
        return None
    return (
        f"{storage.url}: {_described(record)} has taken over the run. This command ends and writes nothing more. What "
        "is committed is kept"
    )


def later_claim(storage: Storage) -> dict[str, Any] | None:
    """Return the record of the latest claim if it is later than that of a storage, else None."""
    claim = storage.claim
    if claim is None or not is_superseded(storage, claim):
        return None
    latest = max(latest_number(storage, claim.folder), claim.number + 1)
    return read_claim(storage, claim.folder, latest)


class OwnerCheck:
    """Repeated :func:`check_owned` of a long job, with one read every few seconds.

    A storage that fails does not end the job at once. Whatever the job commits is checked again.
    Failures count as one outage if no look between them succeeds.
    """

    def __init__(self, storage: Storage, interval_s: float = CHECK_INTERVAL_S) -> None:
        self._storage, self._interval_s = storage, interval_s
        self._next = 0.0
        self._failing_since: float | None = None

    def __call__(self) -> None:
        """Raise :class:`SupersededError` if a later command has claimed the run.

        Raises:
            RunFailed: the storage has failed for longer than 30 seconds.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval_s
        try:
            check_owned(self._storage)
        except SupersededError:
            raise
        except RunFailed:
            # From the first failure on: a job that did not look for a while is no outage.
            if self._failing_since is None:
                self._failing_since = now
            if now - self._failing_since > _LONGEST_FAILURE_S:
                raise
        else:
            self._failing_since = None


def latest_number(storage: Storage, folder: str) -> int:
    """Return the number of the latest claim, 0 if there is none."""
    return max((int(match[1]) for name in storage.sizes(folder) if (match := _NAME.fullmatch(name))), default=0)


def read_claim(storage: Storage, folder: str, number: int) -> dict[str, Any]:
    """Return the record of a claim, empty if it does not exist or cannot be parsed."""
    try:
        record = json.loads(storage.read(claim_key(folder, number)) or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def describe_owner(storage: Storage) -> str | None:
    """Return one line about the command that has claimed a run last; None if none has."""
    number = latest_number(storage, RUN_CLAIMS)
    if not number:
        return None
    record = read_claim(storage, RUN_CLAIMS, number)
    began = record.get("time")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began)) if _is_time(began) else "an unknown time"
    return f"owner: {_command_of(record)}, since {since} UTC"


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 <= value < _END_OF_TIME


def claim_key(folder: str, number: int) -> str:
    """Return the key of a claim."""
    return f"{folder}/{number:05d}.json"


def encode_claim(launch: str, **record: Any) -> bytes:
    """Return the object of a claim."""
    return json.dumps({"launch": launch, **record, "time": round(time.time(), 3)}).encode()


def _described(record: dict[str, Any]) -> str:
    return f"another command, {_command_of(record)},"


def _command_of(record: dict[str, Any]) -> str:
    """Return a claim in words, such as "`plad run` on node-3 (user ana, process 71)"."""

    def shown(name: str) -> str:
        return "".join(filter(str.isprintable, str(record.get(name, "unknown"))))[:_MAX_SHOWN]

    return f"`{shown('command')}` on {shown('host')} (user {shown('user')}, process {shown('pid')})"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
