"""Who may connect to whom under a set of network policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Peer:
    """A pod with its labels, and the namespace that it is in; the run's own is `plad`."""

    labels: dict[str, str]
    namespace: str = "plad"


def may_connect(objects: Objects, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies of the run's namespace let a connection out of its source and into its target."""
    out = _allowed(objects, "egress", source, target, port, protocol)
    return out and _allowed(objects, "ingress", target, source, port, protocol)


def _allowed(objects: Objects, way: str, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
    """One way. Where no policy selects a pod everything is allowed, as it is for pods of other namespaces."""
    policies = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]
    chosen = [
        spec
        for spec in policies
        if pod.namespace == "plad"
        and way.capitalize() in spec["policyTypes"]
        and _matches(spec["podSelector"], pod.labels)
    ]
    rules = [rule for spec in chosen for rule in spec.get(way) or []]
    return not chosen or any(_allows(rule, way, other, port, protocol) for rule in rules)


def _allows(rule: dict[str, Any], way: str, other: Peer, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    if ports and not any(item["port"] == port and item["protocol"] == protocol for item in ports):
        return False
    peers = rule.get("from" if way == "ingress" else "to")
    return peers is None or any(_is(peer, other) for peer in peers)


def _is(peer: dict[str, Any], source: Peer) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": source.namespace}):
            return False
    elif source.namespace != "plad":
        return False
    return _matches(peer.get("podSelector", {}), source.labels)


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    expressions = selector.get("matchExpressions", [])
    assert all(item["operator"] == "In" for item in expressions)
    return all(labels.get(item["key"]) in item["values"] for item in expressions)
