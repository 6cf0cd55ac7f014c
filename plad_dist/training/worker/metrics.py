"""Figures of training: per step, on TensorBoard and as JSON lines under ``events/<phase>/``, and to the driver."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plad_dist.config import Loss
from plad_dist.training.batches.micro_batch import MicroBatch
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.records.metrics_file import METRICS_FILE
from plad_dist.training.worker.trackers import Tracker, open_tracker

_NAMES = (
    "groups", "tokens", "tokens_apart", "loss", "chosen", "chosen_logp", "chosen_tokens", "pairs", "active", "correct",
    "rejected", "rejected_logp", "rejected_tokens", "sampled", "sampler_gap",
)  # fmt: skip


@dataclass(frozen=True)
class StepSignals:
    """What ranks want to be done by all after a step; it travels with the step's sums, so that all do it or none.

    Attributes:
        save: write a checkpoint.
        look: ask whether nodes are about to leave.
        leave: write a checkpoint and take no step more.
        superseded: a later attempt has begun.
        busy: the latest checkpoint is still on its way.
        failed: it could not be carried away.
        collapsed: a checkpoint of this phase has, by what was sampled from it.
    """

    save: bool = False
    look: bool = False
    leave: bool = False
    superseded: bool = False
    busy: bool = False
    failed: bool = False
    collapsed: bool = False


class StepTotals:
    """Sums over the groups of one step, first of this rank and, after :meth:`reduce`, of all.

    They stay on the device until then, so that counting waits for nothing.
    """

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self._loss = loss
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)
        self.sums: dict[str, float] = {}
        self.calls = StepSignals()

    @torch.no_grad()
    def add(self, batch: MicroBatch, logps_S: Tensor, losses_B: Tensor) -> None:
        """Count a micro-batch."""
        pairs, lengths_S = batch.pairs, batch.lengths_S.double()
        logps_S = logps_S.double()
        anchored_S = torch.zeros_like(lengths_S).index_fill(0, pairs.anchored_A, 1.0)
        rejected_S = torch.zeros_like(lengths_S).index_fill(0, pairs.rejected_P, 1.0) * (1 - anchored_S)
        scores_S = logps_S / lengths_S if self._loss.per_token else logps_S
        gap_P = scores_S[pairs.chosen_P] - scores_S[pairs.rejected_P]
        if self._loss.name == "margin":
            wanted_P = self._loss.margin * pairs.score_gap_P.double()
        else:
            wanted_P = (self._loss.hinge or 0.0) * pairs.rank_gap_P.double()
        sampled_S = batch.sampled_logps_S.double()
        known_S = ~sampled_S.isnan()
        gap_S = torch.where(known_S, (logps_S - sampled_S).abs() / lengths_S, 0.0)
        zero = logps_S.new_zeros(())
        self._sums += torch.stack(
            [
                zero + batch.groups, zero + batch.tokens, zero + batch.tokens_unshared,
                losses_B.double().sum(),
                anchored_S.sum(), (anchored_S * logps_S).sum(), (anchored_S * lengths_S).sum(),
                zero + gap_P.numel(), (gap_P < wanted_P).sum().double(), (gap_P > 0).sum().double(),
                rejected_S.sum(), (rejected_S * logps_S).sum(), (rejected_S * lengths_S).sum(),
                known_S.sum().double(), gap_S.sum(),
            ]
        )  # fmt: skip

    def reduce(self, calls: StepSignals = StepSignals()) -> dict[str, float]:
        """Add up over all ranks, with what this rank calls for."""
        wishes = torch.tensor(astuple(calls), dtype=self._sums.dtype, device=self._sums.device)
        sums = torch.cat([self._sums, wishes])
        dist.all_reduce(sums)
        values = sums.tolist()
        self.sums = dict(zip(_NAMES, values, strict=False))
        self.calls = StepSignals(*(value > 0 for value in values[len(_NAMES) :]))
        return self.sums

    def figures(self) -> dict[str, float]:
        """Means per group, response and pair. Log-likelihoods are per sequence, and per token under `_per_token`."""
        sums = self.sums
        figures = {
            "loss": _ratio(sums["loss"], sums["groups"]),
            "chosen_logp": _ratio(sums["chosen_logp"], sums["chosen"]),
            "chosen_logp_per_token": _ratio(sums["chosen_logp"], sums["chosen_tokens"]),
            "prompt_tokens_saved": _ratio(sums["tokens_apart"] - sums["tokens"], sums["tokens_apart"]),
        }
        if sums["pairs"]:
            figures |= {
                "pair_accuracy": sums["correct"] / sums["pairs"],
                "rejected_logp": _ratio(sums["rejected_logp"], sums["rejected"]),
                "rejected_logp_per_token": _ratio(sums["rejected_logp"], sums["rejected_tokens"]),
            }
            if self._loss.hinge is not None or self._loss.name == "margin":
                figures["active_share"] = sums["active"] / sums["pairs"]
        if sums["sampled"]:
            figures["sampler_gap_per_token"] = sums["sampler_gap"] / sums["sampled"]
        return figures


def _ratio(value: float, count: float) -> float:
    return value / max(1.0, count)


class MetricsLog:
    """Writes the figures of one phase; only the first rank has one.

    Args:
        folder: ``events/<phase>``.
        step: steps done before; what an earlier attempt wrote past it is superseded.
        mailbox: Ray actor with a ``post`` method, or None.
        trackers: packages that get the figures too.
        run: where the run lies, for trackers.
        attempt: that writes; what an earlier one writes later does not count.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        mailbox: Any,
        trackers: tuple[str, ...] = (),
        run: str = "",
        attempt: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
        self._phase, self._steps, self._mailbox, self._attempt = folder.name, steps, mailbox, attempt
        self._trackers: list[Tracker] = []
        for name in trackers:
            try:
                self._trackers.append(open_tracker(name, run, folder.name, goes_on=step > 0))
            except Exception as error:  # noqa: BLE001 - whatever its package raises, as below
                self.say(f"no figures go to {name}: {error!r:.200}")

    def step(self, state: TrainState, figures: dict[str, float]) -> None:
        """Figures of the step that was just done."""
        record = {
            "step": state.step, "groups": state.groups, "tokens": state.tokens, "workers": state.workers, **figures
        }  # fmt: skip
        self._write(record, "train", figures, state.step)
        self._post({"kind": "step", **record})

    def heldout(self, step: int, pairs: int, figures: dict[str, float]) -> None:
        """How held-out pairs are ranked after `step` steps."""
        kept = {name: value for name, value in figures.items() if name not in ("prompt_tokens_saved", "active_share")}
        self._write({"step": step, "heldout_pairs": pairs, "heldout": kept}, "heldout", kept, step)
        self._post({"kind": "heldout", "step": step, **kept})

    def begin(self, text: str) -> None:
        """Training begins or goes on; `text` says how, for the driver's log."""
        self._post({"kind": "begin", "steps": self._steps, "text": text})

    def say(self, text: str) -> None:
        """Something for the driver's log."""
        self._post({"kind": "say", "text": text})

    def diverged(self) -> None:
        """The step that was begun is not taken, and training stops."""
        self._post({"kind": "diverged"})

    def close(self) -> None:
        self._board.close()
        self._file.close()
        for tracker in list(self._trackers):
            self._tell(tracker, tracker.close)

    def _tell(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """Training does not depend on a tracker's server: one that fails is left out, and that is said."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever its package raises
            self._trackers.remove(tracker)
            self.say(f"no more figures go to {type(tracker).__name__.strip('_')}: {error!r:.200}")

    def _write(self, record: dict[str, Any], group: str, figures: dict[str, float], step: int) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), "attempt": self._attempt, **record}) + "\n")
        named = {f"{group}/{name}": value for name, value in figures.items()}
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        for tracker in list(self._trackers):
            self._tell(tracker, lambda: tracker.log(named, step))  # noqa: B023 - called at once

    def _post(self, message: dict[str, Any]) -> None:
        if self._mailbox is not None:
            self._mailbox.post.remote({"phase": self._phase, **message})
