"""Files of a native ZeRO-3 checkpoint of DeepSpeed, read without DeepSpeed.

Written for DeepSpeed 0.19.8. Relies on:

- `*zero_pp_rank_<rank>_mp_rank_00_optim_states.pt`: the rank's optimizer under
  `optimizer_state_dict`, with its flat float32 weights by sub-group under `fp32_flat_groups` and
  the state of the inner optimizer under `optimizer_state_dict`
  (`DeepSpeedZeroOptimizer_Stage3._rigid_state_dict`, `DeepSpeedEngine._save_zero_checkpoint`);
- `*zero_pp_rank_0_mp_rank_00_model_states.pt`: the shapes of the trained parameters by sub-group
  under `param_shapes` (`DeepSpeedEngine._get_zero_param_shapes`).

The names are checked against DeepSpeed in `compat/deepspeed.py`, and the files by tests of resizes
and snapshots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FP32_FLAT_GROUPS, OPTIMIZER_STATES, PARAM_SHAPES = "fp32_flat_groups", "optimizer_state_dict", "param_shapes"


def load_optimizer_file(folder: Path, rank: int) -> dict[str, Any]:
    """Return the state of the ZeRO optimizer that a rank wrote, memory-mapped."""
    (file,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    # weights_only=False as in DeepSpeed: the files belong to this run and match its checksums.
    state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)[OPTIMIZER_STATES]
    return state


def load_shapes(folder: Path) -> list[dict[str, torch.Size]]:
    """Return the shapes of the trained parameters by name, for each sub-group in order."""
    (file,) = folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")
    shapes: list[dict[str, torch.Size]] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)[
        PARAM_SHAPES
    ]
    return shapes
