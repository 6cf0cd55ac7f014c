"""List of the checks that `plad doctor` runs on a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from plad_dist.doctor import machine_checks, reach_checks, software_checks
from plad_dist.doctor.findings import Finding, run_check
from plad_dist.doctor.node import Node

NODE_CHECKS: dict[str, Callable[[Node], Iterable[Finding]]] = {
    "versions": software_checks.check_versions,
    "engine": software_checks.check_vllm_build,
    "GPUs": machine_checks.check_gpus,
    "network": machine_checks.check_network,
    "shared memory": machine_checks.check_shared_memory,
    "memory, CPUs": machine_checks.check_limits,
    "open files": machine_checks.check_open_files,
    "disk": machine_checks.check_disk,
    "storage": reach_checks.check_storage,
    "endpoints": reach_checks.check_endpoints,
    "environment": reach_checks.check_environment,
}
DRIVER_CHECKS = ("versions", "disk", "storage", "environment")  # no engine or trainer runs on a driver


def examine_node(node: Node) -> tuple[list[Finding], dict[str, str]]:
    """Run the checks of the machine that calls this.

    Returns:
        The findings, and the versions that must be equal on all nodes.
    """
    names = DRIVER_CHECKS if node.role == "driver" else tuple(NODE_CHECKS)
    findings = [finding for name in names for finding in run_check(name, node.name, partial(NODE_CHECKS[name], node))]
    return findings, software_checks.installed_versions()
