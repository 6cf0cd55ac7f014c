"""How checkpoints are written and read by the ranks of an attempt: staged on the node, carried and committed in the background.

Training waits only while every rank writes its part to a disk of its own node; a thread carries it to the storage, which may be an
object store. ``latest.json`` says for people which one is the newest; the truth is what is there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plad_dist.data.storage import file_checksum
from plad_dist.errors import RunFailed, UserError
from plad_dist.training.agreement import from_rank_zero
from plad_dist.training.checkpoints.attempts import Attempt
from plad_dist.training.checkpoints.reshard import load_resharded
from plad_dist.training.checkpoints.scratch_dir import ScratchDir
from plad_dist.training.checkpoints.store import Checkpoint, CheckpointStore, DamagedCheckpoint, TrainState, step_name
from plad_dist.training.records.collapse import CollapseRecord

_LATEST = "latest.json"
_STAGED = "plad-checkpoint-"
_POLL_S = 0.2
_COMMIT_TIMEOUT_S = 1800.0


class Checkpoints:
    """Saves and loads the checkpoints of a phase, on every rank of an attempt.

    Args:
        staging: folder on a disk of this node.
        watched: gives what watching has found of them; None where nothing is watched.
        only_trained: leave out parameters that are frozen, which are those of the start.
    """

    def __init__(
        self,
        store: CheckpointStore,
        attempt: Attempt,
        keep: int,
        staging: str | None,
        *,
        only_trained: bool = False,
        watched: Callable[[], CollapseRecord | None] = lambda: None,
    ) -> None:
        self._watched = watched
        self._store, self._attempt, self._keep, self._only_trained = store, attempt, keep, only_trained
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._own = ScratchDir(staging, _STAGED)
        self._staging = self._own.path
        self._carrier = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._saved: int | None = None  # step of the latest one
        self._damaged: dict[int, str] = {}
        self.superseded: str | None = None
        self.collapsed = False  # by what watching has found
        self.seconds = 0.0  # that the latest one has cost training
        self.commit_seconds = 0.0  # that the latest one took until it was committed

    def close(self) -> None:
        """Forget what is not committed."""
        self._carrier.shutdown(wait=False, cancel_futures=True)
        self._own.remove()

    # -- writing

    def save(self, engine: Any, state: TrainState) -> None:
        """Write a checkpoint from all ranks, unless this step has one; it is committed while training goes on.

        Raises:
            RunFailed: the one before could not be committed.
        """
        if state.step == self._saved:
            return
        started = time.monotonic()
        self._wait()
        folder = self._staging / step_name(state.step)
        engine.save_checkpoint(
            str(folder),
            tag=self._attempt.name,
            save_latest=False,
            exclude_frozen_parameters=self._only_trained,
            client_state={"random": _random_state()},
        )
        self._pending = self._carrier.submit(self._carry, folder, state, started)
        self._saved = state.step
        self.seconds = time.monotonic() - started

    @property
    def busy(self) -> bool:
        """Whether one is still on its way from this rank."""
        return self._pending is not None and not self._pending.done()

    @property
    def failure(self) -> str | None:
        """Why this rank could not carry the latest one, None where nothing is wrong."""
        pending = self._pending
        error = pending.exception() if pending is not None and pending.done() else None
        return None if error is None else str(error)

    def settle(self) -> None:
        """Wait on all ranks until what was saved is committed. Raises as :meth:`save`."""
        self._wait()
        self.superseded = from_rank_zero(self._attempt.superseded)

    def _wait(self) -> None:
        """Until what was saved is committed, by whichever rank. Not by a collective: those give up sooner than a slow storage does."""
        if self._pending is None:
            return
        self._pending.result()
        self._pending = None
        if self._rank and self._saved is not None:
            key, until = self._store.key(self._saved), time.monotonic() + _COMMIT_TIMEOUT_S
            while not self._store.storage.exists(key) and self._attempt.superseded() is None:
                if time.monotonic() > until:
                    raise RunFailed(f"{self._store.storage.url}/{key} did not come: the first worker does not answer")
                time.sleep(_POLL_S)

    def drain(self) -> None:
        """Wait for what was saved, where training ends on all ranks anyway."""
        with contextlib.suppress(RunFailed, OSError):
            self._wait()

    def _carry(self, local: Path, state: TrainState, started: float) -> None:
        """Carry this rank's files to the storage; the first rank waits for all and commits."""
        storage, folder = self._store.storage, f"{self._store.folder}/{step_name(state.step)}/{self._attempt.name}"
        files: dict[str, tuple[int, str]] = {}
        for file in sorted((local / self._attempt.name).iterdir()):
            files[file.name] = (file.stat().st_size, file_checksum(file))
            storage.upload(f"{folder}/{file.name}", file)
        shutil.rmtree(local, ignore_errors=True)
        storage.replace(f"{folder}/{_rank_file(self._rank)}", json.dumps(files).encode())
        if self._rank == 0:
            self._commit(folder, state)
            self.commit_seconds = time.monotonic() - started

    def _commit(self, folder: str, state: TrainState) -> None:
        storage = self._store.storage
        files = self._files_of_all(folder)
        self.superseded = self._attempt.superseded()
        if self.superseded is not None:
            return
        document = {"state": asdict(state), "attempt": self._attempt.name, "files": files}
        text = json.dumps(document, indent=1).encode()
        created = storage.create(self._store.key(state.step), text)
        self.superseded = self._attempt.superseded()
        if self.superseded is not None:  # it may have been for long: what is there now is not this attempt's to prune
            return
        if created:
            storage.replace(f"{self._store.folder}/{_LATEST}", json.dumps(asdict(state), indent=1).encode())
        self._prune()

    def _files_of_all(self, folder: str) -> dict[str, Any]:
        """The files of all ranks, when they are there."""
        storage, until = self._store.storage, time.monotonic() + _COMMIT_TIMEOUT_S
        wanted = {_rank_file(rank) for rank in range(self._world)}
        while missing := wanted - storage.sizes(folder).keys():
            if time.monotonic() > until:
                raise RunFailed(f"{storage.url}/{folder}: {min(missing)} did not come: its worker does not answer")
            time.sleep(_POLL_S)
        return {name: fact for rank in sorted(wanted) for name, fact in storage.read_json(f"{folder}/{rank}").items()}

    def _prune(self) -> None:
        """Delete all but the newest checkpoints, the best ones that these know of, and those that watching needs."""
        try:
            watched = self._watched()
        except RunFailed:  # what must be kept is not known now; the next checkpoint prunes
            return
        self.collapsed = watched is not None and watched.collapse is not None
        newest: list[TrainState] = []
        for step in self._store.steps():
            with contextlib.suppress(DamagedCheckpoint):  # nothing to keep, and nothing to stop for
                if len(newest) < self._keep and (found := self._store.at(step)) is not None:
                    newest.append(found.state)
        kept = {step for state in newest for step in (state.step, state.best_step)}
        kept |= watched.needed if watched is not None else set()
        for step in self._store.steps():
            if newest and step not in kept and step < newest[0].step:
                self._store.storage.delete(self._store.key(step))  # first: what is left by a crash is not committed
                self._store.storage.delete_folder(f"{self._store.folder}/{step_name(step)}")

    # -- reading

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint, on all ranks, each of which checks its share of the files.

        Args:
            say: told of those that are damaged and left out.

        Raises:
            UserError: it belongs to another config, data or model.
        """
        while True:
            found, self._damaged = from_rank_zero(partial(self._store.newest, self._damaged))
            problem = self._altered(found) if found is not None else None
            if found is None or problem is None:
                break
            self._damaged[found.state.step] = problem
        for step, why in self._damaged.items():
            say(f"the checkpoint of step {step} is left out, the one before it is used: {why}")
            if self._rank == 0 and self._attempt.superseded() is None:  # its step is to be committed anew
                self._store.set_aside(step)
        self._saved = found.state.step if found is not None else None
        return found

    def at(self, step: int | None) -> Checkpoint:
        """The checkpoint of a step, on all ranks. Raises as :meth:`newest`, and :class:`RunFailed` where it is gone."""
        assert step is not None
        found = from_rank_zero(lambda: self._store.at(step))
        problem = self._altered(found) if found is not None else "it is gone"
        if found is None or problem is not None:
            raise DamagedCheckpoint(f"{self._store.folder}/{step_name(step)}: {problem}")
        return found

    def committed_step(self) -> int | None:
        """The step of the newest checkpoint that is committed."""
        return next(filter(self._store.is_committed, self._store.steps()), None)

    def _altered(self, checkpoint: Checkpoint) -> str | None:
        """The first file whose bytes are not those that were committed, by the checksums; the same on all ranks."""
        problem = self._store.alteration(checkpoint, sorted(checkpoint.files)[self._rank :: self._world])
        found: list[str | None] = [None] * self._world
        dist.all_gather_object(found, problem)
        return next(filter(None, found), None)

    def load(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Load a checkpoint into the engine, on all ranks, whatever number of ranks wrote it.

        Raises:
            UserError: its optimizer, or its ZeRO stage at another number of ranks, cannot be loaded.
        """
        state = checkpoint.state
        dtype = precision_of(engine)
        if state.dtype not in ("", dtype):
            raise UserError(
                f"{checkpoint.folder}: was trained in {state.dtype}, now it would be {dtype}: set training.dtype={state.dtype} to go on"
            )
        written, now = (state.stage, state.optimizer), (engine.zero_optimization_stage(), optimizer_of(engine))
        if written != now and (state.optimizer or written[0] != now[0]):
            raise UserError(
                f"{checkpoint.folder}: written by ZeRO stage {written[0]} with {written[1]}, with training.deepspeed as it is "
                f"now it would be stage {now[0]} with {now[1]}: set the one that it was to go on"
            )
        if state.workers == self._world:
            with self._fetched(checkpoint, checkpoint.of_rank(self._rank)) as folder:
                _, kept = engine.load_checkpoint(
                    str(folder.parent), tag=folder.name, load_module_strict=not self._only_trained
                )
            torch.set_rng_state(kept["random"]["cpu"])
            if "cuda" in kept["random"]:
                torch.cuda.set_rng_state(kept["random"]["cuda"])
            return
        if state.stage != 3:
            raise UserError(
                f"{checkpoint.folder}: written by {state.workers} workers under ZeRO stage {state.stage}, now there are "
                f"{self._world}: set training.num_workers={state.workers} to go on; only stage 3 changes its size"
            )
        load_resharded(engine, lambda rank: self._fetched(checkpoint, checkpoint.of_rank(rank)), state.workers)

    @contextmanager
    def _fetched(self, checkpoint: Checkpoint, names: list[str]) -> Iterator[Path]:
        """A folder with these files of a checkpoint, while they are read."""
        storage = self._store.storage
        if storage.local_root is not None:
            yield storage.local_root / checkpoint.folder
            return
        folder = self._staging / "fetched" / Path(checkpoint.folder).name
        folder.mkdir(parents=True)
        try:
            for name in names:
                storage.download(f"{checkpoint.folder}/{name}", folder / name)
            yield folder
        finally:
            shutil.rmtree(folder)


def optimizer_of(engine: Any) -> str:
    """The optimizer that really steps: DeepSpeed has its own on the CPU."""
    return type(engine.basic_optimizer).__name__


def precision_of(engine: Any) -> str:
    return str(engine.get_data_types()[0]).removeprefix("torch.")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
