"""Decisions of network policies: which pod may connect to which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Peer:
    """A pod by its labels and its namespace; the run's namespace is `plad`."""

    labels: dict[str, str]
    namespace: str = "plad"


def may_connect(objects: Objects, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Return True if the policies of the run's namespace let a connection leave its source and
    enter its target."""
    may_leave = _allowed(objects, "egress", source, target, port, protocol)
    return may_leave and _allowed(objects, "ingress", target, source, port, protocol)


def _allowed(objects: Objects, direction: str, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
    """Return True if one direction is allowed.

    Pods without a policy, and those of other namespaces, allow all.
    """
    policies = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]
    selecting = [
        spec
        for spec in policies
        if pod.namespace == "plad"
        and direction.capitalize() in spec["policyTypes"]
        and _matches(spec["podSelector"], pod.labels)
    ]
    rules = [rule for spec in selecting for rule in spec.get(direction) or []]
    return not selecting or any(_allows(rule, direction, other, port, protocol) for rule in rules)


def _allows(rule: dict[str, Any], direction: str, other: Peer, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    if ports and not any(item["port"] == port and item["protocol"] == protocol for item in ports):
        return False
    peers = rule.get("from" if direction == "ingress" else "to")
    return peers is None or any(_selects(peer, other) for peer in peers)


def _selects(peer: dict[str, Any], pod: Peer) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace}):
            return False
    elif pod.namespace != "plad":
        return False
    return _matches(peer.get("podSelector", {}), pod.labels)


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    required = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in required.items()):
        return False
    expressions = selector.get("matchExpressions", [])
    assert all(item["operator"] == "In" for item in expressions)
    return all(labels.get(item["key"]) in item["values"] for item in expressions)
