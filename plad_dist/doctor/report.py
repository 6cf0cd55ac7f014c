"""Findings of `plad doctor` as a table, as JSON, and as a last line."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table
from rich.text import Text

from plad_dist.doctor.findings import Finding
from plad_dist.doctor.node import HERE
from plad_dist.untrusted import cell

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def has_failed(findings: Sequence[Finding]) -> bool:
    """Return True if any check failed."""
    return any(finding.state == "fail" for finding in findings)


def findings_json(findings: Sequence[Finding]) -> str:
    """Return the findings as a JSON list, one object each."""
    return json.dumps([finding.to_json() for finding in findings])


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a table with one line for each finding, equal findings of several nodes merged."""
    table = Table("check", "node", "state", "what was found", "remedy")
    for finding in merge_nodes(findings):
        state = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(*map(cell, (finding.check, finding.node)), state, *map(cell, (finding.text, finding.remedy)))
    return table


def merge_nodes(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings ordered by check, with one finding for all nodes on which a check passed
    with one result."""
    checks = list(dict.fromkeys(finding.check for finding in findings))
    nodes: dict[Finding, list[str]] = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: checks.index(finding.check)):
        nodes[finding if finding.state != "ok" else replace(finding, node="")].append(finding.node)
    return [replace(finding, node=_join_nodes(names)) for finding, names in nodes.items()]


def _join_nodes(nodes: Sequence[str]) -> str:
    remote = [name for name in nodes if name != HERE]
    several = [f"{len(remote)} nodes"] if len(remote) > 1 else remote
    return ", ".join([HERE] * (HERE in nodes) + several)


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line of the report: the numbers of failures and warnings."""
    failed, warned = (sum(finding.state == state for finding in findings) for state in ("fail", "warn"))
    if not failed and not warned:
        return "All is well."
    failures = f"{failed} failed" if failed else "Nothing failed"
    return f"{failures}, {warned} warning{'s' * (warned != 1)}."
