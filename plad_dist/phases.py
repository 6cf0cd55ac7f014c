"""Names of the training phases."""

from __future__ import annotations

from plad_dist.config import Config

TEACHER, WARMUP, SEQKD = "teacher", "warmup", "seqkd"


def round_phase(number: int) -> str:
    """The phase that calibrates the student of a round."""
    return f"round-{number}"


def phase_names(config: Config) -> list[str]:
    """The phases that a config has, in order; rounds may stop before the last."""
    training = config.training
    rounds = [round_phase(number) for number in range(config.rounds.most)]
    first = [
        (TEACHER, training.teacher),
        (WARMUP, training.warmup),
        (rounds[0], training.round),
        (SEQKD, training.seqkd),
    ]
    return [name for name, section in first if section is not None] + rounds[1:]
