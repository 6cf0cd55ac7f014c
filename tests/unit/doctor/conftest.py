"""Fixtures of the doctor's tests: a machine without GPUs, the command, and a small run."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plad_dist.doctor import machine_checks
from tests.conftest import in_this_process
from tests.tiny import sampling_config
from tests.unit.doctor.findings import CPU_TORCH


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the machine has no GPUs, cluster or keys.

    Torch is not imported in a new process for every test.
    """
    monkeypatch.setattr(machine_checks, "torch_facts", lambda: CPU_TORCH)
    monkeypatch.setattr(machine_checks, "nvidia_cards", list)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PLAD_TEST_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `plad doctor` in this process, and return its exit code and what it printed."""

    def run_doctor(*arguments: str) -> tuple[int, str]:
        code, out, err = in_this_process(monkeypatch, capsys, "doctor", *arguments)
        return code, out if code in (0, 1) else err

    return run_doctor


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a folder with prompts and two random models, and a config that uses them."""
    return tmp_path, sampling_config(tmp_path, 20)


@pytest.fixture
def closed_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
