"""Evaluation on held-out pairs during a phase: ranking, best step so far, early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from plad_dist.config import Phase
from plad_dist.training.agreement import agreed
from plad_dist.training.batches.groups import GroupSource
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.job import PhaseJob
from plad_dist.training.losses import group_losses
from plad_dist.training.worker.step_data import RankShare
from plad_dist.training.worker.step_totals import StepTotals


@dataclass(frozen=True)
class HeldoutRanking:
    """Result of one evaluation.

    Attributes:
        pairs: number of pairs that were ranked.
        figures: means by metric name, as :meth:`StepTotals.figures` returns them.
    """

    pairs: int
    figures: dict[str, float]


class HeldoutEvaluation:
    """Ranks the held-out pairs of a phase, on all ranks together.

    Args:
        groups: groups of the held-out pairs; None if the phase has none.
    """

    def __init__(self, job: PhaseJob, groups: GroupSource | None, share: RankShare, device: torch.device) -> None:
        self._job, self._groups, self._share, self._device = job, groups, share, device

    @torch.no_grad()
    def rank_pairs(self, engine: Any, state: TrainState) -> HeldoutRanking | None:
        """Rank the held-out pairs with the present weights.

        Returns:
            None if there are no pairs within the bounds, or if this step was evaluated before.

        Raises:
            StoppedError: a group exceeds the token budget.
        """
        job = self._job
        count = min(len(self._groups), job.heldout_limit) if self._groups is not None else 0
        if self._groups is None or not count or state.evaluated == state.step:
            return None
        with agreed():
            micro_batches = self._share.micro_batches(self._groups.take(np.arange(count)))
        totals = StepTotals(job.phase.loss, self._device)
        engine.eval()
        for groups in micro_batches:
            batch = self._share.pack(groups).to(self._device)
            logps_S = engine(batch)
            if batch.groups:
                losses_B = group_losses(job.phase.loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S)
                totals.add(batch, logps_S, losses_B)
        totals.reduce()
        pairs = int(totals.sums["pairs"])
        return HeldoutRanking(pairs, totals.figures()) if pairs else None


def with_evaluation(state: TrainState, figures: Mapping[str, float], phase: Phase) -> tuple[TrainState, bool]:
    """Return the state after an evaluation, and True if the weights are the best so far.

    The starting weights (step 0) are evaluated but never the best: no checkpoint of the phase holds
    them.
    """
    value = _objective(figures, phase)
    state = replace(state, evaluated=state.step)
    if not math.isfinite(value) or state.step == 0:
        return state, False
    if state.best is None or value > state.best:
        return replace(state, best=value, best_step=state.step, stale=0), True
    return replace(state, stale=state.stale + 1), False


def is_out_of_patience(state: TrainState, phase: Phase) -> bool:
    """Return True if `patience` evaluations in a row have brought nothing better."""
    return phase.patience is not None and state.stale >= phase.patience


def _objective(figures: Mapping[str, float], phase: Phase) -> float:
    """Return the figure that `best_by` selects, signed so that larger is better."""
    match phase.best_by:
        case "pairs_ranked_right":
            return figures.get("pair_accuracy", 0.0)
        case "loss":
            return -figures["loss"]
        case "chosen_logp":
            return figures["chosen_logp"]
