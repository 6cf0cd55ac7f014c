"""Systems that a round compares."""

from __future__ import annotations

from plad_dist.config import Config
from plad_dist.phases import SEQKD, TEACHER, WARMUP, round_phase
from plad_dist.rundir import PLAD, RunDir


def trained_systems(config: Config, run: RunDir) -> dict[str, str]:
    """Return the systems that a round trains, each with the phase that makes its model."""
    control = {SEQKD: SEQKD} if config.training.seqkd and not run.round else {}
    return control | {PLAD: round_phase(run.round)}


def systems_of(config: Config, run: RunDir) -> list[str]:
    """Return all systems that a round compares, including the students of earlier rounds."""
    control = [SEQKD] if config.training.seqkd else []
    return [TEACHER, WARMUP, *control, *map(round_phase, range(run.round)), PLAD]
