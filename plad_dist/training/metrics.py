"""Figures of training: per step, on TensorBoard and as JSON lines under ``events/<phase>/``, and to the driver."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plad_dist.config import Loss
from plad_dist.training.batching import MicroBatch
from plad_dist.training.checkpoints import TrainState

METRICS_FILE = "metrics.jsonl"
_NAMES = (
    "groups",
    "tokens",
    "loss",
    "active",
    "correct",
    "chosen_logp",
    "rejected_logp",
    "chosen_tokens",
    "rejected_tokens",
)


@dataclass
class StepTotals:
    """Sums over the groups of one step, first of this rank and, after :meth:`reduce`, of all."""

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_NAMES, 0.0))
    pairs: bool = False

    def add(self, loss: Loss, batch: MicroBatch, logps_BK: Tensor, losses_B: Tensor) -> None:
        """Count a micro-batch."""
        sums = self.sums
        sums["groups"] += batch.groups
        sums["tokens"] += batch.tokens
        sums["loss"] += float(losses_B.sum())
        sums["chosen_logp"] += float(logps_BK[:, 0].sum())
        sums["chosen_tokens"] += float(batch.lengths_BK[:, 0].sum())
        if logps_BK.shape[1] > 1:
            self.pairs = True
            scores_BK = logps_BK / batch.lengths_BK if loss.length_normalize else logps_BK
            gap_B = scores_BK[:, 0] - scores_BK[:, 1]
            sums["active"] += float((gap_B < loss.margin).sum())
            sums["correct"] += float((gap_B > 0).sum())
            sums["rejected_logp"] += float(logps_BK[:, 1].sum())
            sums["rejected_tokens"] += float(batch.lengths_BK[:, 1].sum())

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Add up over all ranks."""
        values = torch.tensor([*self.sums.values(), float(self.pairs)], dtype=torch.float64, device=device)
        dist.all_reduce(values)
        *sums, pairs = values.tolist()
        self.sums, self.pairs = dict(zip(_NAMES, sums, strict=True)), pairs > 0
        return self.sums

    def figures(self) -> dict[str, float]:
        """Means per group. Log-likelihoods are per sequence, and per token under `_per_token`."""
        sums, groups = self.sums, max(1.0, self.sums["groups"])
        figures = {
            "loss": sums["loss"] / groups,
            "chosen_logp": sums["chosen_logp"] / groups,
            "chosen_logp_per_token": sums["chosen_logp"] / max(1.0, sums["chosen_tokens"]),
        }
        if self.pairs:
            figures |= {
                "pair_accuracy": sums["correct"] / groups,
                "active_share": sums["active"] / groups,
                "rejected_logp": sums["rejected_logp"] / groups,
                "rejected_logp_per_token": sums["rejected_logp"] / max(1.0, sums["rejected_tokens"]),
            }
        return figures


class MetricsLog:
    """Writes the figures of one phase; only the first rank has one.

    Args:
        folder: ``events/<phase>``.
        step: steps done before; what an earlier attempt wrote past it is superseded.
        monitor: Ray actor with a ``post`` method, or None.
    """

    def __init__(self, folder: Path, step: int, steps: int, monitor: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
        self._phase, self._steps, self._monitor = folder.name, steps, monitor

    def step(self, state: TrainState, figures: dict[str, float]) -> None:
        """Figures of the step that was just done."""
        record = {"step": state.step, "groups": state.groups, "tokens": state.tokens, **figures}
        self._write(record, "train", figures, state.step)
        self._post({"kind": "step", **record})

    def heldout(self, step: int, pairs: int, figures: dict[str, float]) -> None:
        """How held-out pairs are ranked after `step` steps."""
        kept = {name: value for name, value in figures.items() if name != "loss"}
        self._write({"step": step, "heldout_pairs": pairs, "heldout": kept}, "heldout", kept, step)
        self._post({"kind": "heldout", "step": step, **kept})

    def begin(self, text: str) -> None:
        """Training begins or goes on; `text` says how, for the driver's log."""
        self._post({"kind": "begin", "steps": self._steps, "text": text})

    def close(self) -> None:
        self._board.close()
        self._file.close()

    def _write(self, record: dict[str, Any], group: str, figures: dict[str, float], step: int) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def _post(self, message: dict[str, Any]) -> None:
        if self._monitor is not None:
            self._monitor.post.remote({"phase": self._phase, **message})


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, held-out rankings) of a phase in order of steps; the latest word on a step counts."""
    steps: dict[int, dict[str, Any]] = {}
    heldout: dict[int, dict[str, Any]] = {}
    path = folder / METRICS_FILE
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of an attempt that was killed
                continue
            (heldout if "heldout" in record else steps)[record["step"]] = record
    return [steps[step] for step in sorted(steps)], [heldout[step] for step in sorted(heldout)]
