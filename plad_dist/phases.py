"""Names of the training phases."""

from __future__ import annotations

from plad_dist.config import Config
from plad_dist.rundir import ROUND


def phase_names(config: Config) -> list[str]:
    """The phases that a config has, in order."""
    training = config.training
    optional = [("teacher", training.teacher), ("warmup", training.warmup)]
    names = [name for name, phase in optional if phase is not None] + [f"round-{ROUND}"]
    return names + (["seqkd"] if training.seqkd is not None else [])
