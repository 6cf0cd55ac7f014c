"""Files of a checkpoint are loaded without running what a pickle says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plad_dist.compat.zero_files import load_optimizer_file, load_tensors
from plad_dist.errors import RunFailed


class _Program:
    """Object whose pickle runs a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/plad-pickle-was-run",)


def test_a_pickle_that_runs_a_program_is_refused_by_name(tmp_path: Path) -> None:
    from plad_dist.compat.deepspeed import TorchCheckpointEngine

    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"x": torch.zeros(2), "program": _Program()}}, file)
    for load in (
        lambda: load_tensors(file),
        lambda: load_optimizer_file(tmp_path, 0),
        lambda: TorchCheckpointEngine.load(None, str(file), map_location="cpu"),
    ):
        with pytest.raises(RunFailed, match=rf"{file.name}: is not loaded: .*system"):
            load()
    assert not Path("/tmp/plad-pickle-was-run").exists()


def test_the_classes_of_deepspeed_are_loaded(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    state = {"loss_scaler": LossScaler(scale=2.0), "zero_stage": ZeroStageEnum.weights, "shape": torch.Size([2, 3])}
    torch.save(state | {"flat": [torch.arange(3.0)]}, tmp_path / "state.pt")
    loaded = load_tensors(tmp_path / "state.pt", mmap=True)
    assert (loaded["loss_scaler"].loss_scale, loaded["zero_stage"], loaded["shape"]) == (2.0, 3, torch.Size([2, 3]))
    assert loaded["flat"][0].tolist() == [0.0, 1.0, 2.0]
