"""Names of the training phases."""

from __future__ import annotations

from plad_dist.config import Config
from plad_dist.rundir import ROUND

TEACHER, WARMUP, ROUND_PHASE, SEQKD = "teacher", "warmup", f"round-{ROUND}", "seqkd"


def phase_names(config: Config) -> list[str]:
    """The phases that a config has, in order."""
    training = config.training
    sections = [
        (TEACHER, training.teacher),
        (WARMUP, training.warmup),
        (ROUND_PHASE, training.round),
        (SEQKD, training.seqkd),
    ]
    return [name for name, section in sections if section is not None]
