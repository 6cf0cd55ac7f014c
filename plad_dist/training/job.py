"""Everything that a training worker needs to know of its phase."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plad_dist.config import CollapseBounds, Lora, Model, Phase
from plad_dist.data.storage import Storage
from plad_dist.training.batches.groups import DataSpec


@dataclass(frozen=True)
class PhaseJob:
    """A phase as it is planned. Plain values: it travels to the workers.

    Attributes:
        name: of the phase; its folders under checkpoints/, models/ and events/.
        start: folder or hub name of the model to start from.
        heldout: pairs that are ranked but not trained on; None for none.
        deepspeed: the DeepSpeed config, without batch, precision and optimizer.
        longest: most tokens of a group, None for any.
        attention: which implementation is wanted.
        checkpoints: where checkpoints are kept, under checkpoints/<phase>/.
        watch: how the student is looked at while it trains; None for not.
        staging: folder on every node where checkpoints wait to be carried there; None for the system's.
        launch: names the command that trains, which may start several worker groups.
        mailbox: Ray actor that takes progress, None for none.
    """

    name: str
    start: str
    settings: Model
    phase: Phase
    data: DataSpec
    heldout: DataSpec | None
    heldout_limit: int
    seed: int
    steps: int
    deepspeed: dict[str, Any]
    dtype: str
    micro_batch_tokens: int
    longest: int | None
    attention: Literal["auto", "sdpa", "flex"]
    lora: Lora | None
    gradient_checkpointing: bool
    divergence_factor: float
    trackers: tuple[str, ...]
    storage: Storage
    checkpoints: Storage
    staging: str | None
    watch: CollapseBounds | None
    fingerprint: str
    launch: str = ""
    mailbox: Any = None

    @property
    def stopped_key(self) -> str:
        """Where workers leave why to try again would end alike."""
        return f"checkpoints/{self.name}/stopped-{self.launch}.json"

    def folder(self, kind: str) -> Path:
        """The phase's folder of a kind (checkpoints, models, events)."""
        root = self.storage.local_root
        assert root is not None, "training needs a run directory on a file system"
        return root / kind / self.name
