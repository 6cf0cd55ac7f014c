"""Internals of DeepSpeed.

Resizes and released memory are tested with real engines in tests/numerics.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plad_dist.compat import zero_files
from plad_dist.compat.zero_files import load_optimizer_file, load_shapes


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    from plad_dist.compat import deepspeed

    return deepspeed


class Engine:
    """Engine that records if it was destroyed."""

    is_destroyed = False

    def destroy(self) -> None:
        self.is_destroyed = True


def test_a_released_engine_leaves_nothing_in_the_globals(deepspeed: Any) -> None:
    engine = Engine()
    deepspeed.parameter_offload.FWD_MODULE_STACK.append(object())
    deepspeed.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = object()
    deepspeed.release_engine(engine)
    assert engine.is_destroyed
    assert deepspeed.parameter_offload.FWD_MODULE_STACK == []
    assert deepspeed.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None
    assert deepspeed._params_to_release_cache.cache_info().currsize == 0


class Optimizer:
    """ZeRO-3 optimizer with one parameter group, which is empty between steps."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.loaded: list[Any] = []
        self.params: list[int] = []
        self.optimizer = SimpleNamespace(state_dict=lambda: {"param_groups": [{"lr": 1.0, "params": self.params}]})

    def _set_fp32_optimizer_param_groups(self) -> None:
        self.params = [0, 1]

    def _clear_fp32_optimizer_param_groups(self) -> None:
        self.params = []

    def checkpoint_event_prologue(self) -> None:
        self.calls.append("prologue")

    def load_state_dict(self, states: list[Any]) -> None:
        self.calls.append("load")
        self.loaded = states

    def checkpoint_event_epilogue(self) -> None:
        self.calls.append("epilogue")


def test_a_rank_loads_its_own_state_with_the_parameters_of_the_engine(deepspeed: Any) -> None:
    optimizer = Optimizer()
    inner = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    state = {"loss_scaler": "scaler", zero_files.OPTIMIZER_STATES: inner}
    deepspeed.load_optimizer_state(SimpleNamespace(optimizer=optimizer), state, rank=1, world=3)
    assert optimizer.calls == ["prologue", "load", "epilogue"]
    expected = state | {
        zero_files.OPTIMIZER_STATES: inner | {"param_groups": [{"lr": 0.5, "params": [0, 1]}]},
    }
    assert optimizer.loaded == [None, expected, None]


def test_loaded_states_are_copied_into_the_tensors_that_an_optimizer_has(deepspeed: Any) -> None:
    """Otherwise a state on a CPU would keep the file that it maps."""
    weight = torch.nn.Parameter(torch.zeros(3))
    saved = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    saved.step()
    loaded = saved.state_dict()
    for has_states in (True, False):
        optimizer = torch.optim.AdamW([weight])
        if has_states:
            optimizer.step()
            optimizer.step()
        own = dict(optimizer.state[weight])
        with deepspeed._own_states_kept(optimizer):
            optimizer.load_state_dict(loaded)
        assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[weight].items():
            assert torch.equal(value, loaded["state"][0][key])
            assert value.data_ptr() != loaded["state"][0][key].data_ptr()
            assert key not in own or value is own[key]
        optimizer.load_state_dict(loaded)
        assert optimizer.state[weight]["exp_avg"].data_ptr() == loaded["state"][0]["exp_avg"].data_ptr()


def test_the_files_of_a_checkpoint_are_read_by_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        state = {zero_files.FP32_FLAT_GROUPS: [torch.full((2,), float(rank))]}
        torch.save(
            {zero_files.OPTIMIZER_STATES: state}, tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    shapes = [{"weight": torch.Size([2, 2])}]
    torch.save({zero_files.PARAM_SHAPES: shapes}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert load_optimizer_file(tmp_path, 1)[zero_files.FP32_FLAT_GROUPS][0].tolist() == [1.0, 1.0]
    assert load_shapes(tmp_path) == shapes
