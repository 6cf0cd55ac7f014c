"""Log line at the start of an attempt: parameters, progress, and the balance of experts."""

from __future__ import annotations

from typing import Any

from plad_dist.training.model.experts import is_mixture


def partition_report(engine: Any, *, world: int, step: int, steps: int, groups: int) -> str:
    """Return a line with the ZeRO stage, this rank's share of the parameters, the progress,
    and for a mixture the factor of its auxiliary loss.

    Args:
        step: number of steps taken so far, of `steps`.
        groups: groups of the phase's dataset.
    """
    parameters = list(engine.module.parameters())
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    own = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in parameters)
    progress = f"{'resumes from the checkpoint of ' if step else ''}step {step} of {steps}"
    line = (
        f"zero stage {engine.zero_optimization_stage()} with {world} ranks; {total:,} parameters, this rank holds "
        f"{own:,} ({own / total:.0%}); {progress}; {groups:,} groups"
    )
    balance = engine.module.balance
    if balance is not None:
        line += f"; router_aux_loss {balance.coefficient:g} balances the experts"
    elif is_mixture(engine.module):
        line += "; no auxiliary loss balances the experts (training.router_aux_loss: 0)"
    reason = engine.module.attention.no_sharing_reason
    return f"{line}; responses do not share their prompt: {reason}" if reason else line
