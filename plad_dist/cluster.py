"""Ray: join the configured cluster, or start a local one for the duration of the command."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from plad_dist.config import Config
from plad_dist.errors import RunFailed, UserError
from plad_dist.holders import Holder
from plad_dist.planning.fit import check_fits
from plad_dist.planning.hardware import Hardware, hardware_of_nodes
from plad_dist.progress import Progress
from plad_dist.reach import ray_problem
from plad_dist.rundir import RunDir

logger = logging.getLogger("plad")


@contextmanager
def connected(config: Config, progress: Progress) -> Iterator[Callable[[Collection[Holder]], None]]:
    """Provide a function that connects to Ray on its first call, and disconnect at the end.

    The function takes the parts of the run that are still to do, as :func:`refuse_unfit` does.
    """
    is_connected = False

    def connect(remaining: Collection[Holder]) -> None:
        nonlocal is_connected
        if is_connected:
            return
        is_connected = True
        import ray

        from plad_dist.prometheus import run_metrics
        from plad_dist.sampling.warm import warm_local_engines
        from plad_dist.training.driver.warm import warm_workers
        from plad_dist.training.worker.seat import NURSERY

        resources.callback(ray.shutdown)
        _connect(config)
        if not _joins(config):  # no autoscaler waits for the only node to be idle
            kinds = {holder.kind for holder in remaining}
            if trains := "train" in kinds:
                resources.enter_context(warm_workers(config))
            if kinds - {"train"}:
                begins_with_training = trains and (config.training.teacher or config.training.warmup)
                resources.enter_context(warm_local_engines(config, NURSERY if begins_with_training else None))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        refuse_unfit(config, hardware_of_nodes(nodes), remaining)
        resources.enter_context(run_metrics(RunDir.of(config).storage.local_root, progress))

    with ExitStack() as resources:
        yield connect


def _joins(config: Config) -> str | None:
    """Return the address of the cluster to join, or None to start a local one."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _connect(config: Config) -> None:
    # Keep Ray from building an environment for the workers if `uv run` started the driver.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # When a problem ends a stage, replies of other blocks with the same problem are not read. Ray
    # would print a traceback for each of them before the message.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        logger.warning(
            "ray: RAY_AUTH_MODE=disabled is set: everyone who reaches Ray's ports can run programs as this user; unset "
            "it, or set RAY_AUTH_MODE=token"
        )
    import ray

    address = _joins(config)
    if address and (problem := ray_problem(address)) is not None:
        raise UserError(f"cluster.address: {address}: no Ray cluster responds ({problem})")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            protect_token()  # one of an earlier Ray
            ray.init(
                address="local",
                num_cpus=_local_cpus(config),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            protect_token()
    except (ConnectionError, ValueError) as error:
        raise UserError(f"cluster.address: {address}: no Ray cluster responds ({error})") from None
    except RuntimeError as error:
        raise RunFailed(f"Ray did not start: {error}") from None
    resources = ray.cluster_resources()
    logger.info(
        "ray: %s: %d node(s), %g CPUs, %g GPUs",
        f"joined {address}" if address else "started a local Ray",
        len(ray.nodes()),
        resources.get("CPU", 0),
        resources.get("GPU", 0),
    )


def protect_token() -> None:
    """Let only this user read the token of local Rays, which Ray writes readable by all."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # a home that is read-only, or another user's
        token.parent.mkdir(mode=0o700, exist_ok=True)
        token.chmod(0o600)


def refuse_unfit(config: Config, hardware: Hardware | None, remaining: Collection[Holder] | None = None) -> None:
    """Raise :class:`UserError` for a config that needs more memory than the devices have.

    A shortage that a larger worker group avoids is logged as a warning. Models whose size is
    unknown are not checked.

    Args:
        hardware: None if it is unknown; then nothing is checked.
        remaining: parts of the run that are still to do; None for all.
    """
    if hardware is None:
        return
    try:
        problems = check_fits(config, hardware, remaining)
    except UserError as error:
        logger.info("not planned: %s", error)
        return
    refused = [problem for problem in problems if problem.always and config.cluster.unfit == "refuse"]
    for problem in problems:
        if problem not in refused:
            logger.warning("may not fit: %s", problem)
    if refused:
        text = "\n  ".join(["this config does not fit:", *map(str, refused)])
        raise UserError(
            f"{text}\n`plad plan` shows the memory of every part; cluster.unfit=warn runs the config anyway"
        )


def _local_cpus(config: Config) -> int:
    """Return a number of CPUs for the training workers beside the sampling actors of all roles.

    On a small machine, it exceeds the number of cores, which are then shared.
    """
    training = config.training.workers[1] * config.training.cpus_per_worker
    roles = [*(teacher.sampling for teacher in config.all_teachers().values()), config.sampling.student]
    if (other := config.rejected_writer()) is not None:
        roles.append(other.sampling)
    sampling = sum(role.cpus * (1 if role.replicas == "auto" else role.replicas) for role in roles if role)
    pairing = config.pairing.cpus_per_worker * config.pairing.workers
    return max(os.cpu_count() or 1, math.ceil(training + sampling), math.ceil(pairing))
