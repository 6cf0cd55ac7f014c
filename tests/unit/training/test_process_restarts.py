"""Ray workers agree on restarts of their processes, so that none waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest
import ray

from plad_dist.nursery.child import ChildFailed
from plad_dist.nursery.client import ChildDied, ChildKilled
from plad_dist.training.driver.mailbox import ProgressMailbox
from plad_dist.training.driver.process_restarts import ProcessRestarts
from plad_dist.training.messages import Said, StepDone
from plad_dist.training.worker import entry

NURSERY = Path("nursery.sock")


def group_of(number: int = 1) -> ProcessRestarts:
    restarts = ProcessRestarts(most=100)
    restarts.new_group(number)
    return restarts


def test_several_deaths_at_once_are_one_restart() -> None:
    restarts = group_of()
    assert restarts.request(1, 0, takes_steps=True)
    assert restarts.request(1, 0, takes_steps=True)
    assert restarts.count == 1


def test_a_late_request_of_an_earlier_group_restarts_nothing() -> None:
    restarts = group_of(2)
    assert not restarts.request(1, 0, takes_steps=True)
    assert restarts.count == 0


def test_the_whole_group_restarts_after_processes_died_again_and_again_before_a_step() -> None:
    restarts = group_of()
    for count in range(3):
        assert restarts.request(1, count, takes_steps=False)
    assert not restarts.request(1, 3, takes_steps=False)
    assert restarts.request(1, 3, takes_steps=True), "a step was taken meanwhile"


def test_no_process_restarts_for_a_worker_that_has_finished() -> None:
    restarts = group_of()
    assert restarts.finish(1, 0)
    assert not restarts.request(1, 0, takes_steps=True)


def test_a_worker_does_not_finish_while_others_restart() -> None:
    restarts = group_of()
    restarts.request(1, 0, takes_steps=True)
    assert not restarts.finish(1, 0)
    assert restarts.finish(1, 1)


def test_a_wait_ends_with_a_restart_and_with_its_group() -> None:
    async def check(end: Callable[[ProcessRestarts], Any]) -> int | None:
        restarts = group_of()
        waiting = asyncio.create_task(restarts.wait(1, 0))
        await asyncio.sleep(0)
        assert not waiting.done()
        end(restarts)
        return await asyncio.wait_for(waiting, 10)

    assert asyncio.run(check(lambda restarts: restarts.request(1, 0, takes_steps=True))) == 1
    assert asyncio.run(check(lambda restarts: restarts.new_group(2))) is None, "not a restart"


def test_workers_meet_at_the_address_that_belongs_to_the_latest_restart() -> None:
    async def check() -> None:
        restarts = group_of()
        assert await restarts.meet(1, "id", "a") == ("a", 0)
        assert await restarts.meet(1, "id", None) == ("a", 0)
        restarts.request(1, 0, takes_steps=True)
        late = asyncio.create_task(restarts.meet(1, "id", None))
        await asyncio.sleep(0)
        assert not late.done(), "the first worker has not come back"
        assert await restarts.meet(1, "id", "b") == ("b", 1)
        assert await late == ("b", 1)
        restarts.new_group(2)
        assert await restarts.meet(1, "id", "c") is None
        late = asyncio.create_task(restarts.meet(2, "id", None))
        assert await restarts.meet(2, "id of the group before", "c") == ("c", 0), "it has read the new number"
        await asyncio.sleep(0)
        assert not late.done(), "the address is that of an earlier group"
        restarts.new_group(3)
        assert await late is None

    asyncio.run(asyncio.wait_for(check(), 10))


def test_a_worker_of_an_ended_group_restarts_nothing_and_may_finish() -> None:
    restarts = group_of(2)
    assert asyncio.run(asyncio.wait_for(restarts.wait(1, 0), 10)) is None
    assert restarts.finish(1, 0)
    assert restarts.request(2, 0, takes_steps=True), "the present group has not finished"


def test_restarts_of_processes_are_limited_over_all_groups() -> None:
    restarts = ProcessRestarts(most=2)
    restarts.new_group(1)
    assert restarts.request(1, 0, takes_steps=True)
    restarts.new_group(2)
    assert restarts.request(2, 0, takes_steps=True)
    assert not restarts.request(2, 1, takes_steps=True)
    unlimited = ProcessRestarts(most=-1)
    unlimited.new_group(1)
    assert all(unlimited.request(1, count, takes_steps=True) for count in range(200))


def test_a_step_that_is_repeated_does_not_count() -> None:
    mailbox = ProgressMailbox("round-0", 100)
    mailbox.new_group(2)
    step = StepDone("round-0", 1, 8, 100, 2, {"loss": 1.0, "seconds": 1.0})
    assert mailbox.restart_processes(1, 0, "worker 1 died")
    mailbox.drain()
    mailbox.post(step, 0)
    assert (mailbox.takes_steps(), mailbox.drain()) == (False, [])
    mailbox.post(step, 1)
    assert (mailbox.takes_steps(), mailbox.drain()) == (True, [step])


def test_a_restart_is_reported_once_and_begins_a_start() -> None:
    mailbox = ProgressMailbox("round-0", 100)
    mailbox.new_group(2)
    mailbox.post(StepDone("round-0", 1, 8, 100, 2, {"loss": 1.0, "seconds": 1.0}))
    mailbox.drain()
    for _ in range(2):
        assert mailbox.restart_processes(1, 0, "worker 1 died")
    assert not mailbox.takes_steps()
    texts = [message.text for message in mailbox.drain() if isinstance(message, Said)]
    assert texts == ["worker 1 died; the training processes are restarted"]


def test_a_step_ends_a_row_of_failed_starts_after_which_nurseries_are_not_used() -> None:
    mailbox = ProgressMailbox("round-0", 100)
    assert mailbox.may_start_warm()
    warm = []
    for _ in range(4):
        mailbox.new_group(2)
        warm.append(mailbox.may_start_warm())
        mailbox.disrupted()
    assert warm == [True, True, False, False]
    texts = [message.text for message in mailbox.drain() if isinstance(message, Said)]
    assert texts == ["starts without nurseries, since 2 starts have failed"]
    mailbox.post(StepDone("round-0", 1, 8, 100, 2, {"loss": 1.0, "seconds": 1.0}))
    mailbox.new_group(2)
    assert mailbox.may_start_warm()


# -- the protocol of the workers, in threads


class World:
    """Workers of a group in threads, whose processes do what a script says.

    Args:
        script: action of the process of each rank after so many restarts; processes without one
            finish as soon as those of all ranks have started at their address.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int, script: dict[tuple[int, int], str]) -> None:
        self.size, self.script = size, script
        self.rank = threading.local()
        self.servers: list[Path | None] = []  # of all processes
        self.rounds: Counter[int] = Counter()  # processes started so far by rank
        self.started: Counter[str] = Counter()  # processes by address
        self.restarts: Counter[str] = Counter()  # before the processes of an address
        self.lock, self.loop = threading.RLock(), asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._barrier, self._news = threading.Barrier(size), [None]
        self.mailbox = ProgressMailbox("round-0", 100)
        self.mailbox.new_group(size)
        self.mailbox.post(StepDone("round-0", 1, 8, 100, size, {"loss": 1.0, "seconds": 1.0}))
        addresses = iter(range(1000))
        monkeypatch.setattr(entry, "broadcast_from_rank_zero", self._broadcast)
        monkeypatch.setattr(entry, "group_id", lambda: "id")
        monkeypatch.setattr(entry, "_free_address", lambda: f"address {next(addresses)}")
        monkeypatch.setattr(entry, "_device", lambda: None)
        monkeypatch.setattr(entry, "_nursery", lambda: NURSERY)
        monkeypatch.setattr(entry, "_LATE_NEWS_S", 0.5)
        monkeypatch.setattr(
            entry, "start_child", lambda title, function, arguments, server: Process(self, arguments[1], server)
        )
        monkeypatch.setattr(ray.train, "get_context", self._context)
        monkeypatch.setattr(ray, "get", lambda future, timeout=None: future.result(60))
        monkeypatch.setattr(ray, "wait", self._wait)

    def run(self) -> list[BaseException | None]:
        """Run all workers; return the exception of each, None for those that have finished."""
        with ThreadPoolExecutor(self.size) as pool:
            errors = [future.exception(120) for future in [pool.submit(self._work, rank) for rank in range(self.size)]]
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        return errors

    async def _end(self) -> None:
        self.mailbox.new_group(self.size)
        await asyncio.sleep(0.01)  # for the calls that wait

    def _work(self, rank: int) -> None:
        self.rank.value = rank
        entry.train_jobs({"mailbox": Remote(self), "jobs": b"", "timeout_s": 1.0, "silence_s": 1.0})

    def _broadcast(self, news: Any) -> Any:
        if news is not None:
            self._news = [news]
        self._barrier.wait(60)
        news = self._news[0]
        self._barrier.wait(60)
        return news

    def _context(self) -> Any:
        names = ("get_world_rank", "get_local_rank", "get_local_world_size", "get_node_rank")
        methods = {name: (lambda: self.rank.value) for name in names}
        return SimpleNamespace(get_world_size=lambda: self.size, **methods)

    @staticmethod
    def _wait(futures: list[Future[Any]], timeout: float) -> tuple[list[Future[Any]], list[Future[Any]]]:
        try:
            futures[0].result(timeout or 0.01)
        except TimeoutError:
            return [], futures
        return futures, []


class Remote:
    """Handle of the mailbox, whose methods run in the event loop of its actor."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            result = getattr(self._world.mailbox, name)(*arguments)
            result = await result if asyncio.iscoroutine(result) else result
            if name == "meet" and result is not None:
                self._world.restarts[result[0]] = result[1]
            return result

        return SimpleNamespace(
            remote=lambda *arguments: asyncio.run_coroutine_threadsafe(call(*arguments), self._world.loop)
        )


class Process:
    """Training process that follows the script of its world."""

    def __init__(self, world: World, seat: Any, server: Path | None) -> None:
        self._world, self._seat = world, seat
        with world.lock:
            world.servers.append(server)
            self._action = world.script.get((seat.rank, world.restarts[seat.address]), "finish")
            world.rounds[seat.rank] += 1
            world.started[seat.address] += 1

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        pass

    def serve(self, handlers: Any, silence_s: float, must_end: Callable[[], bool]) -> None:
        if self._action == "die":
            raise ChildDied("its process was killed by SIGKILL")
        if self._action == "abort":
            raise ChildDied("its process was killed by SIGABRT", is_aborted=True)
        if self._action == "fail":
            raise ChildFailed("RuntimeError: Connection closed by peer")
        while self._action == "hang" or self._world.started[self._seat.address] < self._world.size:
            if must_end():
                raise ChildKilled


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "script",
    [
        {},
        {(0, 0): "die"},
        {(1, 0): "die", (2, 0): "fail"},
        {(0, 0): "abort", (1, 0): "die", (2, 0): "abort"},
        {(0, 0): "die", (1, 0): "die", (2, 0): "die"},
        {(0, 0): "die", (0, 1): "die", (1, 1): "hang", (2, 2): "die"},
        {(rank, round): "die" if (rank + round) % 3 else "hang" for rank in range(3) for round in range(3)},
    ],
)
def test_all_workers_finish_together_whatever_dies(
    monkeypatch: pytest.MonkeyPatch, script: dict[tuple[int, int], str]
) -> None:
    for _ in range(20):  # other interleavings
        world = World(monkeypatch, 3, script)
        assert world.run() == [None] * 3
        assert 3 in world.started.values(), "the last processes met at one address"


def test_a_process_that_dies_again_and_again_is_started_without_a_nursery(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 1, {(0, round): "die" for round in range(3)})
    assert world.run() == [None]
    assert world.servers == [NURSERY, NURSERY, NURSERY, None], "the first one had taken a step"


@pytest.mark.parametrize(("action", "error"), [("fail", ChildFailed), ("abort", ChildDied)])
def test_an_error_without_a_death_fails_the_worker(
    monkeypatch: pytest.MonkeyPatch, action: str, error: type[Exception]
) -> None:
    world = World(monkeypatch, 1, {(0, 0): action})
    assert isinstance(world.run()[0], error)


@pytest.mark.timeout(180)
def test_a_worker_without_a_mailbox_trains_and_leaves_deaths_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: Any) -> None:
        raise ray.exceptions.RayActorError

    world = World(monkeypatch, 2, {})
    monkeypatch.setattr(world.mailbox, "present_group", dead)
    assert world.run() == [None, None]
    assert world.rounds == {0: 1, 1: 1}
    world = World(monkeypatch, 1, {(0, 0): "die"})
    monkeypatch.setattr(world.mailbox, "present_group", dead)
    assert isinstance(world.run()[0], ChildDied)


@pytest.mark.timeout(180)
def test_workers_of_a_group_that_has_ended_do_not_restart_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train ends them after the next group is announced."""
    world = World(monkeypatch, 2, {})
    present_group = world.mailbox.present_group
    monkeypatch.setattr(world.mailbox, "present_group", lambda: present_group() - 1)
    assert world.run() == [None, None]
    assert world.rounds == {0: 1, 1: 1}
