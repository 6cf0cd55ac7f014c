"""Resuming from a checkpoint: the newest sound one is chosen on all ranks together, then loaded.

At an unchanged number of ranks, each rank reads its own files into memory, hashes them while it
reads them, and later loads them from there. So every byte is read once, and a damaged checkpoint is
found before the engine is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plad_dist.errors import UserError
from plad_dist.training.agreement import from_rank_zero
from plad_dist.training.checkpoints.attempts import Attempt
from plad_dist.training.checkpoints.memory_files import MemoryFiles
from plad_dist.training.checkpoints.reshard import load_resharded
from plad_dist.training.checkpoints.saving import STAGING_PREFIX
from plad_dist.training.checkpoints.scratch_dir import ScratchDir
from plad_dist.training.checkpoints.store import Checkpoint, CheckpointStore, DamagedCheckpoint, step_name


class CheckpointReader:
    """Chooses and loads the checkpoints of a phase; every rank of an attempt has one.

    Args:
        staging: folder on a local disk; None for the system's folder for temporary files.
        only_trained: frozen parameters are not in the checkpoints.
    """

    def __init__(
        self, store: CheckpointStore, attempt: Attempt, staging: str | None, *, only_trained: bool = False
    ) -> None:
        self._store, self._attempt, self._staging, self._only_trained = store, attempt, staging, only_trained
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._memory = MemoryFiles()

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest sound checkpoint, on all ranks, ready to be loaded.

        Args:
            report: called with a line for each damaged checkpoint that is skipped.

        Raises:
            UserError: the checkpoint belongs to another config, data or model.
        """
        damaged: dict[int, str] = {}  # problems by step
        while True:
            checkpoint, damaged = from_rank_zero(partial(self._store.newest, damaged))
            problem = self._read(checkpoint) if checkpoint is not None else None
            if checkpoint is None or problem is None:
                break
            damaged[checkpoint.state.step] = problem
        for step, damage in damaged.items():
            report(f"the checkpoint of step {step} is skipped, the one before it is used: {damage}")
            if self._rank == 0 and self._attempt.superseded() is None:  # so that its step can be committed again
                self._store.set_aside(step)
        return checkpoint

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step, on all ranks, ready to be loaded.

        Raises:
            UserError: the checkpoint belongs to another config, data or model.
            DamagedCheckpoint: the checkpoint is damaged or no longer exists.
        """
        checkpoint = from_rank_zero(lambda: self._store.at(step))
        problem = self._read(checkpoint) if checkpoint is not None else "it no longer exists"
        if checkpoint is None or problem is not None:
            raise DamagedCheckpoint(f"{self._store.folder}/{step_name(step)}: {problem}")
        return checkpoint

    def fills_model(self, checkpoint: Checkpoint | None) -> bool:
        """Return True if a checkpoint holds all parameters of the model."""
        return checkpoint is not None and checkpoint.state.stage == 3 and not self._only_trained

    def _read(self, checkpoint: Checkpoint) -> str | None:
        """Return the first file that has changed since the commit, on all ranks, or None.

        Each rank reads the files that it will load, or else compares its share with the checksums.
        """
        self._memory.close()
        if self._loads_own_files(checkpoint):
            problem = self._memory.read(self._store, checkpoint, checkpoint.of_rank(self._rank))
        else:
            problem = self._store.checksum_problem(checkpoint, sorted(checkpoint.files)[self._rank :: self._world])
        problems: list[str | None] = [None] * self._world
        dist.all_gather_object(problems, problem)
        return next(filter(None, problems), None)

    def _loads_own_files(self, checkpoint: Checkpoint) -> bool:
        """Return True if each rank loads the files that the same rank wrote."""
        return checkpoint.state.stage == 3 and checkpoint.state.workers == self._world

    def load(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Load the checkpoint that was returned last into the engine, on all ranks.

        Any number of ranks may have written it.

        Raises:
            UserError: the checkpoint was written with another precision or optimizer, or with
                another number of workers under a ZeRO stage that cannot change its size.
        """
        _check_loadable(engine, checkpoint, self._world)
        if checkpoint.state.workers != self._world:
            load_resharded(engine, lambda rank: self._files_of(checkpoint, rank), checkpoint.state.workers)
            return
        with self._files_of(checkpoint, self._rank) as folder:
            # Not at the top: importing DeepSpeed takes seconds.
            from plad_dist.compat.deepspeed import load_native

            is_in_memory = self._loads_own_files(checkpoint)
            client_state = load_native(engine, folder, strict=not self._only_trained, is_in_memory=is_in_memory)
        self._memory.close()
        torch.set_rng_state(client_state["random"]["cpu"])
        if "cuda" in client_state["random"]:
            torch.cuda.set_rng_state(client_state["random"]["cuda"])

    @contextmanager
    def _files_of(self, checkpoint: Checkpoint, rank: int) -> Iterator[Path]:
        """Yield a folder with the files of a checkpoint that a rank needs."""
        storage = self._store.storage
        is_in_memory = self._loads_own_files(checkpoint)
        if storage.local_root is not None and not is_in_memory:
            yield storage.local_root / checkpoint.folder
            return
        with ScratchDir(self._staging, STAGING_PREFIX) as folder:
            if is_in_memory:
                self._memory.link_into(folder)
            else:
                for name in checkpoint.of_rank(rank):
                    storage.download(f"{checkpoint.folder}/{name}", folder / name)
            yield folder


def optimizer_of(engine: Any) -> str:
    """Return the class name of the optimizer, which may be DeepSpeed's own for the CPU."""
    return type(engine.basic_optimizer).__name__


def precision_of(engine: Any) -> str:
    """Return the data type of the model, such as `bfloat16`."""
    return str(engine.get_data_types()[0]).removeprefix("torch.")


def _check_loadable(engine: Any, checkpoint: Checkpoint, world: int) -> None:
    """Raise :class:`UserError` if an engine cannot load a checkpoint."""
    state = checkpoint.state
    dtype = precision_of(engine)
    if state.dtype not in ("", dtype):
        raise UserError(
            f"{checkpoint.folder}: was trained in {state.dtype}, now it would be {dtype}: set "
            f"training.dtype={state.dtype} to resume"
        )
    saved, present = (state.stage, state.optimizer), (engine.zero_optimization_stage(), optimizer_of(engine))
    if saved != present and (state.optimizer or saved[0] != present[0]):
        raise UserError(
            f"{checkpoint.folder}: was written by ZeRO stage {saved[0]} with {saved[1]}; the present "
            f"training.deepspeed means stage {present[0]} with {present[1]}: set the former one to resume"
        )
    if state.workers != world and state.stage != 3:
        raise UserError(
            f"{checkpoint.folder}: was written by {state.workers} workers under ZeRO stage {state.stage}, now "
            f"there are {world}: set training.num_workers={state.workers} to resume; only stage 3 can change its size"
        )
