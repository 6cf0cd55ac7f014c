"""Names of the training phases."""

from __future__ import annotations

from plad_dist.config import Config, Phase

TEACHER, WARMUP, SEQKD = "teacher", "warmup", "seqkd"


def round_phase(number: int) -> str:
    """The phase that calibrates the student of a round."""
    return f"round-{number}"


def phases_of(config: Config) -> dict[str, Phase]:
    """The phases that a config has with their settings, in order; rounds may stop before the last."""
    training = config.training
    rounds = [round_phase(number) for number in range(config.rounds.most)]
    found = {TEACHER: training.teacher, WARMUP: training.warmup, rounds[0]: training.round, SEQKD: training.seqkd}
    found |= dict.fromkeys(rounds[1:], training.round)
    return {name: phase for name, phase in found.items() if phase is not None}


def phase_names(config: Config) -> list[str]:
    """Names of the phases that a config has, in order."""
    return list(phases_of(config))
