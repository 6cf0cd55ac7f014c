"""Ray: join the cluster that is named, or start a local one for as long as the command runs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from plad_dist.config import Config
from plad_dist.errors import RunFailed, UserError

logger = logging.getLogger("plad")


@contextmanager
def connected(config: Config) -> Iterator[Callable[[], None]]:
    """Gives a function that connects to Ray, the first time that a stage needs it. Ends what it started."""
    started = False

    def connect() -> None:
        nonlocal started
        if not started:
            _connect(config)
            started = True

    try:
        yield connect
    finally:
        if started:
            import ray

            ray.shutdown()


def _connect(config: Config) -> None:
    # The workers' environment is ours: Ray must not build one of its own from a `uv run` that started the driver.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
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


def _local_cpus(config: Config) -> int:
    """Enough for the training workers beside the sampling actors of both roles: a small machine shares its cores."""
    training = config.training.workers[1] * config.training.cpus_per_worker
    roles = [*(teacher.sampling for teacher in config.all_teachers().values()), config.sampling.student]
    sampling = sum(role.cpus * (1 if role.replicas == "auto" else role.replicas) for role in roles if role)
    pairing = config.pairing.cpus_per_worker * config.pairing.workers
    return max(os.cpu_count() or 1, math.ceil(training + sampling), math.ceil(pairing))
