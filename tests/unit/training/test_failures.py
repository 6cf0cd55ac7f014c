"""Descriptions of failed worker groups: the first death, not the connections that broke with it."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from plad_dist.errors import RunFailed, UserError
from plad_dist.nursery.client import ChildDied
from plad_dist.training.driver.failures import describe_failure, root_cause, unreachable_ranks


def broken_connection() -> RuntimeError:
    return RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.3]:1234")


def test_a_death_is_named_and_not_the_connections_that_broke_with_it() -> None:
    death = WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())
    error = WorkerGroupError("failed", {0: broken_connection(), 1: death})
    assert describe_failure(error).startswith("worker 1 died: ")
    assert "Connection closed" not in describe_failure(error)


def test_a_death_for_lack_of_memory_says_what_to_do() -> None:
    death = ChildDied("its process was killed by SIGKILL on node a: out of memory", lacked_memory=True)
    error = WorkerGroupError("failed", {0: broken_connection(), 1: death})
    assert describe_failure(error) == (
        "worker 1 died: its process was killed by SIGKILL on node a: out of memory "
        "(lower training.micro_batch_tokens, or add workers)"
    )


def test_a_worker_that_does_not_respond_is_named_with_the_key_of_the_timeout() -> None:
    error = WorkerGroupError("failed", {0: broken_connection(), 1: WorkerHealthCheckTimeoutError("late")})
    assert describe_failure(error) == "worker 1 does not respond (training.worker_timeout_s)"


def test_a_failure_without_a_death_is_described_by_the_last_line_of_its_message() -> None:
    error = WorkerGroupError("failed", {1: ValueError("line one\nno space left on device")})
    assert describe_failure(error) == "worker 1 failed: ValueError: no space left on device"


def test_a_node_that_left_as_announced_is_no_death() -> None:
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert describe_failure(PreemptionError(preemption_info=info)) == "a node has left as announced"


def test_the_error_that_ended_the_controller_is_its_root_cause() -> None:
    error = RunFailed("waited 600 s for room for 4 workers")
    assert root_cause(ControllerError(error)) is error
    assert root_cause(ControllerError(UserError("x"))).args == ("x",)
    assert "waited 600 s" in describe_failure(ControllerError(error))


def test_only_workers_that_do_not_respond_are_unreachable() -> None:
    unavailable = WorkerHealthCheckFailedError("failed", failure=ActorUnavailableError("lost", None))
    dead = WorkerHealthCheckFailedError("failed", failure=ActorDiedError())
    error = WorkerGroupError(
        "failed", {0: broken_connection(), 1: unavailable, 2: WorkerHealthCheckTimeoutError("late"), 3: dead}
    )
    assert unreachable_ranks(error) == [1, 2]


def test_a_failure_that_a_worker_reports_is_shown_in_full() -> None:
    reported = RunFailed(f"{'x' * 400}: No space left on device. What is committed is kept")
    error = WorkerGroupError("failed", {1: reported})
    assert describe_failure(error) == f"worker 1 failed: {reported}"
