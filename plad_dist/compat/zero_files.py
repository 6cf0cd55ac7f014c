"""Files of a native ZeRO-3 checkpoint of DeepSpeed, read without DeepSpeed.

Written for DeepSpeed 0.19.8. Relies on:

- `*zero_pp_rank_<rank>_mp_rank_00_optim_states.pt`: the rank's optimizer under
  `optimizer_state_dict`, with its flat float32 weights by sub-group under `fp32_flat_groups` and
  the state of the inner optimizer under `optimizer_state_dict`
  (`DeepSpeedZeroOptimizer_Stage3._rigid_state_dict`, `DeepSpeedEngine._save_zero_checkpoint`);
- `*zero_pp_rank_0_mp_rank_00_model_states.pt`: the shapes of the trained parameters by sub-group
  under `param_shapes` (`DeepSpeedEngine._get_zero_param_shapes`).

- `LossScaler` and `ZeroStageEnum` are the only classes in these files besides those of PyTorch that
  `weights_only` allows.

The names are checked against DeepSpeed in `compat/deepspeed.py`, and the files by tests of resizes
and snapshots.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from plad_dist.errors import RunFailed
from plad_dist.untrusted import harmless_line

FP32_FLAT_GROUPS, OPTIMIZER_STATES, PARAM_SHAPES = "fp32_flat_groups", "optimizer_state_dict", "param_shapes"


def load_optimizer_file(folder: Path, rank: int) -> dict[str, Any]:
    """Return the state of the ZeRO optimizer that a rank wrote, memory-mapped."""
    (file,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    state: dict[str, Any] = load_tensors(file, mmap=True)[OPTIMIZER_STATES]
    return state


def load_shapes(folder: Path) -> list[dict[str, torch.Size]]:
    """Return the shapes of the trained parameters by name, for each sub-group in order."""
    (file,) = folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")
    shapes: list[dict[str, torch.Size]] = load_tensors(file, mmap=True)[PARAM_SHAPES]
    return shapes


def load_tensors(file: str | Path, map_location: Any = "cpu", *, mmap: bool | None = None) -> Any:
    """Return the content of a file of a checkpoint: tensors, plain values, and the two classes of
    DeepSpeed that its optimizers put into it.

    A pickle can run any program while it is loaded, so a file with another class is refused.

    Raises:
        RunFailed: the file holds another class.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
            return torch.load(file, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? (\S+)", str(error))
        reason = harmless_line(named[1] if named else str(error), 120)
        raise RunFailed(
            f"{file}: is not loaded: it holds something that no checkpoint of this DeepSpeed has ({reason}). If you "
            "did not put it there, delete the checkpoint; training then resumes from the one before it"
        ) from None
