"""Checks of a cluster: a Ray task on every node runs checks; versions and clocks are compared."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from plad_dist.config import Config
from plad_dist.doctor.checks import examine_node
from plad_dist.doctor.config_checks import check_fit
from plad_dist.doctor.findings import Finding, fail, ok, run_check
from plad_dist.doctor.node import HERE, Node
from plad_dist.errors import first_line
from plad_dist.planning.hardware import hardware_of_nodes
from plad_dist.reach import ray_problem

logger = logging.getLogger("plad")

NODE_TIMEOUT_S, CLOCK_TIMEOUT_S = 180.0, 20.0
_CLOCK_WARN_S, _CLOCK_FAIL_S = 1.0, 30.0
_CLOCK_READINGS = 3
_START_REMEDY = "start the cluster, or correct --address, cluster.address or RAY_ADDRESS"


class ClockReading(NamedTuple):
    """Times in seconds: when the driver asked, the node's clock, and when its answer arrived."""

    sent: float
    remote: float
    received: float


def check_cluster(
    address: str, requirements: Node, versions: Mapping[str, str], config: Config | None
) -> Iterator[Finding]:
    """Join a cluster, run the checks of every living node, and compare the nodes.

    Args:
        requirements: what the run requires of any node.
        versions: installed versions of this machine.
        config: checked against the cluster's memory; None for no config.
    """
    if address.startswith(("http://", "https://")):
        host = urlsplit(address).hostname or "host"
        yield fail(
            "is the URL of a dashboard, which only accepts jobs",
            f"give the address of Ray itself, {host}:6379 by default; for a cluster on Kubernetes, run the doctor in "
            "one of its pods",
        )
        return
    if (problem := ray_problem(address)) is not None:
        yield fail(f"no Ray cluster answers there: {problem}", _START_REMEDY)
        return
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # noqa: BLE001 - other versions, a wrong token, ...: the error is the finding
        yield fail(
            f"cannot be joined: {first_line(error):.300}",
            f"{_START_REMEDY}; Ray and Python must have the versions of the nodes",
        )
        return
    try:
        living = [node for node in ray.nodes() if node["Alive"]]
        logger.info("doctor: checking %d node(s) of %s", len(living), address)
        resources = ray.cluster_resources()
        yield ok(f"{len(living)} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")
        yield from _examine_members(members_by_id(living, requirements), versions)
        hardware = hardware_of_nodes([node["Resources"] for node in living])
        if config is not None and hardware is not None:
            yield from run_check("plan", "", partial(check_fit, config, hardware))
    finally:
        ray.shutdown()


def members_by_id(living: Sequence[Mapping[str, Any]], requirements: Node) -> dict[str, Node]:
    """Return the nodes of a cluster by Ray's id, each under a unique name: host name, address, or
    address and id.

    Args:
        living: nodes, as `ray.nodes()` returns them.
    """
    names = [name for node in living for name in {node["NodeManagerHostname"], node["NodeManagerAddress"]}]
    members = {}
    for node in living:
        address = node["NodeManagerAddress"]
        unique = [name for name in (node["NodeManagerHostname"], address) if names.count(name) == 1]
        folders = Path(node.get("ObjectStoreSocketName") or "/").parents  # .../ray/session_.../sockets/plasma_store
        members[node["NodeID"]] = replace(
            requirements,
            name=unique[0] if unique else f"{address} ({node['NodeID'][:6]})",
            role="member",
            gpus=node["Resources"].get("GPU", 0),
            object_store=node["Resources"].get("object_store_memory"),
            ray_folder=str(folders[2]) if len(folders) > 2 else requirements.ray_folder,
        )
    return members


def _examine_members(members: Mapping[str, Node], versions: Mapping[str, str]) -> Iterator[Finding]:
    """Run the checks of every node, then compare versions and clocks of the nodes that answer."""
    versions_by_node: dict[str, Mapping[str, str]] = {}
    answering: dict[str, Node] = {}
    for node_id, outcome in _call_on_nodes(
        examine_node, {key: (node,) for key, node in members.items()}, NODE_TIMEOUT_S
    ):
        member = members[node_id]
        if isinstance(outcome, tuple):
            findings, versions_by_node[member.name] = outcome
            answering[node_id] = member
            yield from findings
        else:
            yield unanswered(member.name, outcome)
    yield from compare_versions(versions, versions_by_node)
    readings: dict[str, list[ClockReading]] = defaultdict(list)
    for _ in range(_CLOCK_READINGS):  # the first call starts a process on the node, later ones answer at once
        sent = time.time()
        for node_id, remote in _call_on_nodes(read_clock, dict.fromkeys(answering, ()), CLOCK_TIMEOUT_S):
            if isinstance(remote, float):
                readings[answering[node_id].name].append(ClockReading(sent, remote, time.time()))
    for member in answering.values():
        yield check_clock(member.name, readings[member.name])


def _call_on_nodes(
    function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]], timeout_s: float
) -> Iterator[tuple[str, Any]]:
    """Call a function on several nodes at once, as one Ray task on each.

    Args:
        arguments: arguments of the call by node id.

    Yields:
        A node's id with the result, the exception that was raised, or None for no answer within the
        timeout.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    pending = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(*values): node_id
        for node_id, values in arguments.items()
    }
    deadline = time.monotonic() + timeout_s
    while pending:
        ready, _ = ray.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        try:
            outcome = ray.get(ready[0])
        except Exception as error:  # noqa: BLE001 - the fault of one node is a finding, not the end
            outcome = error
        yield pending.pop(ready[0]), outcome
    for reference, node_id in pending.items():
        ray.cancel(reference, force=True)
        yield node_id, None


def read_clock() -> float:
    """Return the time on a node."""
    return time.time()


def unanswered(name: str, error: Exception | None) -> Finding:
    """Return the failure of a node whose checks raised, or that did not answer (None)."""
    if error is None:
        return Finding(
            "cluster", name, "fail", f"no answer within {NODE_TIMEOUT_S:.0f} s",
            f"check that {name} is alive (`ray list nodes`) and see Ray's logs there, or remove it from the cluster",
        )  # fmt: skip
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1] if hasattr(error, "cause") else lines[0]  # Ray puts the node's traceback before the reason
    return Finding(
        "cluster", name, "fail", f"could not be checked: {reason:.300}",
        "install the same version of plad-dist there as here; see Ray's logs there",
    )  # fmt: skip


def compare_versions(
    versions: Mapping[str, str], versions_by_node: Mapping[str, Mapping[str, str]]
) -> Iterator[Finding]:
    """Compare the versions on every node with those of this machine."""
    for name, installed in versions_by_node.items():
        differences = [
            f"{package} {installed.get(package, 'is missing')} ({versions.get(package, 'missing')} here)"
            for package in sorted(versions.keys() | installed.keys())
            if installed.get(package) != versions.get(package)
        ]
        if differences:
            remedy = "use one image, or one lock file, on all nodes"
            yield Finding("same versions", name, "fail", ", ".join(differences), remedy)
        else:
            yield Finding("same versions", name, "ok", f"as on {HERE}")


def check_clock(name: str, readings: Sequence[ClockReading]) -> Finding:
    """Compare a node's clock with this machine's, by the reading with the shortest round trip."""
    if not readings:
        text = f"no answer within {CLOCK_TIMEOUT_S:.0f} s"
        return Finding("clock", name, "fail", text, f"see Ray's logs on {name}")
    reading = min(readings, key=lambda reading: reading.received - reading.sent)
    skew = reading.remote - (reading.sent + reading.received) / 2
    error = (reading.received - reading.sent) / 2
    least_skew = max(0.0, abs(skew) - error)
    if least_skew > _CLOCK_WARN_S:
        text = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} {HERE} (to {error:.1f} s)"
        remedy = f"synchronise the clock of {name} by NTP (chrony, systemd-timesyncd)"
        return Finding("clock", name, "fail" if least_skew > _CLOCK_FAIL_S else "warn", text, remedy)
    return Finding("clock", name, "ok", f"as on {HERE}, to {max(_CLOCK_WARN_S, error):.0f} s")
