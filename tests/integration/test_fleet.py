"""The fleet driver on real Ray, with backends whose faults the test chooses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from plad_dist.config import Config, Decoding
from plad_dist.config_file import parse_config
from plad_dist.data.claims import SupersededError, claim_run
from plad_dist.data.dataset import Dataset
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.fleet.driver import run_fleets
from plad_dist.fleet.fleet import Assignment, Fleet
from plad_dist.fleet.placement import Placement
from plad_dist.fleet.protocol import Hints
from plad_dist.progress import Progress
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.job import SamplingJob
from tests.conftest import tiny_config
from tests.fakes import FakeBackend

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class World:
    """A run directory with prompts, and the fleet that samples them."""

    def __init__(self, folder: Path, prompts: list[str], block_size: int = 8, **sampling: Any) -> None:
        self.folder = folder
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        (folder / "heldout.jsonl").write_text('{"prompt": "held out"}\n')
        raw = tiny_config(folder)
        raw["prompts"] = {
            "source": {"type": "files", "paths": [str(folder / "prompts.jsonl")]},
            "heldout": {"type": "files", "paths": [str(folder / "heldout.jsonl")]},
            "block_size": block_size,
        }
        raw["training"]["warmup"]["data"] = "teacher"
        del raw["training"]["teacher"]
        raw["teacher"] = {"path": str(folder)}
        raw["sampling"] = {"heartbeat_timeout_s": 8, "window": 2, **sampling}
        raw["cluster"] = {"start_timeout_s": 40}
        self.config: Config = parse_config(raw, "test")
        self.storage = Storage(str(folder / "run"))
        self.storage.replace("x", b"")
        prepare_without_models(self.config, self.storage)
        self.rows = [part.rows for part in train_prompts(self.storage).require("prepare").parts]
        self.job = SamplingJob(
            prompts="prompts", output="samples/teacher/round-0", role="teacher", model="fake", weights="fake",
            decoding=Decoding(), n=1, seed=1, round=0, seed_round=0, fingerprint="f",
        )  # fmt: skip

    @property
    def dataset(self) -> Dataset:
        return self.job.dataset(self.storage)

    def run(self, seconds: float = 0.01, cpus: float = 1, **fleet: Any) -> None:
        backend = partial(FakeBackend, str(self.folder), seconds)
        assignment = Assignment(self.job, range(len(self.rows)), self.rows)
        fleets = [Fleet("fake", (assignment,), Sampler, (self.storage, backend), Placement(cpus), **fleet)]
        run_fleets(self.config, self.storage, fleets, Progress())

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def started_pids(self) -> list[int]:
        """Return the process of each actor that started, in order."""
        return [int(line.split()[1]) for line in self.log() if line.startswith("start")]

    def samples(self) -> list[dict[str, Any]]:
        return self.dataset.read().to_pylist()

    def when(self, condition: Any, action: Any) -> None:
        """Call a function, in a thread, as soon as a condition holds."""

        def watch() -> None:
            deadline = time.monotonic() + 250
            while not (holds := condition()) and time.monotonic() < deadline:
                time.sleep(0.02)
            if holds:
                action()

        threading.Thread(target=watch, daemon=True).start()

    def engines_up(self) -> int:
        """Return how many engines have been up so far."""
        return self.log().count("up")


def prepare_without_models(config: Config, storage: Storage) -> None:
    """Prepare the prompts without the pretrained tokenizer that would measure them."""
    prepare(config.model_copy(update={"teacher": config.student}), storage)


def numbered(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


def count_parts(world: World) -> int:
    return len(list((world.folder / "run" / "samples" / "teacher" / "round-0").glob("part-*.arrow")))


def assert_exactly_once(world: World) -> None:
    prompts = train_prompts(world.storage).read()["prompt_id"].to_pylist()
    assert [row["prompt_id"] for row in world.samples()] == prompts


def test_one_actor_asks_each_prompt_once(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(100))
    world.run()
    assert_exactly_once(world)
    requests = Counter(line for line in world.log() if line.startswith("ask"))
    assert set(requests.values()) == {1}
    assert "stop" in world.log(), "the engine was stopped, not only killed"


def test_a_superseded_driver_stops_its_actors_within_seconds(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(400))
    world.storage = replace(world.storage, claim=claim_run(world.storage, "plad run"))
    superseded: list[float] = []

    def take_over() -> None:
        claim_run(world.storage, "plad sample")
        superseded.append(time.monotonic())

    world.when(lambda: count_parts(world) >= 2, take_over)
    with pytest.raises(SupersededError, match=r"`plad sample` on .* has taken over the run"):
        world.run(seconds=1.0, replicas=2)
    assert time.monotonic() - superseded[0] < 20
    assert count_parts(world) < len(world.rows)
    assert world.dataset.manifest() is None
    world.when(lambda: not any(map(psutil.pid_exists, world.started_pids())), lambda: superseded.append(0.0))
    while len(superseded) < 2:
        assert time.monotonic() - superseded[0] < 60
        time.sleep(0.1)


def test_several_actors_share_the_blocks_and_leave_a_manifest_and_no_journal(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(100))
    (tmp_path / "hang").touch()
    world.when(lambda: world.engines_up() == 3, (tmp_path / "hang").unlink)
    world.run(replicas=3)
    assert_exactly_once(world)
    assert len(set(world.started_pids())) == 3
    assert world.dataset.require("sample").count("tokens") == 200
    assert not (world.folder / "run/samples/teacher/round-0/journal").exists() or not any(
        (world.folder / "run/samples/teacher/round-0/journal").iterdir()
    )


def test_a_killed_actor_is_replaced_and_what_it_committed_is_kept(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(200))
    before: dict[Path, bytes] = {}

    def kill() -> None:
        before.update((path, path.read_bytes()) for path in (tmp_path / "run/samples").rglob("part-*.arrow"))
        os.kill(world.started_pids()[0], signal.SIGKILL)

    world.when(lambda: count_parts(world) > 2, kill)
    world.run(seconds=0.3)
    assert_exactly_once(world)
    assert len(world.started_pids()) == 2
    assert before
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_frozen_actor_is_given_up_after_its_heartbeats_stop(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(120))
    world.when(lambda: count_parts(world) > 1, lambda: os.kill(world.started_pids()[0], signal.SIGSTOP))
    world.run(seconds=0.3)
    assert_exactly_once(world)
    assert len(world.started_pids()) == 2


def test_an_engine_that_hangs_without_dying_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(60), stall_timeout_s=10)
    world.when(lambda: count_parts(world) > 1, (tmp_path / "hang").touch)
    world.when(lambda: len(world.started_pids()) > 1, lambda: (tmp_path / "hang").unlink())
    world.run(seconds=0.3)
    assert_exactly_once(world)
    assert len(world.started_pids()) >= 2


def test_a_poison_row_becomes_an_error_row_and_all_others_are_sampled(tmp_path: Path) -> None:
    prompts = numbered(120)
    prompts[37] = "poison"
    world = World(tmp_path, prompts, max_error_share=0.05)
    world.run()
    assert_exactly_once(world)
    errors = [row for row in world.samples() if row["error"]]
    assert len(errors) == 1
    assert errors[0]["finish_reason"] == "error"
    assert "killed or hung its engine 2 times while no other row ran: the fake engine died" in errors[0]["error"]
    assert len(world.started_pids()) <= 6


def test_a_row_that_hangs_its_engine_becomes_an_error_row_too(tmp_path: Path) -> None:
    prompts = numbered(60)
    prompts[37] = "stall"
    world = World(tmp_path, prompts, max_error_share=0.05, heartbeat_timeout_s=4, stall_timeout_s=3)
    world.run()
    assert_exactly_once(world)
    (error,) = [row["error"] for row in world.samples() if row["error"]]
    assert "killed or hung its engine 2 times while no other row ran: alive, but without progress for" in error


def test_a_response_that_takes_longer_than_the_stall_timeout_is_waited_for(tmp_path: Path) -> None:
    """The heartbeats report the tokens of its engine."""
    world = World(tmp_path, [*numbered(10), "long"], stall_timeout_s=4)
    world.run()
    assert_exactly_once(world)
    assert len(world.started_pids()) == 1
    assert not any(row["error"] for row in world.samples())


def test_a_row_that_crashes_the_whole_actor_fails_the_run_in_the_end(tmp_path: Path) -> None:
    world = World(tmp_path, [*numbered(20), "crash", *numbered(10)])
    with pytest.raises(
        RunFailed, match=r"part-00002\.arrow failed 3 times, at last with: .*(error code 2|cannot be reached)"
    ):
        world.run()
    assert count_parts(world) > 0


def test_refused_rows_and_rows_that_keep_failing_become_error_rows(tmp_path: Path) -> None:
    prompts = numbered(150)
    prompts[3], prompts[140], prompts[77] = "refuse", "glitch", "twice"
    world = World(tmp_path, prompts, max_error_share=0.05)
    world.run(replicas=2)
    assert_exactly_once(world)
    assert {row["text"] or row["error"] for row in world.samples() if row["error"]} == {
        "refused",
        "failed 3 times: glitch",
    }
    assert world.dataset.require("sample").count("errors") == 2
    assert world.samples()[77]["finish_reason"] == "stop", "a row that succeeds in the end is a good row"


def test_too_many_error_rows_stop_the_stage_with_examples_and_count_over_restarts(tmp_path: Path) -> None:
    world = World(tmp_path, ["refuse" if number % 5 == 0 else f"prompt {number}" for number in range(400)])
    with pytest.raises(RunFailed, match=r"rows are errors, more than .*max_error_share=0.01.*\n  prompt \w+: refused"):
        world.run()
    parts_before = count_parts(world)
    assert parts_before > 0
    with pytest.raises(RunFailed, match="rows are errors"):
        world.run()
    assert count_parts(world) <= parts_before + 4, "the restart knows the error rows of the first attempt"


def test_an_engine_that_does_not_start_is_reported_with_its_own_reason(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(10))
    (tmp_path / "down").touch()
    with pytest.raises(UserError, match="the fake is down"):
        world.run()


def test_too_few_actors_stop_the_stage_with_what_was_requested(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(100))
    object.__setattr__(world.config.cluster, "start_timeout_s", 12)
    (tmp_path / "hang").touch()
    with pytest.raises(
        RunFailed, match=r"for 12 s, only [01] actors had their resources; expected at least 2 of 2, each with 4 CPUs"
    ):
        world.run(cpus=4, replicas=2, min_replicas=2)


def hold_cpus() -> None:
    time.sleep(600)


def test_actors_that_start_late_take_part(tmp_path: Path) -> None:
    """More actors are requested than fit. As soon as CPUs are free, one more starts."""
    world = World(tmp_path, numbered(100))
    blocker = ray.remote(num_cpus=3)(hold_cpus).remote()

    def make_room() -> None:
        (tmp_path / "hang").touch()  # until the second actor is up
        ray.cancel(blocker, force=True)

    world.when(lambda: count_parts(world) > 2, make_room)
    world.when(lambda: world.engines_up() == 2, (tmp_path / "hang").unlink)
    try:
        world.run(seconds=0.5, cpus=3, replicas=2)
    finally:
        ray.cancel(blocker, force=True)
    assert_exactly_once(world)
    assert len(set(world.started_pids())) == 2


def test_a_resume_knows_most_parts_from_the_journal(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(400))
    world.when(lambda: count_parts(world) > 4, lambda: signal.raise_signal(signal.SIGINT))
    # A shell's background jobs ignore SIGINT.
    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            world.run(seconds=0.3)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    committed = world.dataset.committed()
    assert committed
    assert sum(part is None for part in committed.values()) <= 2
    world.run()
    assert_exactly_once(world)


def test_error_rows_that_no_journal_knows_count_at_the_end(tmp_path: Path) -> None:
    """Both the driver that saw them and its journal are gone."""
    world = World(
        tmp_path, ["refuse" if number % 5 == 0 else f"prompt {number}" for number in range(80)], max_error_share=1.0
    )
    world.run()
    for name in ("manifest.json", "part-00009.arrow"):
        (tmp_path / "run/samples/teacher/round-0" / name).unlink()
    object.__setattr__(world.config.sampling, "max_error_share", 0.01)
    with pytest.raises(RunFailed, match="rows are errors"):
        world.run()
    assert world.dataset.manifest() is None


def test_a_block_whose_reply_was_lost_is_not_sampled_again(tmp_path: Path) -> None:
    """An attempt that finds its block committed returns the existing part."""
    world = World(tmp_path, numbered(16))
    world.run()
    lines_before = len(world.log())
    part = world.dataset.find(1, "f")
    sampler = Sampler(world.storage, partial(FakeBackend, str(tmp_path), 0.01))

    async def work_again() -> None:
        await sampler.start()
        result = await sampler.work(world.job, 1, "late", Hints())
        assert (result.part, result.is_first) == (part, False)

    asyncio.run(work_again())
    assert [line for line in world.log()[lines_before:] if line.startswith("ask")] == []


def test_actors_that_cannot_start_do_not_end_a_fleet_that_works(tmp_path: Path) -> None:
    """One node is broken and its engines refuse to start; the other engines continue."""
    world = World(tmp_path, numbered(160))
    world.when(lambda: world.engines_up() == 2 and count_parts(world) > 1, (tmp_path / "down").touch)
    world.when((tmp_path / "down").exists, lambda: os.kill(world.started_pids()[0], signal.SIGKILL))
    world.run(seconds=0.5, replicas=2)
    assert_exactly_once(world)


def test_an_engine_that_refuses_first_does_not_end_a_fleet_whose_others_start(tmp_path: Path) -> None:
    """A broken node refuses sooner than the other nodes load a model."""
    world = World(tmp_path, numbered(40))
    (tmp_path / "broken").write_text("3")
    world.run(replicas=3)
    assert_exactly_once(world)
    assert not (tmp_path / "broken").exists()


def test_a_config_that_every_engine_refuses_ends_a_fleet_of_several(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(40))
    (tmp_path / "down").touch()
    with pytest.raises(UserError, match="the fake is down"):
        world.run(replicas=3)


def test_an_engine_that_does_not_come_up_in_time_is_given_up_and_reported(tmp_path: Path) -> None:
    world = World(tmp_path, numbered(20), engine_start_timeout_s=2, max_attempts=1)
    (tmp_path / "slow").touch()
    with pytest.raises(RunFailed, match=r"not up within sampling\.engine_start_timeout_s=2"):
        world.run()
