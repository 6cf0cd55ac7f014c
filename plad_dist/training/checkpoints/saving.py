"""Checkpoints of an attempt: staged on each node, uploaded and committed in the background.

Training waits only while every rank writes its files to a local disk. A thread then uploads them to
the storage, which may be an object store, and writes a small object that lists them. When the
objects of all ranks exist, the first rank commits the checkpoint by creating its `state.json`,
unless a later attempt has started. ``latest.json`` names the newest checkpoint for people; no
program reads it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plad_dist.data.local_files import COMMITTED_IS_KEPT, failure_explained, file_checksum
from plad_dist.data.sealed import sealed_json, unsealed_json
from plad_dist.errors import RunFailed, first_line
from plad_dist.training.agreement import from_rank_zero
from plad_dist.training.checkpoints.attempts import Attempt
from plad_dist.training.checkpoints.scratch_dir import ScratchDir
from plad_dist.training.checkpoints.store import CheckpointStore, DamagedCheckpoint, TrainState, step_name
from plad_dist.training.records.collapse import CollapseRecord

logger = logging.getLogger("plad")

_LATEST = "latest.json"
STAGING_PREFIX = "plad-checkpoint-"
_TORCH_WRITER_ERRORS = ("inline_container", "iostream error")
_POLL_S = 0.2
_COMMIT_TIMEOUT_S = 1800.0


class Checkpoints:
    """Saves the checkpoints of a phase; every rank of an attempt has one.

    Args:
        keep: number of newest checkpoints to keep.
        staging: folder on a local disk; None for the system's folder for temporary files.
        only_trained: leave out frozen parameters, which are those of the starting model.
        read_collapse_record: returns the collapse record of the phase, or None if it is not
            watched.

    Attributes:
        superseded: launch of a later attempt, as of the latest commit or :meth:`settle`; None if
            there is none.
        has_collapsed: True if the collapse record reported a collapse at the latest commit.
        stall_seconds: time that the latest :meth:`save` has cost training.
        commit_seconds: time from the start of the latest save to its commit, on the first rank.
    """

    def __init__(
        self,
        store: CheckpointStore,
        attempt: Attempt,
        keep: int,
        staging: str | None,
        *,
        only_trained: bool = False,
        read_collapse_record: Callable[[], CollapseRecord | None] = lambda: None,
    ) -> None:
        self._store, self._attempt, self._keep, self._only_trained = store, attempt, keep, only_trained
        self._read_collapse_record = read_collapse_record
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._scratch = ScratchDir(staging, STAGING_PREFIX)
        self._staging = self._scratch.path
        self._uploader = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._saved_step: int | None = None
        self.superseded: str | None = None
        self.has_collapsed = False
        self.stall_seconds = 0.0
        self.commit_seconds = 0.0

    def close(self) -> None:
        """Abandon what is not committed and remove the staged files."""
        self._uploader.shutdown(wait=False, cancel_futures=True)
        self._scratch.remove()

    # -- writing

    def save(self, engine: Any, state: TrainState) -> None:
        """Write a checkpoint from all ranks, unless this step has one.

        It is committed in the background, after the previous checkpoint, for which this call waits.

        Raises:
            RunFailed: the previous checkpoint could not be committed, or the local disk is full.
        """
        if state.step == self._saved_step:
            return
        started = time.monotonic()
        self._wait_for_commit()
        folder = self._staging / step_name(state.step)
        with _staging_failure_explained(folder):
            engine.save_checkpoint(
                str(folder),
                tag=self._attempt.name,
                save_latest=False,
                exclude_frozen_parameters=self._only_trained,
                client_state={"random": _random_state()},
            )
        self._pending = self._uploader.submit(self._upload, folder, state, started)
        self._saved_step = state.step
        self.stall_seconds = time.monotonic() - started

    @property
    def is_uploading(self) -> bool:
        """True while this rank uploads a checkpoint, or commits it."""
        return self._pending is not None and not self._pending.done()

    @property
    def failure(self) -> str | None:
        """Reason why this rank could not upload the latest checkpoint, or None."""
        pending = self._pending
        error = pending.exception() if pending is not None and pending.done() else None
        return None if error is None else str(error)

    def settle(self) -> None:
        """Wait on all ranks for the commit of the latest checkpoint, then update `superseded`.

        Raises:
            RunFailed: the checkpoint could not be committed.
        """
        self._wait_for_commit()
        self.superseded = from_rank_zero(self._attempt.superseded)

    def committed_step(self) -> int | None:
        """Return the step of the newest committed checkpoint, or None."""
        return next(filter(self._store.is_committed, self._store.steps()), None)

    def drain(self) -> None:
        """Wait for the latest commit and ignore its failure, because training ends anyway."""
        with contextlib.suppress(RunFailed, OSError):
            self._wait_for_commit()

    def _wait_for_commit(self) -> None:
        """Wait until the latest checkpoint is committed or a later attempt has started.

        Ranks poll the storage, since a collective would time out sooner than a slow storage.
        """
        if self._pending is None:
            return
        self._pending.result()
        self._pending = None
        if self._rank and self._saved_step is not None:
            key, until = self._store.key(self._saved_step), time.monotonic() + _COMMIT_TIMEOUT_S
            while not self._store.storage.exists(key) and self._attempt.superseded() is None:
                if time.monotonic() > until:
                    raise RunFailed(
                        f"{self._store.storage.url}/{key}: not written within {_COMMIT_TIMEOUT_S:.0f} s; the first "
                        "worker does not respond"
                    )
                time.sleep(_POLL_S)

    def _upload(self, local: Path, state: TrainState, started: float) -> None:
        """Upload this rank's files. The first rank then waits for all ranks and commits."""
        storage, folder = self._store.storage, f"{self._store.folder}/{step_name(state.step)}/{self._attempt.name}"
        files: dict[str, tuple[int, str]] = {}
        with failure_explained(str(local), "read"):
            for file in sorted((local / self._attempt.name).iterdir()):
                files[file.name] = (file.stat().st_size, file_checksum(file))
                storage.upload(f"{folder}/{file.name}", file)
        shutil.rmtree(local, ignore_errors=True)
        storage.replace(f"{folder}/{_rank_file(self._rank)}", sealed_json(json.dumps(files)))
        if self._rank == 0:
            self._commit(folder, state)
            self.commit_seconds = time.monotonic() - started

    def _commit(self, folder: str, state: TrainState) -> None:
        """Create the checkpoint's `state.json` and prune, unless a later attempt has started."""
        storage = self._store.storage
        files = self._wait_for_files(folder)
        self.superseded = self._attempt.superseded()
        if self.superseded is not None:
            return
        document = {"state": asdict(state), "attempt": self._attempt.name, "files": files}
        created = storage.create(self._store.key(state.step), sealed_json(json.dumps(document, indent=1)))
        self.superseded = self._attempt.superseded()
        # This process may have been frozen before the commit: it must not prune later checkpoints.
        if self.superseded is not None:
            return
        if created:
            storage.replace(f"{self._store.folder}/{_LATEST}", json.dumps(asdict(state), indent=1).encode())
        self._try_prune()

    def _wait_for_files(self, folder: str) -> dict[str, Any]:
        """Wait for the uploads of all ranks; return sizes and checksums of their files by name."""
        storage, until = self._store.storage, time.monotonic() + _COMMIT_TIMEOUT_S
        rank_files = {_rank_file(rank) for rank in range(self._world)}
        while missing := rank_files - storage.sizes(folder).keys():
            if time.monotonic() > until:
                raise RunFailed(
                    f"{storage.url}/{folder}: {min(missing)}: not written within {_COMMIT_TIMEOUT_S:.0f} s; its worker "
                    "does not respond"
                )
            time.sleep(_POLL_S)
        files: dict[str, Any] = {}
        for name in sorted(rank_files):
            try:
                files |= unsealed_json(storage.read(f"{folder}/{name}") or b"")
            except ValueError as error:
                raise RunFailed(
                    f"{storage.url}/{folder}/{name}: damaged: {error}; the checkpoint is not committed, the one before "
                    "it is kept. Run again"
                ) from None
        return files

    def _try_prune(self) -> None:
        """Prune, and log a failure, because the next commit prunes again."""
        try:
            self._prune()
        except RunFailed as error:
            logger.warning("old checkpoints cannot be deleted now and stay until the next one: %s", error)

    def _prune(self) -> None:
        """Delete old checkpoints, except the best ones and those that the collapse watch needs."""
        record = self._read_collapse_record()  # without it, the checkpoints to keep are unknown
        self.has_collapsed = record is not None and record.collapse is not None
        newest: list[TrainState] = []
        for step in self._store.steps():
            with contextlib.suppress(DamagedCheckpoint):  # it does not count among the newest
                if len(newest) < self._keep and (checkpoint := self._store.at(step)) is not None:
                    newest.append(checkpoint.state)
        steps_to_keep = {step for state in newest for step in (state.step, state.best_step)}
        steps_to_keep |= record.needed if record is not None else set()
        for step in self._store.steps():
            if newest and step not in steps_to_keep and step < newest[0].step:
                # The key first, so that files that remain after a crash are not committed.
                self._store.storage.delete(self._store.key(step))
                self._store.storage.delete_folder(f"{self._store.folder}/{step_name(step)}")


@contextmanager
def _staging_failure_explained(folder: Path) -> Iterator[None]:
    """Turn the errors of torch's file writer, which name neither file nor cause, into our own."""
    try:
        with failure_explained(str(folder), "written"):
            yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _TORCH_WRITER_ERRORS):  # such as a lost connection
            raise
        raise RunFailed(
            f"{folder}: cannot be written: {shutil.disk_usage(folder.parent).free:,} bytes of the disk are free "
            f"({first_line(error)}){COMMITTED_IS_KEPT}; make room, or set training.staging_dir"
        ) from None


def _rank_file(rank: int) -> str:
    """Return the name of the object that lists the files of a rank."""
    return f"rank-{rank:05d}.json"


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
