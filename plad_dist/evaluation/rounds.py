"""The evaluated rounds of a run: with what they began, which follow, and which is the last."""

from __future__ import annotations

from plad_dist.config import Config
from plad_dist.errors import UserError
from plad_dist.evaluation.document import Metrics, load_metrics
from plad_dist.rundir import RunDir, load_run
from plad_dist.systems import WARMUP, System


def previous_system(run: RunDir) -> System:
    """Return the system with which a round began."""
    return System("plad", run.round - 1) if run.round else WARMUP


def continues_after(config: Config, run: RunDir) -> bool:
    """Return True if the round is evaluated and `rounds.stop` does not end the rounds after it."""
    metrics = load_metrics(run)
    if metrics is None:
        return False
    gain = metrics.gain_of_round
    return config.rounds.stop == "never" or (gain is not None and gain.low > 0.5)


def last_round(config: Config, run: RunDir) -> RunDir:
    """Return the run at the last of its consecutive evaluated rounds, or at the first round."""
    number = 0
    while number + 1 < config.rounds.most and continues_after(config, run.at_round(number)):
        if not run.storage.exists(run.at_round(number + 1).metrics):
            break
        number += 1
    return run.at_round(number)


def evaluated_run(path: str) -> tuple[Config, RunDir, Metrics]:
    """Return the config of a run directory, the run at its last evaluated round, and the figures of
    that round.

    Raises:
        UserError: the path is not a run directory, or the run is not evaluated.
        RunFailed: the figures are damaged.
    """
    config = load_run(path).config
    run = last_round(config, RunDir.at(path))
    metrics = load_metrics(run)
    if metrics is None:
        raise UserError(f"{path}: not evaluated yet; run `plad evaluate` on its config first")
    return config, run, metrics
