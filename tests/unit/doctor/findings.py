"""Helpers that read findings, and machines for the doctor's tests."""

from __future__ import annotations

import importlib.metadata
import json
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import pytest

from plad_dist.doctor.findings import Finding
from plad_dist.doctor.node import StorageSite

KEY = "key-9f8e7d6c5b4a39281706"  # a secret that no finding may show
CPU_TORCH = {"cuda": None, "devices": 0, "nccl": None}
DiskUsage = namedtuple("DiskUsage", "total used free")


def states(findings: Iterable[Finding]) -> list[str]:
    return [finding.state for finding in findings]


def only(findings: Iterable[Finding], state: str) -> Finding:
    """Return the one finding with a state. It must have a remedy if the state is not ok."""
    matching = [finding for finding in findings if finding.state == state]
    assert len(matching) == 1, matching
    assert matching[0].remedy or state == "ok"
    return matching[0]


def failures(printed: str) -> list[dict[str, str]]:
    """Return the failures in the JSON that `plad doctor --json` prints."""
    return [finding for finding in json.loads(printed) if finding["state"] == "fail"]


def site_at(folder: Path) -> StorageSite:
    return StorageSite("run.dir", str(folder), ".doctor-test")


def contents(folder: Path) -> dict[str, int]:
    """Return all paths in a folder with their times of modification."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def pretend_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that packages have other versions, or are not installed (None)."""
    real_version = importlib.metadata.version

    def version(name: str) -> str:
        pretended = versions.get(name.replace("-", "_"), "")
        if pretended is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return pretended or real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
