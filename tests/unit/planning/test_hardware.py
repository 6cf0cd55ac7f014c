"""GPUs are recognised by the names that drivers and Ray report, and clusters by their nodes."""

from __future__ import annotations

import pytest

from plad_dist.devices import gpu_of
from plad_dist.planning.hardware import hardware_of_nodes
from tests.unit.planning.configs import ray_resources


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"), ("NVIDIA H200", "h200-141g"), ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"), ("NVIDIA L40S", "l40s-48g"), ("NVIDIA L4", "l4-24g"),
        ("NVIDIA A10G", "a10g-24g"), ("A100-80G", "a100-80g"), ("A100", "a100-80g"), ("A100-40G", "a100-40g"),
        ("H20", "h20-96g"), ("NVIDIA L40", "l40-48g"),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_that_drivers_and_ray_report(reported: str, name: str) -> None:
    gpu = gpu_of(reported)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    "reported", ["NVIDIA GH200 480GB", "NVIDIA RTX A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU-V4"]
)
def test_an_unknown_gpu_is_not_mistaken_for_another(reported: str) -> None:
    assert gpu_of(reported) is None


def test_the_hardware_of_a_cluster_without_gpus_yet_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plad_dist.planning.hardware.engines_use_gpus", lambda: True)
    assert hardware_of_nodes(ray_resources()) is None
