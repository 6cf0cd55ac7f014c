"""Schedules of whole commands on one run: what happens in each, and what must hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import obstore
import pyarrow as pa

from plad_dist.config import Config
from plad_dist.data.claims import SupersededError
from plad_dist.data.manifest import MANIFEST
from plad_dist.data.parts import read_header
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import RUN_FILE, load_run
from tests.simulation.commands import URL, in_world, plad, plad_verify, random_of
from tests.simulation.watch import USER, Watch, is_part
from tests.simulation.world import ERRORS, Command, Fault, Killed, World

SCENARIOS = ("same config", "other config", "repair", "damage", "deletion", "bad source")
# Commands with the stage after which they begin and their calls, about, if nothing disturbs them.
_STEPS = {"run": ("", 140), "prepare": ("", 30), "sample": ("prepare", 60), "pair": ("sample", 50)}
_REPAIR_CALLS = 110
_MOST_CALLS = 400
_BLIND_CALLS = 4  # between a look at the claims and the write of a manifest


@dataclass(frozen=True)
class Row:
    """Content of a part without the attempt that wrote it."""

    fingerprint: str
    rows: str


@dataclass
class Schedule:
    """One schedule: commands, their faults, and the world in which they run.

    Attributes:
        configs: config of the run, another one, and one whose sources have a bad row.
        scenarios: kinds of schedules to choose from.
        log: what happened, for the message of a failure.
    """

    seed: int
    configs: tuple[Config, Config, Config]
    scenarios: tuple[str, ...] = SCENARIOS
    log: list[str] = field(default_factory=list)

    def run(self) -> list[str]:
        """Run the schedule and return the promises that it broke."""
        self.random = rng = random_of(self.seed)
        self.scenario = rng.choice(self.scenarios)
        match self.scenario:
            case "repair" | "damage":
                self.step = "run"
            case "bad source":
                self.step = "prepare"
            case _:
                self.step = rng.choice(["run", "prepare", "prepare", "sample", "pair"])
        self.world = World(
            self.seed,
            lag_s=rng.choice([0.0, 0.0, 60.0]),
            has_jumping_clock=rng.random() < 0.2,
            switches=rng.choice([0.05, 0.3, 0.7]),
        )
        self.is_calm = rng.random() < 0.15
        self.watch = Watch(self.world)
        with in_world(self.world):
            return [f"seed {self.seed} ({self.scenario}): {problem}" for problem in self._problems()]

    def _problems(self) -> Iterator[str]:
        self._begin()
        self._run(*self._commands())
        yield from self._outcome_problems()
        self.world.lag_s = 0.0
        yield from self._end_problems()
        yield from self.watch.problems

    # -- what happens

    def _begin(self) -> None:
        """Bring the run into the state in which the commands find it."""
        ours, rng = self.configs[0], self.random
        stage, calls = _STEPS[self.step]
        is_whole = self.scenario in ("repair", "damage")
        if is_whole and rng.random() < 0.6:
            stage = rng.choice(["sample", "pair"])
        self.world.objects = dict(snapshots(ours)[stage])
        if rng.random() < 0.3 or (is_whole and not stage):
            self._run(Command("first", plad(ours, self.step), [Fault(rng.randrange(calls), "kill")]))
        if is_whole:
            parts = [key for key in self.world.objects if is_part(key)]
            for key in rng.sample(parts, min(len(parts), rng.choice([1, 1, 2]))):
                data = bytearray(self.world.objects[key])
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                self.world.change(key, bytes(data))

    def _commands(self) -> list[Command]:
        if self.scenario == "damage":
            return []
        ours, other, bad = self.configs
        calls = _STEPS[self.step][1]
        first = Command("one", plad(ours, self.step), self._faults(calls))
        if self.scenario == "repair":
            return [first, Command("two", plad_verify(repair=True), self._faults(_REPAIR_CALLS))]
        if self.scenario == "deletion":
            return [first, Command(USER, self._delete_a_part)]
        if self.scenario == "bad source":
            first.work = plad(bad, self.step)
        rival = other if self.scenario == "other config" else ours
        rivals = [Command("two", plad(rival, self.step), self._faults(calls))]
        if self.random.random() < 0.1:
            rivals.append(Command("three", plad(ours, self.step), self._faults(calls)))
        return [first, *rivals]

    def _delete_a_part(self) -> None:
        """Delete a part, as only a user can: mostly one of a dataset that is being written."""
        is_any = self.random.random() < 0.3
        for _ in range(self.random.randrange(80)):
            obstore.list_with_delimiter(None, None)
        objects = self.world.objects
        parts = [key for key in objects if is_part(key)]
        unlisted = [key for key in parts if f"{key.rpartition('/')[0]}/{MANIFEST}" not in objects]
        if candidates := parts if is_any else unlisted:
            obstore.delete(None, self.random.choice(candidates))

    def _faults(self, calls: int) -> list[Fault]:
        """Return the faults of a command.

        Args:
            calls: calls of the command if nothing disturbs it.
        """
        rng = self.random
        if self.is_calm or rng.random() < 0.3:
            return []
        kinds = ["kill", "kill after", "error", "lost reply", "lost reply", "full"]
        at, kind, error = rng.randrange(calls), rng.choice(kinds), rng.choice(ERRORS)
        if kind == "full":
            return [Fault(call, "full") for call in range(at, _MOST_CALLS)]
        faults = [Fault(at, kind, error)]
        if rng.random() < 0.3:
            faults.append(Fault(at + rng.randrange(1, 6), rng.choice(kinds[:-1]), rng.choice(ERRORS)))
        return faults

    def _run(self, *commands: Command) -> None:
        self.world.run(*commands)
        for command in commands:
            self.log.append(f"{command.name}: {command.calls} calls, {command.outcome!r:.300}")

    # -- what must hold

    def _outcome_problems(self) -> Iterator[str]:
        commands = self.world.commands
        is_disturbed = any(command.was_hit for command in commands) or self.world.lag_s
        for command in commands:
            outcome = command.outcome
            if outcome is None or isinstance(outcome, Killed | SupersededError):
                continue
            if not isinstance(outcome, RunFailed | UserError):
                yield f"{command.name}: ended with {outcome!r}"
            elif self.scenario == "same config" and not is_disturbed:
                yield f"{command.name}: failed, though nothing did: {outcome!r}"
            elif self.scenario == "same config" and isinstance(outcome, UserError) and not command.was_hit:
                yield f"{command.name}: blames the user: {outcome!r}"

    def _end_problems(self) -> Iterator[str]:
        """Yield what the next commands find wrong."""
        config = self._config_of_run()
        if self.scenario in ("repair", "damage", "deletion") and RUN_FILE in self.world.objects:
            repairing = Command("repair", plad_verify(repair=True))
            self._run(repairing)
            if repairing.outcome is not None:
                yield f"the repair fails: {repairing.outcome!r}"
        if self.scenario == "deletion":
            self.step = "run"  # the deleted part may be one of an earlier step
        final = Command("next", plad(config, self.step))
        self._run(final)
        if self._is_bad_source_begun and isinstance(final.outcome, UserError):
            return  # a command that was killed could not withdraw its blocks
        if final.outcome is not None:
            yield f"the next command fails: {final.outcome!r}"
            return
        check = Command("verify", plad_verify())
        self._run(check)
        if check.outcome is not None:
            yield f"verify finds a problem: {check.outcome!r}"
        last = "pair" if self.step == "run" else self.step
        expected = {key: _row(data) for key, data in snapshots(config)[last].items() if is_part(key)}
        if (actual := content(self.world)) != expected:
            differing = {key for key in actual.keys() | expected.keys() if actual.get(key) != expected.get(key)}
            yield f"other rows than those of an undisturbed run: {sorted(differing)}"

    def _config_of_run(self) -> Config:
        """Return the config with which the user continues: that of the run unless it is bad."""
        if RUN_FILE not in self.world.objects:
            return self.configs[0]
        stored = load_run(URL).config.fingerprint()
        return next((config for config in self.configs[:2] if config.fingerprint() == stored), self.configs[0])

    @property
    def _is_bad_source_begun(self) -> bool:
        return self.scenario == "bad source" and self.world.commands[0].was_hit


def content(world: World) -> dict[str, Row]:
    """Return the content of all parts, without what depends on the attempt."""
    return {key: _row(data) for key, data in world.objects.items() if is_part(key)}


@cache
def _row(data: bytes) -> Row:
    rows = pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist()
    return Row(read_header(data).fingerprint, json.dumps(rows))


_SNAPSHOTS: dict[str, dict[str, dict[str, bytes]]] = {}


def snapshots(config: Config) -> dict[str, dict[str, bytes]]:
    """Return the objects of an undisturbed run after each of its stages; none after none."""
    key = config.fingerprint()
    if key not in _SNAPSHOTS:
        _SNAPSHOTS[key] = {"": {}}
        with in_world(World(0)) as world:
            for step in list(_STEPS)[1:]:
                command = Command(step, plad(config, step))
                world.run(command)
                assert command.outcome is None, command.outcome
                _SNAPSHOTS[key][step] = dict(world.objects)
    return _SNAPSHOTS[key]
