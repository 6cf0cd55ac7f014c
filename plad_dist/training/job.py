"""Description of a training phase that travels from the driver to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plad_dist.config import CollapseBounds, Lora, Model, Phase
from plad_dist.data.storage import Storage
from plad_dist.training.batches.groups import DataSpec
from plad_dist.training.batches.micro_batch import RowSupport


@dataclass(frozen=True)
class PhaseJob:
    """Frozen description of a phase, in plain values that can be pickled.

    Attributes:
        name: name of the phase, and of its folders under checkpoints/, models/ and events/.
        start: folder or hub name of the starting model.
        settings: config section of the model.
        phase: config section of the phase.
        data: groups that the phase trains on.
        heldout: held-out pairs that are ranked but not trained on, or None.
        heldout_limit: the most held-out groups that are ranked.
        steps: number of global steps.
        deepspeed: DeepSpeed config, without batch sizes, precision and optimizer.
        micro_batch_tokens: most tokens of a micro-batch.
        max_group_tokens: most tokens that the model may compute for a group, None for no limit.
        row_support: rows in which the model's log-likelihoods are exact.
        attention: attention implementation from the config.
        router_aux_loss: factor of the loss that balances the experts of a mixture.
        divergence_factor: training stops if the loss exceeds the first step's loss times this
            factor.
        storage: the run directory.
        checkpoints: storage of the checkpoints, which are under checkpoints/<phase>/ in it.
        staging: folder on every node in which checkpoints are staged; None for a temporary folder
            of the system.
        watch: bounds of the collapse watch; None to train without it.
        fingerprint: hash of everything that decides the trained model.
        inputs: hash of what decides the trained model, apart from the bytes of the data.
        launch: identifies the command that trains, which may start several worker groups.
        mailbox: way of a training process to the driver, or None.
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
    max_group_tokens: int | None
    row_support: RowSupport
    attention: Literal["auto", "sdpa", "flex"]
    lora: Lora | None
    router_aux_loss: float
    gradient_checkpointing: bool
    divergence_factor: float
    trackers: tuple[str, ...]
    storage: Storage
    checkpoints: Storage
    staging: str | None
    watch: CollapseBounds | None
    fingerprint: str
    inputs: str | None = None
    launch: str = ""
    mailbox: Any = None

    @property
    def stopped_key(self) -> str:
        """Storage key at which the workers record why a retry would fail in the same way."""
        return f"checkpoints/{self.name}/stopped-{self.launch}.json"

    def folder(self, kind: Literal["checkpoints", "models", "events"]) -> Path:
        """Return the local folder of the phase of one kind."""
        root = self.storage.local_root
        assert root is not None, "training needs a run directory on a file system"
        return root / kind / self.name
