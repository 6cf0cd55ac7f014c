"""Observer of a worker group: its wait for resources, and the nodes that it counts on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

from plad_dist.compat.ray_scaling import NodeResources
from plad_dist.errors import RunFailed
from plad_dist.timeline import Activity
from plad_dist.training.driver import elastic
from plad_dist.training.driver.elastic import GroupSettings, WorkerGroupCallbacks
from plad_dist.training.messages import Enters, Message, Said


class Clock:
    """Clock of the module, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(elastic, "time", SimpleNamespace(monotonic=lambda: self.now))


class Mailbox:
    """Records posted messages; has no replies."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.post = SimpleNamespace(remote=self.messages.append)
        self.disrupted = SimpleNamespace(remote=lambda: None)

    @property
    def texts(self) -> list[str]:
        return [message.text for message in self.messages if isinstance(message, Said)]


def observer(mailbox: Mailbox, fewest: int, most: int) -> WorkerGroupCallbacks:
    return WorkerGroupCallbacks(mailbox, GroupSettings("round-0", fewest, most, patience=60.0, check_every=5.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(elastic.ray, "cluster_resources", lambda: {"CPU": 4.0})
    return Clock(monkeypatch)


def test_a_group_of_one_size_waits_for_resources_only_as_long_as_its_patience(clock: Clock) -> None:
    mailbox = Mailbox()
    callbacks = observer(mailbox, 8, 8)
    callbacks.on_waiting()
    callbacks.on_waiting()
    assert mailbox.messages == [Enters(Activity.WAITING)], "not at every turn of the controller"
    clock.now += 31
    callbacks.on_waiting()
    assert mailbox.texts == ["has waited 31 s for room for 8 workers; the cluster has 4 CPUs and 0 GPUs in total"]
    clock.now += 30
    with pytest.raises(RunFailed, match=r"waited 61 s \(cluster\.start_timeout_s\) for room for 8 workers"):
        callbacks.on_waiting()


def test_an_elastic_group_waits_without_limit(clock: Clock) -> None:
    mailbox = Mailbox()
    callbacks = observer(mailbox, 2, 8)
    clock.now += 10_000
    callbacks.on_waiting()
    (text,) = mailbox.texts
    assert text.startswith("has waited 10000 s for room for 2 to 8 workers")


def test_nodes_of_silent_workers_are_not_counted_on_for_a_while(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"a": NodeResources({"CPU": 2.0}, {"CPU": 1.0}), "b": NodeResources({"CPU": 3.0}, {"CPU": 2.0})}
    monkeypatch.setattr(elastic, "node_resources", lambda: nodes)
    callbacks = observer(Mailbox(), 1, 2)
    workers: list[Any] = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in ("a", "b")]
    callbacks.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    callbacks._takes_steps = lambda: True  # type: ignore[method-assign]
    callbacks.on_failure(WorkerGroupError("failed", {1: WorkerHealthCheckTimeoutError("late")}))
    assert callbacks.room({"CPU": 1.0}) == 2
    clock.now += 31
    assert callbacks.room({"CPU": 1.0}) == 5


def test_a_group_that_fails_again_and_again_before_its_first_step_is_given_up(clock: Clock) -> None:
    """On a full disk the workers cannot record that they failed."""
    takes_steps = True
    mailbox = Mailbox()
    callbacks = observer(mailbox, 2, 2)
    callbacks._takes_steps = lambda: takes_steps  # type: ignore[method-assign]
    failure = WorkerGroupError("failed", {0: RunFailed("/run/x: cannot be written: No space left on device")})
    for _ in range(9):
        callbacks.on_failure(failure)
    takes_steps = False
    for _ in range(4):
        callbacks.on_failure(failure)
    callbacks.on_failure(PreemptionError.__new__(PreemptionError))
    for _ in range(4):
        callbacks.on_failure(failure)
    with pytest.raises(RunFailed, match=r"worker 0 failed: /run/x: .*No space left.*5 times in a row"):
        callbacks.on_failure(failure)
