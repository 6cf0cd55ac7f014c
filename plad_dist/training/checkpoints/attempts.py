"""Attempts at a phase: only the latest attempt may write, all earlier ones must end.

A worker group first claims the next number with an object that can be created only once. A process
that was frozen or cut off and wakes up later finds a higher number and ends. The check and the
write that follows are not one atomic step, so late writes are harmless by design: a whole
checkpoint is never overwritten, and figures carry the number of their attempt.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any

from plad_dist.data.storage import Storage

_NAME = re.compile(r"(\d{5,})\.json")


@dataclass(frozen=True)
class Attempt:
    """Claim of one worker group on a phase.

    Attributes:
        folder: folder of the claims in the storage.
        number: number of the attempt, counted from 1.
        launch: the command that started the worker group; a command can start several.
    """

    storage: Storage
    folder: str
    number: int
    launch: str

    @property
    def name(self) -> str:
        """Name of the folders that the attempt writes."""
        return f"attempt-{self.number:05d}"

    def superseded(self) -> str | None:
        """Return the launch of the latest attempt if it is later than this one, else None."""
        latest = max(_numbers(self.storage, self.folder), default=0)
        return str(_read_claim(self.storage, self.folder, latest).get("launch", "")) if latest > self.number else None

    def began_at(self, step: int) -> None:
        """Record the step from which the attempt resumes."""
        self.storage.replace(_key(self.folder, self.number), _text(self.launch, step))

    def leaves(self, step: int) -> None:
        """Record that the attempt ends on request, which is no failure."""
        self.storage.replace(_key(self.folder, self.number), _text(self.launch, step, has_left=True))

    def failures_before(self, step: int | None) -> int:
        """Return how many attempts of this launch in a row before this one made no progress.

        Args:
            step: step from which this attempt resumes. None before the checkpoint is read; then
                only attempts that also failed before they read theirs are counted.
        """
        count = 0
        for number in range(self.number - 1, 0, -1):
            claimed = _read_claim(self.storage, self.folder, number)
            if claimed.get("launch") != self.launch or claimed.get("step") not in (step, None) or claimed.get("left"):
                break
            count += 1
        return count


def claim(storage: Storage, folder: str, launch: str) -> Attempt:
    """Claim the next attempt, which supersedes all earlier ones."""
    number = max(_numbers(storage, folder), default=0) + 1
    while not storage.create(_key(folder, number), _text(launch, None)):
        number += 1
    return Attempt(storage, folder, number, launch)


def _numbers(storage: Storage, folder: str) -> list[int]:
    return [int(match[1]) for name in storage.sizes(folder) if (match := _NAME.fullmatch(name))]


def _read_claim(storage: Storage, folder: str, number: int) -> dict[str, Any]:
    """Return the contents of a claim, empty if it cannot be parsed."""
    try:
        contents: dict[str, Any] = json.loads(storage.read(_key(folder, number)) or b"{}")
    except ValueError:
        return {}
    return contents


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number:05d}.json"


def _text(launch: str, step: int | None, *, has_left: bool = False) -> bytes:
    return json.dumps({"launch": launch, "step": step, "left": has_left, "time": round(time.time(), 3)}).encode()
