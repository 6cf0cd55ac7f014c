"""Native ZeRO-3 checkpoints, committed atomically: a step folder is complete, or it is not there.

``checkpoints/<phase>/step-00000120/`` holds DeepSpeed's files and ``state.json``; ``latest.json`` names the newest.
All ranks write into a temporary folder; the first rank renames it when all are done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from plad_dist.data.storage import sync, write_durably
from plad_dist.errors import RunFailed, UserError

LATEST, STATE = "latest.json", "state.json"
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")


@dataclass(frozen=True)
class TrainState:
    """Where training stands.

    Attributes:
        step: global steps done.
        groups: groups trained on.
        tokens: tokens computed.
        workers: world size that wrote the checkpoint.
        fingerprint: of the phase: its config, data and starting model.
        stage, optimizer: of ZeRO and where it steps, which decide what the files of a checkpoint hold.
        first: figures of the first step.
        evaluated: step of the latest evaluation; `best` is the best value, at `best_step`; `stale` evaluations have brought
            nothing better since.
    """

    step: int
    groups: int
    tokens: int
    workers: int
    fingerprint: str
    stage: int = 3
    optimizer: str = ""
    first: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1
    best: float | None = None
    best_step: int | None = None
    stale: int = 0


class Checkpoints:
    """The checkpoints of one phase, on a file system that all workers share.

    Args:
        only_trained: leave out parameters that are frozen, which are those of the start.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int, *, only_trained: bool = False) -> None:
        self._folder, self._fingerprint, self._keep, self._only_trained = folder, fingerprint, keep, only_trained

    def latest(self) -> TrainState | None:
        """State of the newest checkpoint, None where there is none.

        Raises:
            UserError: it belongs to another config, data or model.
        """
        path = self._folder / LATEST
        return self._read(path) if path.is_file() else None

    def at(self, step: int) -> TrainState:
        """State of the checkpoint of a step. Raises as :meth:`latest`."""
        return self._read(self._folder / step_name(step) / STATE)

    def _read(self, path: Path) -> TrainState:
        try:
            state = TrainState(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise RunFailed(f"{path}: damaged ({error}). Delete {self._folder} to train the phase again.") from None
        if state.fingerprint != self._fingerprint:
            raise UserError(
                f"{path}: a checkpoint of another config, data or model (fingerprint {state.fingerprint[:12]}, expected "
                f"{self._fingerprint[:12]}). Use another run.dir, or delete {self._folder}."
            )
        return state

    def save(self, engine: Any, state: TrainState) -> None:
        """Write a checkpoint from all ranks and commit it."""
        temporary, final = f".writing-{state.step:08d}", step_name(state.step)
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(self._folder / temporary, ignore_errors=True)
            (self._folder / temporary).mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(
            str(self._folder), tag=temporary, save_latest=False, exclude_frozen_parameters=self._only_trained
        )
        sync(*_written_by(dist.get_rank(), self._folder / temporary))
        dist.barrier()
        if first:
            text = json.dumps(asdict(state), indent=1)
            (self._folder / temporary / STATE).write_text(text)
            sync(self._folder / temporary / STATE, self._folder / temporary)
            shutil.rmtree(self._folder / final, ignore_errors=True)
            (self._folder / temporary).rename(self._folder / final)
            sync(self._folder)
            write_durably(self._folder / LATEST, text.encode(), os.replace)
            self._prune({final, step_name(state.best_step if state.best_step is not None else state.step)})
        dist.barrier()

    def load(self, engine: Any, state: TrainState) -> None:
        """Load a checkpoint into the engine, on all ranks."""
        if state.workers != dist.get_world_size():
            raise UserError(
                f"{self._folder / step_name(state.step)}: written by {state.workers} workers, now there are "
                f"{dist.get_world_size()}: set training.num_workers={state.workers} to go on (changing the number of "
                "workers in the middle of a phase is not supported yet)"
            )
        written, now = (state.stage, state.optimizer), (engine.zero_optimization_stage(), optimizer_of(engine))
        if written != now and (state.optimizer or written[0] != now[0]):
            raise UserError(
                f"{self._folder / step_name(state.step)}: written by ZeRO stage {written[0]} with {written[1]}, with "
                f"training.deepspeed as it is now it would be stage {now[0]} with {now[1]}: set the one that it was to go on"
            )
        engine.load_checkpoint(str(self._folder), tag=step_name(state.step), load_module_strict=not self._only_trained)

    def _prune(self, kept: set[str]) -> None:
        """Delete all but the newest checkpoints and those to be kept."""
        steps = sorted(path.name for path in self._folder.glob("step-*"))
        for name in steps[: -self._keep]:
            if name not in kept:
                shutil.rmtree(self._folder / name, ignore_errors=True)


def optimizer_of(engine: Any) -> str:
    """The optimizer that really steps: DeepSpeed has its own on the CPU."""
    return type(engine.basic_optimizer).__name__


def step_name(step: int) -> str:
    """Folder of a step's checkpoint."""
    return f"step-{step:08d}"


def _written_by(rank: int, folder: Path) -> list[Path]:
    """The files that a rank wrote: its own parts, and as the first what belongs to none."""
    files = [path for path in folder.iterdir() if path.is_file()]
    owners = [match and int(match[1]) for match in (_OF_RANK.search(path.name) for path in files)]
    return [path for path, owner in zip(files, owners, strict=True) if owner == rank or (owner is None and rank == 0)]
