"""Sums over the groups of a step, and the means that are logged.

Shape suffixes: `B` groups, `S` responses, `P` pairs, `A` responses that the anchor raises.
"""

from __future__ import annotations

from dataclasses import astuple

import torch
import torch.distributed as dist
from torch import Tensor

from plad_dist.config import Loss
from plad_dist.training.batches.micro_batch import MicroBatch
from plad_dist.training.model.balance import ExpertBalance
from plad_dist.training.worker.signals import NO_SIGNALS, StepSignals

_NAMES = (
    "groups", "tokens", "tokens_apart", "loss", "chosen", "chosen_logp", "chosen_tokens", "pairs", "active", "correct",
    "rejected", "rejected_logp", "rejected_tokens", "sampled", "sampler_gap",
)  # fmt: skip


class StepTotals:
    """Sums over the groups of one step: of this rank first, of all ranks after :meth:`reduce`.

    The sums stay on the device until the reduction, so that counting does not synchronise with it.

    Args:
        balance: auxiliary loss of the model's routers, whose sums are added up too.

    Attributes:
        sums: sums over all ranks by name; empty before the reduction.
        signals: signals of any rank.
    """

    def __init__(self, loss: Loss, device: torch.device, balance: ExpertBalance | None = None) -> None:
        self._loss, self._balance = loss, balance
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)
        self.sums: dict[str, float] = {}
        self.signals = NO_SIGNALS
        self._balance_sums: list[float] = []

    @torch.no_grad()
    def add(self, batch: MicroBatch, logps_S: Tensor, losses_B: Tensor) -> None:
        """Add a micro-batch."""
        pairs, lengths_S = batch.pairs, batch.lengths_S.double()
        logps_S = logps_S.double()
        anchored_S = torch.zeros_like(lengths_S).index_fill(0, pairs.anchored_A, 1.0)
        rejected_S = torch.zeros_like(lengths_S).index_fill(0, pairs.rejected_P, 1.0) * (1 - anchored_S)
        scores_S = logps_S / lengths_S if self._loss.per_token else logps_S
        gap_P = scores_S[pairs.chosen_P] - scores_S[pairs.rejected_P]
        if self._loss.name == "margin":
            margin_P = self._loss.margin * pairs.score_gap_P.double()
        else:
            margin_P = (self._loss.hinge or 0.0) * pairs.rank_gap_P.double()
        sampler_logps_S = batch.sampled_logps_S.double()
        has_sampler_logp_S = ~sampler_logps_S.isnan()
        sampler_gap_S = torch.where(has_sampler_logp_S, (logps_S - sampler_logps_S).abs() / lengths_S, 0.0)
        zero = logps_S.new_zeros(())
        self._sums += torch.stack(
            [
                zero + batch.groups, zero + batch.tokens, zero + batch.tokens_unshared,
                losses_B.double().sum(),
                anchored_S.sum(), (anchored_S * logps_S).sum(), (anchored_S * lengths_S).sum(),
                zero + gap_P.numel(), (gap_P < margin_P).sum().double(), (gap_P > 0).sum().double(),
                rejected_S.sum(), (rejected_S * logps_S).sum(), (rejected_S * lengths_S).sum(),
                has_sampler_logp_S.sum().double(), sampler_gap_S.sum(),
            ]
        )  # fmt: skip

    def reduce(self, signals: StepSignals = NO_SIGNALS) -> dict[str, float]:
        """Add up the sums and the signals of all ranks in one collective; return the sums."""
        own_signals = torch.tensor(astuple(signals), dtype=self._sums.dtype, device=self._sums.device)
        balance_sums = own_signals[:0] if self._balance is None else self._balance.take_sums()
        reduced = torch.cat([self._sums, own_signals, balance_sums])
        dist.all_reduce(reduced)
        values = reduced.tolist()
        first_balance_sum = len(_NAMES) + len(own_signals)
        self.sums = dict(zip(_NAMES, values, strict=False))
        self.signals = StepSignals(*(value > 0 for value in values[len(_NAMES) : first_balance_sum]))
        self._balance_sums = values[first_balance_sum:]
        return self.sums

    def figures(self) -> dict[str, float]:
        """Return means per group, response and pair.

        Log-likelihoods are per sequence, and per token if the name ends in `_per_token`. The
        largest load is the share of the tokens that one expert of a layer gets.
        """
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
        if self._balance_sums:
            loss, *loads = self._balance_sums
            figures["router_aux_loss"] = _ratio(loss, sums["tokens"])
            figures["largest_expert_load"] = _ratio(max(loads), sums["tokens"])
        return figures


def _ratio(value: float, count: float) -> float:
    return value / max(1.0, count)
