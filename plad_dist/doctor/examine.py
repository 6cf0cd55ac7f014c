"""Entry point of `plad doctor`: checks this machine, every node of a cluster, and a config.

:mod:`plad_dist.doctor.checks` lists the checks of a machine. They run here, and by
:mod:`plad_dist.doctor.cluster` on every node. :mod:`plad_dist.doctor.config_checks` checks the
config. Everything that the doctor writes is in one probe folder in each storage location, and is
removed at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from plad_dist.config import Config
from plad_dist.doctor.checks import examine_node
from plad_dist.doctor.cluster import check_cluster
from plad_dist.doctor.config_checks import check_config, check_fit
from plad_dist.doctor.findings import Finding, run_check
from plad_dist.doctor.node import HERE, PROBE, StorageSite, local_node
from plad_dist.errors import RunFailed, UserError

_NO_CLUSTER = "--address, cluster.address and RAY_ADDRESS name no cluster: this machine alone was checked"


def examine(config: Config | None, address: str | None = None) -> list[Finding]:
    """Run all checks and return the findings. Starts no Ray; joins a cluster if one is named.

    Args:
        config: None to check machines alone.
        address: of the cluster; None for the config's, or else RAY_ADDRESS.

    Raises:
        UserError: run.dir or training.checkpoint_url is no valid location.
    """
    address = address or (config.cluster.address if config else None) or os.environ.get("RAY_ADDRESS")
    here = replace(local_node(config), role="driver" if address and address != "local" else "alone")
    with probes(here.sites) as writable:
        findings, versions = examine_node(here)
        if address and here.role == "driver":
            requirements = replace(here, sites=writable)
            check = partial(check_cluster, address, requirements, versions, config)
            findings += run_check("cluster", address, check)
        else:
            findings.append(Finding("cluster", HERE, "ok", _NO_CLUSTER))
            if config is not None:
                findings += run_check("plan", HERE, partial(check_fit, config))
    return findings + (check_config(config) if config else [])


@contextmanager
def probes(sites: Sequence[StorageSite]) -> Iterator[tuple[StorageSite, ...]]:
    """Write a probe file into every site and yield the sites that accept it, as a context manager.

    A site that fails is left out without a message, because the storage check reports the reason.
    The probe files, and the folders that were created for them, are removed at the end.
    """
    created: list[Path] = []
    writable = []
    try:
        for site in sites:
            with contextlib.suppress(RunFailed, UserError, OSError):  # the storage check reports the reason
                root = site.probe_storage.local_root
                created += [path for path in root.parents if not path.exists()] if root else []
                site.probe_storage.replace(PROBE, b"")
                writable.append(site)
        yield tuple(writable)
    finally:
        for site in sites:
            with contextlib.suppress(RunFailed, UserError):
                site.storage.delete_folder(site.probe)
        for folder in sorted(created, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
