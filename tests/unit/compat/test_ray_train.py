"""Events of Ray Train's controller, and the observer that receives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from plad_dist.compat.ray_train import WorkerGroupEvents


class Recorder(WorkerGroupEvents):
    """Records the names of its events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def on_controller_start(self) -> None:
        self.events.append("controller start")

    def on_group_start(self) -> None:
        self.events.append("group start")

    def on_running(self) -> None:
        self.events.append("running")

    def on_failure(self, error: Any) -> None:
        self.events.append(f"failure {error}")

    def on_resize(self) -> None:
        self.events.append("resize")

    def on_scheduling(self, workers: int) -> None:
        self.events.append(f"scheduling {workers}")

    def on_waiting(self) -> None:
        self.events.append("waiting")


def test_states_of_the_controller_become_events() -> None:
    recorder = Recorder()
    recorder.after_controller_start(None)
    error = WorkerGroupError("lost", {})
    restarting = RestartingState(error)
    states = [
        InitializingState(), SchedulingState(ResizeDecision(3, {})), RunningState(), restarting, restarting,
        ReschedulingState(error), ResizingState(NoopDecision()),
    ]  # fmt: skip
    for previous, current in zip([InitializingState(), *states], states, strict=False):
        recorder.after_controller_state_update(previous, current)
    assert recorder.events == [
        "controller start", "waiting", "scheduling 3", "running", f"failure {error}", "waiting", "waiting", "resize",
    ]  # fmt: skip


def test_nodes_of_workers_are_known_while_their_group_runs() -> None:
    recorder = Recorder()
    assert recorder.node_by_rank == []
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in ("a", "b")]
    recorder.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    assert recorder.node_by_rank == ["a", "b"]
    recorder.after_worker_group_shutdown(None)
    assert recorder.node_by_rank == []
