"""The checkpoints of a phase in storage: a checkpoint is whole, or it is not there. Without torch: `plad verify` reads them too.

``checkpoints/<phase>/step-00000120/`` holds DeepSpeed's files in a folder of the attempt that wrote them, and ``state.json``, which
commits them: it is created once, when the files of all ranks are there, and lists them with sizes and checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError

STATE, OWNER = "state.json", "owner"
_STEP = re.compile(r"step-(\d{8,})/")
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_ASIDE = ".damaged"  # ending of the state of a checkpoint that was set aside


@dataclass(frozen=True)
class TrainState:
    """Where training stands.

    Attributes:
        step: global steps done.
        groups: groups trained on.
        tokens: tokens computed.
        workers: world size that wrote the checkpoint.
        fingerprint: of the phase: its config, data and starting model.
        stage, optimizer, dtype: of ZeRO, where it steps and in what precision, which decide what the files of a checkpoint hold.
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
    dtype: str = ""
    first: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1
    best: float | None = None
    best_step: int | None = None
    stale: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        folder: of its files, in the storage.
        files: bytes and XXH3 checksum by name.
    """

    state: TrainState
    folder: str
    files: dict[str, tuple[int, str]]

    def of_rank(self, rank: int) -> list[str]:
        """Names of the files that a rank needs where there are as many ranks as wrote them."""
        if self.state.stage != 3:
            return list(self.files)
        return [name for name in self.files if (match := _RANK.search(name)) is None or int(match[1]) == rank]


class DamagedCheckpoint(RunFailed):
    """A committed checkpoint is not what it should be. Storage that does not answer is no damage."""


class CheckpointStore:
    """The checkpoints of one phase in storage, as they are read.

    Args:
        fingerprint: of the phase; None to read those of any.
    """

    def __init__(self, storage: Storage, phase: str, fingerprint: str | None) -> None:
        self.storage, self.folder, self._fingerprint = storage, f"checkpoints/{phase}", fingerprint

    def steps(self) -> list[int]:
        """Steps of which there is something, the newest first."""
        found = (_STEP.fullmatch(name) for name in self.storage.sizes(self.folder))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def newest(self, without: dict[int, str] | None = None) -> tuple[Checkpoint | None, dict[int, str]]:
        """The newest whole checkpoint by names and sizes, and what is wrong with newer ones, by step.

        Args:
            without: steps that are known to be damaged.

        Raises:
            UserError: it belongs to another config, data or model.
            RunFailed: none is whole, though some are committed; or the storage does not answer.
        """
        damaged, steps = dict(without or {}), self.steps()
        for step in steps:
            if step in damaged:
                continue
            try:
                found = self.at(step)
                if found is not None and (problem := self.harm(found)) is not None:
                    raise DamagedCheckpoint(problem)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            if found is not None:
                return found, damaged
        aside = [step for step in steps if self.storage.exists(f"{self.key(step)}{_ASIDE}")]
        if damaged or aside:  # training must not begin anew without a word
            why = "; ".join(damaged.values()) or f"those of the steps {', '.join(map(str, aside))} were set aside"
            raise RunFailed(
                f"{self.storage.url}/{self.folder}: every checkpoint is damaged ({why}). Mend the storage, or delete this folder to "
                "train the phase from its start"
            )
        return None, damaged

    def at(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step, None where none is committed. Raises as :meth:`newest`, and :class:`DamagedCheckpoint`."""
        key = self.key(step)
        data = self.storage.read(key)
        if data is None:
            return None
        try:
            found = json.loads(data)
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in found["files"].items()}
            checkpoint = Checkpoint(
                TrainState(**found["state"]), f"{self.folder}/{step_name(step)}/{found['attempt']}", files
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedCheckpoint(
                f"{self.storage.url}/{key}: damaged: not the state of a checkpoint of this version"
            ) from None
        if self._fingerprint not in (None, checkpoint.state.fingerprint):
            raise UserError(
                f"{self.storage.url}/{key}: a checkpoint of another config, data or model (fingerprint "
                f"{checkpoint.state.fingerprint[:12]}, expected {str(self._fingerprint)[:12]}). Use another run.dir, or delete "
                f"{self.storage.url}/{self.folder}."
            )
        return checkpoint

    def harm(self, checkpoint: Checkpoint) -> str | None:
        """What names and sizes say against a checkpoint, None for nothing."""
        sizes = self.storage.sizes(checkpoint.folder)
        for name, (size, _) in checkpoint.files.items():
            if sizes.get(name) != size:
                what = (
                    "missing"
                    if name not in sizes
                    else f"damaged: it has {sizes[name]:,} bytes, {size:,} were committed"
                )
                return f"{self.storage.url}/{checkpoint.folder}/{name}: {what}"
        return None

    def is_committed(self, step: int) -> bool:
        """Whether there is a checkpoint of a step."""
        return self.storage.exists(self.key(step))

    def alteration(self, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> str | None:
        """The first of these files, or of all, whose bytes are not those that were committed. None for none. Reads every byte."""
        for name in checkpoint.files if names is None else names:
            if self.storage.checksum(f"{checkpoint.folder}/{name}") != checkpoint.files[name][1]:
                return f"{self.storage.url}/{checkpoint.folder}/{name}: damaged: its checksum is another"
        return None

    def set_aside(self, step: int) -> None:
        """Make a damaged checkpoint one that is not committed; its files stay until the next ones are pruned."""
        key = self.key(step)
        data = self.storage.read(key)
        if data is not None:
            self.storage.replace(f"{key}{_ASIDE}", data)
            self.storage.delete(key)

    def key(self, step: int) -> str:
        """What commits the checkpoint of a step."""
        return f"{self.folder}/{step_name(step)}/{STATE}"


def step_name(step: int) -> str:
    """Folder of a step's checkpoint."""
    return f"step-{step:08d}"
