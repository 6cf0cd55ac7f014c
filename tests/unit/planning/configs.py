"""Configs and clusters that the planner's tests share."""

from __future__ import annotations

from typing import Any

from plad_dist.config import Config
from plad_dist.config_file import load_config
from plad_dist.devices import GIB, GPUS
from plad_dist.planning.hardware import Hardware

H100 = GPUS["h100-80g"]
H100_NODES = Hardware(H100, None, 8, None)  # as many nodes of eight GPUs as needed


def qwen_72b_to_7b(**training: Any) -> Config:
    """Return the example config with changed training settings."""
    config = load_config("examples/qwen-72b-to-7b.yaml")
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def ray_resources(*gpu_kinds: str, gpus: float = 8.0) -> list[dict[str, float]]:
    """Return the resources of a head and of a node for each kind of GPU, as Ray reports them."""
    head = {"CPU": 8.0, "memory": 16.0 * GIB}
    node = {"CPU": 64.0, "memory": 500.0 * GIB, "GPU": gpus}
    return [head, *(node | {f"accelerator_type:{kind}": 1.0} for kind in gpu_kinds)]
