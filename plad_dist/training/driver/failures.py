"""Failures of a worker group in words: a death, not the connections that broke with it."""

from __future__ import annotations

from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError

from plad_dist.compat import ray_train
from plad_dist.errors import RunFailed, UserError
from plad_dist.nursery.child import ChildFailed
from plad_dist.nursery.client import ChildDied

_MAX_LENGTH = 400
_MAX_DETAILS = 4
_FOR_MEMORY = "lower training.micro_batch_tokens, or add workers"


def describe_failure(error: Any) -> str:
    """Return the cause of a failed worker group in words."""
    if ray_train.is_preemption(error):
        return "a node has left as announced"
    causes = {rank: root_cause(failure) for rank, failure in ray_train.worker_failures(error).items()}
    if not causes:
        return f"the workers could not be started: {_last_line(root_cause(error))}"
    deaths = {rank: cause for rank, cause in causes.items() if _is_death(cause)}
    rank, cause = min((deaths or causes).items(), key=lambda item: item[0])
    if isinstance(cause, RayActorError):
        return f"worker {rank} died: {_death(cause)}"
    if isinstance(cause, ChildDied):
        advice = f" ({_FOR_MEMORY})" if cause.lacked_memory else ""
        return f"worker {rank} died: {cause}{advice}"
    if ray_train.is_health_check_timeout(cause):
        return f"worker {rank} does not respond (training.worker_timeout_s)"
    return f"worker {rank} failed: {_last_line(cause)}"


def root_cause(error: BaseException) -> BaseException:
    """Return the exception at the start of a chain of causes, or the first one of our own types."""
    return ray_train.root_cause(error, stop_at=(UserError, RunFailed))


def unreachable_ranks(error: Any) -> list[int]:
    """Return the ranks of silent workers, whose nodes Ray may not have found dead yet."""
    return [rank for rank, failure in ray_train.worker_failures(error).items() if _is_silent(root_cause(failure))]


def _is_death(cause: BaseException) -> bool:
    return isinstance(cause, RayActorError | ChildDied) or ray_train.is_health_check_timeout(cause)


def _is_silent(cause: BaseException) -> bool:
    return isinstance(cause, ActorUnavailableError) or ray_train.is_health_check_timeout(cause)


def _last_line(error: BaseException) -> str:
    if isinstance(error, RunFailed | ChildFailed):  # a message of ours is complete
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:_MAX_LENGTH] if lines else ''}"


def _death(error: RayActorError) -> str:
    """Return how an actor died and where, without Ray's list of possible causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = [line for line in lines if line.startswith(("ip:", "pid:")) or "node" in line or "died" in line]
    return "; ".join(details[:_MAX_DETAILS] or lines[:1])[:_MAX_LENGTH]
