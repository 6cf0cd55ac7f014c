"""Checkpoints of a phase in storage: their commit, sizes and checksums, and the newest sound one.

Torch is not needed: `plad verify` and `plad status` read them too.

A checkpoint is committed completely or not at all. ``checkpoints/<phase>/step-00000120/`` holds
DeepSpeed's files in a folder of the attempt that wrote them, and ``state.json``, which commits
them: it is created once, after the files of all ranks exist, and lists them with sizes and
checksums. It ends with a checksum of itself.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from plad_dist.data.sealed import unsealed_json
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError

logger = logging.getLogger("plad")

STATE, OWNER = "state.json", "owner"
_STEP = re.compile(r"step-(\d{8,})/")
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_ASIDE = f"{STATE}.damaged-"  # start of the names of states that were set aside


@dataclass(frozen=True)
class TrainState:
    """Progress of a phase.

    Attributes:
        step: global steps taken.
        groups: groups trained on.
        tokens: tokens computed.
        workers: size of the worker group that wrote the checkpoint.
        fingerprint: fingerprint of the phase: of its config, data and starting model.
        stage, optimizer, dtype: ZeRO stage, class of the optimizer and data type, which decide the
            contents of the files.
        first: figures of the first step.
        evaluated: step of the latest evaluation, -1 before the first one.
        best: best value of `best_by`, reached at `best_step`.
        stale: number of evaluations since then, none of them better.
    """

    step: int
    groups: int
    tokens: int
    workers: int
    fingerprint: str
    stage: int = 3
    optimizer: str = ""
    dtype: str = ""
    first: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1
    best: float | None = None
    best_step: int | None = None
    stale: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Committed checkpoint.

    Attributes:
        folder: folder of the files in the storage.
        files: size in bytes and XXH3 checksum by file name.
    """

    state: TrainState
    folder: str
    files: dict[str, tuple[int, str]]

    def of_rank(self, rank: int) -> list[str]:
        """Return the names of the files that a rank reads at an unchanged number of ranks."""
        if self.state.stage != 3:
            return list(self.files)
        return [name for name in self.files if (match := _RANK.search(name)) is None or int(match[1]) == rank]


class DamagedCheckpoint(RunFailed):
    """A committed checkpoint does not match its `state.json`.

    A storage that does not respond is no damage.
    """


class CheckpointStore:
    """Read access to the checkpoints of one phase.

    Args:
        fingerprint: fingerprint of the phase; None accepts any.
    """

    def __init__(self, storage: Storage, phase: str, fingerprint: str | None) -> None:
        self.storage, self.folder, self._fingerprint = storage, f"checkpoints/{phase}", fingerprint

    def steps(self) -> list[int]:
        """Return the steps that have a folder, committed or not, the newest first."""
        matches = (_STEP.fullmatch(name) for name in self.storage.sizes(self.folder))
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def newest(self, without: dict[int, str] | None = None) -> tuple[Checkpoint | None, dict[int, str]]:
        """Return the newest checkpoint whose files exist, and the problems of newer ones.

        Args:
            without: problems by step of checkpoints that are known to be damaged.

        Raises:
            UserError: the checkpoint belongs to another config, data or model.
            RunFailed: every committed checkpoint is damaged, or the storage does not respond.
        """
        damaged, steps = dict(without or {}), self.steps()
        for step in steps:
            if step in damaged:
                continue
            try:
                checkpoint = self.at(step)
                if checkpoint is not None and (problem := self.size_problem(checkpoint)) is not None:
                    raise DamagedCheckpoint(problem)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            if checkpoint is not None:
                return checkpoint, damaged
        aside = [step for step in steps if self._was_set_aside(step)]
        if damaged or aside:  # training must not restart from the beginning silently
            problems = "; ".join(damaged.values()) or f"those of the steps {', '.join(map(str, aside))} were set aside"
            raise RunFailed(
                f"{self.storage.url}/{self.folder}: every checkpoint is damaged ({problems}). Repair the storage, or "
                "delete this folder to train the phase from its start"
            )
        return None, damaged

    def at(self, step: int) -> Checkpoint | None:
        """Return the checkpoint of a step, or None if none is committed.

        Raises:
            UserError: the checkpoint belongs to another config, data or model.
            DamagedCheckpoint: its `state.json` cannot be parsed.
            RunFailed: the storage does not respond.
        """
        key = self.key(step)
        data = self.storage.read(key)
        if data is None:
            return None
        try:
            document = unsealed_json(data)
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in document["files"].items()}
            checkpoint = Checkpoint(
                TrainState(**document["state"]), f"{self.folder}/{step_name(step)}/{document['attempt']}", files
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = str(error) if isinstance(error, ValueError) else "not the state of a checkpoint of this version"
            raise DamagedCheckpoint(f"{self.storage.url}/{key}: damaged: {problem}") from None
        if self._fingerprint not in (None, checkpoint.state.fingerprint):
            raise UserError(
                f"{self.storage.url}/{key}: a checkpoint of another config, data or model (fingerprint "
                f"{checkpoint.state.fingerprint[:12]}, expected {str(self._fingerprint)[:12]}). Use another run.dir, "
                f"or delete {self.storage.url}/{self.folder}."
            )
        return checkpoint

    def size_problem(self, checkpoint: Checkpoint) -> str | None:
        """Return the first file that is missing or has another size than committed, or None."""
        sizes = self.storage.sizes(checkpoint.folder)
        for name, (size, _) in checkpoint.files.items():
            if sizes.get(name) != size:
                problem = (
                    "missing"
                    if name not in sizes
                    else f"damaged: it has {sizes[name]:,} bytes, {size:,} were committed"
                )
                return f"{self.storage.url}/{checkpoint.folder}/{name}: {problem}"
        return None

    def is_committed(self, step: int) -> bool:
        """Return True if a checkpoint of a step is committed."""
        return self.storage.exists(self.key(step))

    def checksum_problem(self, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> str | None:
        """Return the first file whose checksum differs from the committed one, or None.

        Reads every byte.

        Args:
            names: files to read; None for all.
        """
        for name in checkpoint.files if names is None else names:
            if problem := self._digest_problem(checkpoint, name, self.storage.checksum(f"{checkpoint.folder}/{name}")):
                return problem
        return None

    def copy_problem(self, checkpoint: Checkpoint, name: str, out: BinaryIO) -> str | None:
        """Write a file of a checkpoint to an open file; return its problem, or None."""
        return self._digest_problem(checkpoint, name, self.storage.copy_hashed(f"{checkpoint.folder}/{name}", out))

    def _digest_problem(self, checkpoint: Checkpoint, name: str, digest: str | None) -> str | None:
        if digest == checkpoint.files[name][1]:
            return None
        return f"{self.storage.url}/{checkpoint.folder}/{name}: damaged: its checksum has changed"

    def set_aside(self, step: int) -> None:
        """Revoke the commit of a damaged checkpoint; its files stay until the next pruning."""
        target = f"{self.folder}/{step_name(step)}/{_ASIDE}{uuid.uuid4().hex[:8]}"
        if self.storage.move(self.key(step), target):
            logger.warning("%s/%s: set aside as %s", self.storage.url, self.key(step), target)

    def _was_set_aside(self, step: int) -> bool:
        return any(name.startswith(_ASIDE) for name in self.storage.sizes(f"{self.folder}/{step_name(step)}"))

    def key(self, step: int) -> str:
        """Return the key of the object that commits the checkpoint of a step."""
        return f"{self.folder}/{step_name(step)}/{STATE}"


def step_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"
