"""Names of the training phases."""

from __future__ import annotations

from plad_dist.config import Config, Phase

TEACHER, WARMUP, SEQKD = "teacher", "warmup", "seqkd"


def round_phase(number: int) -> str:
    """Return the name of the phase that calibrates the student of a round."""
    return f"round-{number}"


def phases_of(config: Config) -> dict[str, Phase]:
    """Return the settings of a config's phases by name, in the order of training.

    A run with several rounds may stop before the last one.
    """
    training = config.training
    rounds = [round_phase(number) for number in range(config.rounds.most)]
    phases = {TEACHER: training.teacher, WARMUP: training.warmup, rounds[0]: training.round, SEQKD: training.seqkd}
    phases |= dict.fromkeys(rounds[1:], training.round)
    return {name: phase for name, phase in phases.items() if phase is not None}


def phase_names(config: Config) -> list[str]:
    """Return the names of a config's phases, in the order of training."""
    return list(phases_of(config))
