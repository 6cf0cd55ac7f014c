"""Ray: join the cluster that is named, or start a local one for as long as the command runs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

from plad_dist.config import Config
from plad_dist.errors import RunFailed, UserError
from plad_dist.planning.fit import check_fits
from plad_dist.planning.hardware import Hardware, hardware_of_nodes
from plad_dist.progress import Progress
from plad_dist.reach import silent
from plad_dist.rundir import RunDir

logger = logging.getLogger("plad")


@contextmanager
def connected(config: Config, progress: Progress) -> Iterator[Callable[[Collection[str]], None]]:
    """Gives a function that connects to Ray, the first time that a stage needs it. Ends what it started.

    The function is told what the run is still to do, as :func:`refuse_unfit` is.
    """
    started = False

    def connect(holds: Collection[str]) -> None:
        nonlocal started
        if started:
            return
        started = True
        import ray

        from plad_dist.prometheus import run_metrics

        opened.callback(ray.shutdown)
        _connect(config)
        refuse_unfit(config, hardware_of_nodes([node["Resources"] for node in ray.nodes() if node["Alive"]]), holds)
        opened.enter_context(run_metrics(RunDir.of(config).storage.local_root, progress))

    with ExitStack() as opened:
        yield connect


def _connect(config: Config) -> None:
    # The workers' environment is ours: Ray must not build one of its own from a `uv run` that started the driver.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address and (problem := silent(address)) is not None:
        raise UserError(f"cluster.address: {address}: no Ray cluster answers there ({problem})")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=_local_cpus(config),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"cluster.address: {address}: no Ray cluster answers there ({error})") from None
    except RuntimeError as error:
        raise RunFailed(f"Ray did not start: {error}") from None
    resources = ray.cluster_resources()
    where = f"joined {address}" if address else "started a local Ray"
    logger.info(
        "ray: %s: %d node(s), %g CPUs, %g GPUs",
        where,
        len(ray.nodes()),
        resources.get("CPU", 0),
        resources.get("GPU", 0),
    )


def refuse_unfit(config: Config, hardware: Hardware | None, holds: Collection[str] | None = None) -> None:
    """Raise :class:`UserError` for a config that takes more memory than there is, before a device is held.

    What would fit a larger group of workers, and models that cannot be sized, are told of and left to the run.

    Args:
        hardware: None where nothing can be said.
        holds: of what the run is still to do; see :func:`plad_dist.planning.fit.check_fits`.
    """
    if hardware is None:
        return
    try:
        problems = check_fits(config, hardware, holds)
    except UserError as error:
        logger.info("not planned: %s", error)
        return
    refused = [problem for problem in problems if problem.always and config.cluster.unfit == "refuse"]
    for problem in problems:
        if problem not in refused:
            logger.warning("may not fit: %s", problem)
    if refused:
        text = "\n  ".join(["this config does not fit:", *map(str, refused)])
        raise UserError(f"{text}\n`plad plan` shows what takes what; cluster.unfit=warn tries it all the same")


def _local_cpus(config: Config) -> int:
    """Enough for the training workers beside the sampling actors of both roles: a small machine shares its cores."""
    training = config.training.workers[1] * config.training.cpus_per_worker
    roles = [*(teacher.sampling for teacher in config.all_teachers().values()), config.sampling.student]
    sampling = sum(role.cpus * (1 if role.replicas == "auto" else role.replicas) for role in roles if role)
    pairing = config.pairing.cpus_per_worker * config.pairing.workers
    return max(os.cpu_count() or 1, math.ceil(training + sampling), math.ceil(pairing))
