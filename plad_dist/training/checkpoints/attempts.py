"""Attempts at a phase: whoever began last may write, and all before it may not.

A worker group claims the next number as the first thing that it does, by an object that can be created only once. A process
that was frozen or cut off and wakes up late finds a higher number and ends. The check and the write after it are not one step, so
what is written is harmless by itself too: a whole checkpoint is not overwritten, and figures carry the number of their attempt.
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
    """One worker group's claim on a phase.

    Attributes:
        folder: of the claims.
        launch: the command that started the worker group, which may start several.
    """

    storage: Storage
    folder: str
    number: int
    launch: str

    @property
    def name(self) -> str:
        """What its files are called by."""
        return f"attempt-{self.number:05d}"

    def superseded(self) -> str | None:
        """The launch of a later attempt, None where there is none."""
        latest = max(_numbers(self.storage, self.folder), default=0)
        return str(_claim(self.storage, self.folder, latest).get("launch", "")) if latest > self.number else None

    def began_at(self, step: int) -> None:
        """Note the step that it goes on from."""
        self.storage.replace(_key(self.folder, self.number), _text(self.launch, step))

    def leaves(self, step: int) -> None:
        """Note that it ends because it was told to, and that this is no failure."""
        self.storage.replace(_key(self.folder, self.number), _text(self.launch, step, left=True))

    def failures_before(self, step: int | None) -> int:
        """How many attempts of this launch, one after the other and right before this one, failed and got no further.

        Args:
            step: that this one goes on from; None while that is not known: those count that never knew it.
        """
        count = 0
        for number in range(self.number - 1, 0, -1):
            claim = _claim(self.storage, self.folder, number)
            if claim.get("launch") != self.launch or claim.get("step") not in (step, None) or claim.get("left"):
                break
            count += 1
        return count


def claim(storage: Storage, folder: str, launch: str) -> Attempt:
    """The next attempt, which ends all before it."""
    number = max(_numbers(storage, folder), default=0) + 1
    while not storage.create(_key(folder, number), _text(launch, None)):
        number += 1
    return Attempt(storage, folder, number, launch)


def _numbers(storage: Storage, folder: str) -> list[int]:
    return [int(match[1]) for name in storage.sizes(folder) if (match := _NAME.fullmatch(name))]


def _claim(storage: Storage, folder: str, number: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read(_key(folder, number)) or b"{}")
    except ValueError:
        return {}
    return found


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number:05d}.json"


def _text(launch: str, step: int | None, *, left: bool = False) -> bytes:
    return json.dumps({"launch": launch, "step": step, "left": left, "time": round(time.time(), 3)}).encode()
