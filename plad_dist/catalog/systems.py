"""Systems that a round compares."""

from __future__ import annotations

from plad_dist import phases
from plad_dist.config import Config
from plad_dist.rundir import RunDir
from plad_dist.systems import PLAD, SEQKD, TEACHER, WARMUP, System


def trained_systems(config: Config, run: RunDir) -> dict[System, str]:
    """Return the systems that a round trains, each with the phase that makes its model."""
    control = {SEQKD: phases.SEQKD} if config.training.seqkd and not run.round else {}
    return control | {PLAD: phases.round_phase(run.round)}


def systems_of(config: Config, run: RunDir) -> list[System]:
    """Return all systems that a round compares, including the students of earlier rounds."""
    control = [SEQKD] if config.training.seqkd else []
    earlier = [System("plad", number) for number in range(run.round)]
    return [TEACHER, WARMUP, *control, *earlier, PLAD]
