"""Findings of several nodes are merged, and each keeps its check and its node."""

from __future__ import annotations

from dataclasses import replace

from plad_dist.doctor.findings import Finding, ok, run_check
from plad_dist.doctor.node import HERE
from plad_dist.doctor.report import merge_nodes


def test_equal_good_findings_share_a_line_and_every_fault_is_named() -> None:
    good = [Finding("disk", name, "ok", "much") for name in (HERE, "a", "b", "c")]
    bad = [Finding("disk", name, "fail", "none", "free some") for name in ("d", "e")]
    other = Finding("clock", "a", "ok", "equal")
    assert merge_nodes([*good, other, *bad]) == [replace(good[0], node="this machine, 3 nodes"), *bad, other]


def test_a_finding_that_names_its_node_keeps_it() -> None:
    findings = [Finding("clock", "node-3", "ok", "equal"), ok("2 nodes")]
    assert [(finding.check, finding.node) for finding in run_check("cluster", "auto", lambda: findings)] == [
        ("clock", "node-3"),
        ("cluster", "auto"),
    ]
