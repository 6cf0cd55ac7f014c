"""The watch over a run: what commands may never do to it, checked at every change."""

from __future__ import annotations

import json

from plad_dist.data.claims import RUN_CLAIMS
from plad_dist.data.dataset import DAMAGED
from plad_dist.data.manifest import MANIFEST
from plad_dist.data.parts import part_block
from plad_dist.rundir import RUN_FILE
from tests.simulation.world import Change, Command, World

USER = "user"  # a command of this name may do anything
# Calls between a look and the write that relies on it. The two cannot be one step.
_AFTER_LOOK = 4


def is_part(key: str) -> bool:
    """Return True if an object is a part of a dataset."""
    return part_block(key.rpartition("/")[2]) is not None and f"/{DAMAGED}/" not in key


class Watch:
    """Observer of a world that collects broken promises.

    Attributes:
        problems: what was done that must not be done.
    """

    def __init__(self, world: World) -> None:
        self.problems: list[str] = []
        self._world = world
        self._claims: dict[str, int] = {}  # latest claim of each command
        self._creators: dict[str, tuple[str, int]] = {}  # of parts: command, and latest claim at that time
        self._set_aside: set[bytes] = set()
        self._deleted: dict[str, tuple[float, dict[str, int]]] = {}  # of parts: time, calls of each command
        world.observers.append(self)

    def __call__(self, change: Change) -> None:
        """Examine a change before it is made."""
        command = self._world.current
        if f"/{DAMAGED}/" in change.key and change.data is not None:
            self._set_aside.add(change.data)
        if is_part(change.key):
            self._examine_part(change)
        if command is None or command.name == USER:
            return
        if change.key.startswith(f"{RUN_CLAIMS}/"):
            self._claims[command.name] = int(change.key.rpartition("/")[2].partition(".")[0])
            command.probe = command.calls
        elif not change.key.startswith(".writable-"):
            self._examine_write(change, command)

    @property
    def _latest_claim(self) -> int:
        return max(self._claims.values(), default=0)

    def _examine_part(self, change: Change) -> None:
        name, key = change.command, change.key
        if change.data is None:
            self._deleted[key] = change.time, {command.name: command.calls for command in self._world.commands}
            creator = self._creators.get(key, ("", 0))[0]
            if name not in ("", USER, creator) and change.before not in self._set_aside:
                self.problems.append(f"{name} deleted {key}, which {creator or 'an earlier command'} had committed")
        elif change.before is None:
            self._creators[key] = name, self._latest_claim
        elif name not in ("", USER):
            self.problems.append(f"{name} overwrote {key}")

    def _examine_write(self, change: Change, command: Command) -> None:
        name, key = command.name, change.key
        if name not in self._claims:
            self.problems.append(f"{name} wrote {key} without a claim on the run")
            return
        is_superseded = self._claims[name] < self._latest_claim
        calls_since_look = command.calls - command.probe
        if key.endswith(f"/{MANIFEST}") and change.data is not None:
            if is_superseded and calls_since_look > _AFTER_LOOK:
                self.problems.append(f"{name} wrote {key} after another command had taken over the run")
            self._examine_manifest(change, command)
        if key == RUN_FILE and change.before not in (None, change.data):
            if is_superseded and calls_since_look > 1:
                self.problems.append(f"{name} replaced {key} after another command had taken over the run")
            begun = [part for part, (_, claim) in self._creators.items() if claim < self._claims[name]]
            if begun := [part for part in begun if part in self._world.objects]:
                self.problems.append(f"{name} bound the run to another config, though {begun[0]} was committed")

    def _examine_manifest(self, change: Change, command: Command) -> None:
        folder = change.key.rpartition("/")[0]
        for part in json.loads(change.data or b"")["parts"]:
            key = f"{folder}/{part['name']}"
            time, calls = self._deleted.get(key, (0.0, {}))
            is_unseen = (
                change.time - time <= self._world.lag_s or command.calls - calls.get(command.name, 0) <= _AFTER_LOOK
            )
            if key not in self._world.objects and not is_unseen:
                self.problems.append(f"{command.name} wrote {change.key}, which lists {part['name']} that is gone")
