"""Gradient of a global step: micro-batches forward and backward, then one update of the weights.

Shape suffixes: `B` groups, `S` responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from plad_dist.config import Loss
from plad_dist.training.batches.micro_batch import MicroBatch
from plad_dist.training.losses import group_losses
from plad_dist.training.worker.step_data import StepData
from plad_dist.training.worker.step_totals import StepTotals


@dataclass(frozen=True)
class GroupLosses:
    """Losses of the groups of one micro-batch of this rank."""

    names: list[str]
    losses_B: torch.Tensor


def update_weights(
    engine: Any,
    data: StepData,
    loss: Loss,
    device: torch.device,
    world: int,
    before_update: Callable[[StepTotals, list[GroupLosses]], None],
) -> StepTotals:
    """Accumulate the gradient of a step on all ranks and update the weights.

    Args:
        world: number of ranks.
        before_update: called on every rank after the last backward pass. It must reduce the totals,
            and may raise an exception on all ranks to keep the weights as they were.
    """
    balance = engine.module.balance
    totals = StepTotals(loss, device, balance)
    losses: list[GroupLosses] = []
    engine.train()
    for number, (micro_batch, names) in enumerate(data.micro_batches):
        is_last = number == len(data.micro_batches) - 1
        engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over ranks; the gradient must be the mean over the groups of all ranks.
        scale = world / max(1, len(data.group_names))
        batch = micro_batch.to(device)
        if balance is not None:
            balance.begin(batch, balance.coefficient * world / max(1, data.tokens))
        losses_B = _backward(engine, batch, loss, scale, totals)
        if balance is not None:
            balance.end()
        if losses_B is not None:
            losses.append(GroupLosses(names, losses_B))
        if is_last:
            before_update(totals, losses)
        engine.step()  # changes the weights after the last micro-batch only
    return totals


def _backward(engine: Any, batch: MicroBatch, loss: Loss, scale: float, totals: StepTotals) -> torch.Tensor | None:
    """Run one micro-batch forward and backward.

    Returns:
        The losses of its groups; None if it is empty, which still takes part in all collectives.
    """
    logps_S = engine(batch)
    if not batch.groups:
        engine.backward(logps_S.sum() * 0.0 * scale)
        return None
    losses_B = group_losses(loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S)
    totals.add(batch, logps_S.detach(), losses_B.detach())
    engine.backward(losses_B.sum() * scale)
    return losses_B.detach()
