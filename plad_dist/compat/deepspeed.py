"""Internals of DeepSpeed: caches that outlive an engine, and partitions of its ZeRO-3 optimizer.

Written for DeepSpeed 0.19.8. Relies on:

- `runtime.zero.parameter_offload.FWD_MODULE_STACK`, a global list of modules;
- `PartitionedParameterCoordinator.__params_to_release`, cached by `functools.lru_cache` under a
  wrapper, with the coordinators of all engines in the keys of the cache;
- `utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP`, which `_create_zero_param_parallel_group` asserts
  to be None;
- `DeepSpeedZeroOptimizer_Stage3`: `fp16_groups` (parameters by sub-group),
  `fp32_partitioned_groups_flat` (flat float32 weights by sub-group), `_set_` and
  `_clear_fp32_optimizer_param_groups`, `checkpoint_event_prologue` and `_epilogue`,
  `load_state_dict` (a list with one state per rank, of which it reads its own);
- `TorchCheckpointEngine.load`, by which `DeepSpeedEngine.load_checkpoint` reads all files;
- `build_shm_op` of `comm/torch.py`, which compiles collectives for inference on CPUs. It is
  replaced, because training does not use them and a compiler takes a minute for them;
- `zero.Init._zero_init_param`, which converts, broadcasts and partitions a new parameter;
- attributes of a partitioned parameter: `ds_tensor` with this rank's elements and padding, of
  length `ds_numel`; `ds_shape`, `ds_numel`, `ds_zero_partition_rank`, `ds_status`;
  `ds_secondary_tensor`, which the optimizer drops too after it has changed `ds_tensor`;
- `DeepSpeedEngine.checkpoint_engine`, which reads the files of a checkpoint, and
  `DeepSpeedZeroOptimizer_Stage3.optimizer`, the inner optimizer of PyTorch's interface;
- `DeepSpeedEngine.param_names` (names by parameter), and `ds_numel` of a partitioned parameter.

Importing this module imports DeepSpeed, which takes seconds: import it where an engine is built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint import constants
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups

from plad_dist.compat.assumptions import Assumptions
from plad_dist.compat.zero_files import FP32_FLAT_GROUPS, OPTIMIZER_STATES, PARAM_SHAPES, load_tensors

_assumptions = Assumptions("deepspeed", "0.19.8")
_comm = importlib.import_module("deepspeed.comm.torch")  # the package has torch itself under this name
_assumptions.attribute(parameter_offload, "FWD_MODULE_STACK")
_params_to_release = _assumptions.attribute(
    PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release"
)
_params_to_release_cache: Any = inspect.getclosurevars(_params_to_release).nonlocals.get("func")
_assumptions.attribute(_params_to_release_cache, "cache_clear")
_assumptions.attribute(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
for _name in ("_set_fp32_optimizer_param_groups", "_clear_fp32_optimizer_param_groups"):
    _assumptions.parameters(_assumptions.attribute(DeepSpeedZeroOptimizer_Stage3, _name), "self")
for _name in ("checkpoint_event_prologue", "checkpoint_event_epilogue"):
    _assumptions.parameters(_assumptions.attribute(DeepSpeedZeroOptimizer_Stage3, _name), "self")
for _name, _expected in (
    ("FP32_FLAT_GROUPS", FP32_FLAT_GROUPS),
    ("OPTIMIZER_STATE_DICT", OPTIMIZER_STATES),
    ("PARAM_SHAPES", PARAM_SHAPES),
):
    _assumptions.value(_assumptions.attribute(constants, _name), _expected, _name)
_assumptions.parameters(_assumptions.attribute(TorchCheckpointEngine, "load"), "self", "path", "map_location")
_assumptions.parameters(_assumptions.attribute(_comm, "build_shm_op"))
_zero_init_param = _assumptions.attribute(Init, "_zero_init_param")
for _name in ("_zero_init_param", "_convert_to_deepspeed_param"):
    _assumptions.parameters(_assumptions.attribute(Init, _name), "self", "param")


def _load(engine: TorchCheckpointEngine, path: str, map_location: Any = None) -> Any:
    """Load a file of a checkpoint as :func:`load_tensors` does; DeepSpeed would run its pickle."""
    return load_tensors(path, map_location)


TorchCheckpointEngine.load = _load
_comm.build_shm_op = lambda: None  # type: ignore[attr-defined]


def release_engine(engine: Any) -> None:
    """Destroy an engine, and clear the globals by which DeepSpeed still holds its model.

    The memory is free when the caller drops its own references.
    """
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    _params_to_release_cache.cache_clear()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # the next engine creates its own


def load_native(engine: Any, folder: Path, *, strict: bool, is_in_memory: bool = False) -> dict[str, Any]:
    """Load a checkpoint of as many ranks into an engine, and return what was saved beside it.

    Args:
        strict: every parameter must be in the checkpoint.
        is_in_memory: the files are in memory, so they are mapped instead of copied once more.
    """
    engine.checkpoint_engine.load = partial(load_tensors, mmap=is_in_memory)
    with _own_states_kept(engine.optimizer.optimizer) if is_in_memory else nullcontext():
        _, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=strict)
    return dict(client_state)


@contextmanager
def _own_states_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Copy the states that an optimizer loads into the tensors that it has.

    On a CPU, PyTorch would keep the loaded tensors, and with them the whole file that they map.
    """
    own: dict[Any, dict[str, Any]] = {}

    def remember(optimizer: torch.optim.Optimizer, _: Any) -> None:
        own.update((parameter, dict(state)) for parameter, state in optimizer.state.items())

    def copy(optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for key, loaded in state.items():
                if not isinstance(loaded, torch.Tensor) or loaded.device.type != "cpu":
                    continue
                kept = own.get(parameter, {}).get(key)
                if isinstance(kept, torch.Tensor) and (kept.shape, kept.dtype) == (loaded.shape, loaded.dtype):
                    state[key] = kept.copy_(loaded)
                else:
                    state[key] = loaded.clone()

    hooks = optimizer.register_load_state_dict_pre_hook(remember), optimizer.register_load_state_dict_post_hook(copy)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def parameters_not_broadcast() -> Iterator[None]:
    """Let `zero.Init` partition new parameters without a broadcast of their values from rank 0.

    Weights that are loaded afterwards replace the values. Any others are the same on all ranks,
    which construct the same model from the same seed.
    """

    def partition(init: Init, parameter: torch.nn.Parameter) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    Init._zero_init_param = partition
    try:
        yield
    finally:
        Init._zero_init_param = _zero_init_param


class OwnPartition(NamedTuple):
    """This rank's part of a parameter that ZeRO-3 has flattened and divided.

    Attributes:
        shape: shape of the whole parameter.
        start: first of this rank's elements.
        elements: the elements, without padding; a view.
    """

    shape: torch.Size
    start: int
    elements: torch.Tensor


def own_partition(parameter: torch.nn.Parameter) -> OwnPartition | None:
    """Return this rank's part of a parameter; None if ZeRO-3 does not divide it plainly.

    A copy of the part for a second partition (hpZ) is dropped, since the caller will write.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None or parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE or part.dtype != parameter.dtype:
        return None
    start = parameter.ds_zero_partition_rank * part.ds_numel
    parameter.ds_secondary_tensor = None
    return OwnPartition(parameter.ds_shape, start, part[: max(0, parameter.ds_numel - start)])


def sub_groups_of(engine: Any) -> list[dict[str, int]]:
    """Return the sizes of the trained parameters by name, for each sub-group in order."""
    return [
        {engine.param_names[parameter]: int(parameter.ds_numel) for parameter in parameters}
        for parameters in engine.optimizer.fp16_groups
    ]


def flat_lengths_of(engine: Any) -> list[int]:
    """Return the length of this rank's flat float32 weights, for each sub-group in order."""
    return [flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat]


def load_optimizer_state(engine: Any, state: dict[str, Any], rank: int, world: int) -> None:
    """Load this rank's state into the ZeRO-3 optimizer of an engine, on all ranks.

    Args:
        state: state in the form of an optimizer file (`compat/zero_files.py`). The parameters in
            the `param_groups` of its inner optimizer are replaced by the engine's.
    """
    optimizer = engine.optimizer
    optimizer._set_fp32_optimizer_param_groups()
    present_groups = optimizer.optimizer.state_dict()["param_groups"]
    optimizer._clear_fp32_optimizer_param_groups()
    inner = state[OPTIMIZER_STATES]
    param_groups = [
        {**saved, "params": present["params"]}
        for saved, present in zip(inner["param_groups"], present_groups, strict=True)
    ]
    state = {**state, OPTIMIZER_STATES: {**inner, "param_groups": param_groups}}
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([state if index == rank else None for index in range(world)])
    optimizer.checkpoint_event_epilogue()
