"""Detection of divergence: a loss or gradient norm that is not finite, or an exploded loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from plad_dist.training.worker.gradient import GroupLosses
from plad_dist.training.worker.step_totals import StepTotals

_WORST = 3  # groups that are named if the loss exploded
_SHOWN = 10  # names that a message lists


@dataclass(frozen=True)
class Divergence:
    """Reason why a step is not taken.

    Attributes:
        problem: the figure that diverged, in words.
        group_names: groups that are likely causes.
    """

    problem: str
    group_names: list[str]

    def message(self, phase: str, step: int, committed_step: int | None) -> str:
        """Return the message for the user.

        Args:
            step: number of the step that is not taken.
            committed_step: step of the newest checkpoint, or None.
        """
        checkpoint = "no checkpoint yet" if committed_step is None else f"the checkpoint of step {committed_step}"
        names = [f"\n  {name}" for name in self.group_names[:_SHOWN]]
        names += ["\n  ..."] if len(self.group_names) > _SHOWN else []
        return (
            f"phase {phase}: step {step}: {self.problem}. The step was not taken. Kept: {checkpoint}. Lower the "
            f"learning rate, raise mle_weight, or repair the data; then use another run.dir."
            f"{' Groups:' if names else ''}{''.join(names)}"
        )


def find_loss_divergence(
    totals: StepTotals,
    first: Mapping[str, float],
    factor: float,
    losses: Sequence[GroupLosses],
) -> Divergence | None:
    """Return the divergence of a step's loss, on all ranks, or None if the loss is sound.

    Args:
        totals: reduced totals of the step.
        first: figures of the first step.
        factor: `training.divergence_factor`. The loss may reach this multiple of the first loss,
            which counts as at least one nat per chosen token.
        losses: losses of this rank's groups, by micro-batch.
    """
    loss, chosen_tokens = totals.figures()["loss"], totals.sums["chosen_tokens"]
    scale = max(abs(first["loss"]), chosen_tokens / max(1.0, totals.sums["groups"]), 1.0)
    if math.isfinite(loss) and loss <= factor * scale:
        return None
    own = [pair for batch in losses for pair in zip(batch.losses_B.tolist(), batch.names, strict=True)]
    by_rank: list[list[tuple[float, str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, own)
    all_losses = [pair for of_rank in by_rank for pair in of_rank]
    not_finite = [name for value, name in all_losses if not math.isfinite(value)]
    worst = [name for _, name in sorted(all_losses, reverse=True)[:_WORST]]
    return Divergence(f"the loss is {loss:.6g}, at the first step it was {first['loss']:.6g}", not_finite or worst)


def find_gradient_divergence(norm: float, group_names: list[str]) -> Divergence | None:
    """Return the divergence of a step's gradient norm, or None if the norm is finite.

    Args:
        group_names: names of all groups of the step.
    """
    return None if math.isfinite(norm) else Divergence(f"the gradient norm is {norm}", group_names)
