"""Figures of a study over several seeds, with 95% intervals that cover the seed too.

The half width of an interval is the root of two squared half widths: that of the seeds, by
Student's t over the means of the runs (wide for two or three seeds), and that of the held-out
prompts, which the runs share: 1.96 standard errors, clustered by prompt (Cameron and Miller 2015).
The spread between seeds contains some of the noise of the prompts already, so the interval is
rather too wide than too narrow. For a single run, only the prompts count.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plad_dist.catalog import systems_of
from plad_dist.data.conversation import COLUMNS
from plad_dist.errors import UserError
from plad_dist.evaluation.document import Interval, Ranking
from plad_dist.evaluation.heldout import candidates_of, evaluated_prompts, outputs_of
from plad_dist.evaluation.rounds import evaluated_run
from plad_dist.evaluation.scores import score_system
from plad_dist.evaluation.statistics import rank_correlations
from plad_dist.systems import PLAD, SEQKD, WARMUP
from plad_dist.text_metrics import Scores, wins

_NORMAL = 1.959964  # 97.5% quantile of the standard normal distribution
# 97.5% quantiles of Student's t distribution with 1, 2, ... degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class RunFigure:
    """A figure of one run.

    Attributes:
        errors: contribution of each prompt to the deviation of the mean from its value over all
            possible prompts.
        variance: variance of the mean from sources that no other run shares.
    """

    mean: float
    errors: dict[str, float] = field(default_factory=dict)
    variance: float = 0.0


class FinishedRun:
    """Measurements of a finished run, one value per held-out prompt.

    Args:
        control: run of the same seed whose sequence-level KD stands in if this run has none.

    Raises:
        UserError: the run is not evaluated, or the control has other prompts.
    """

    def __init__(self, path: str, control: FinishedRun | None = None) -> None:
        config, run, metrics = evaluated_run(path)
        prompts = evaluated_prompts(config, run)
        self.references = prompts["reference"].to_pylist()
        self.prompts = [json.dumps(row, sort_keys=True) for row in prompts.select(COLUMNS).to_pylist()]
        main = metrics.main_decoding
        decodings = {"": main} | ({"greedy_": "greedy"} if main != "greedy" else {})
        self.scores = {
            (system, prefix): score_system(self.references, outputs_of(run, system, decoding))
            for system in (WARMUP, SEQKD, PLAD)
            if system in systems_of(config, run)
            for prefix, decoding in decodings.items()
            if decoding in config.system_decodings(system)
        }
        if control is not None:
            self._borrow_control(path, control)
        self.ranking = metrics.ranking
        self.correlation_gain: Scores | None = None
        if (candidates := candidates_of(config, run, self.references)) is not None:
            before, after = (
                rank_correlations(candidates.logps[system], candidates.quality_PK) for system in (WARMUP, PLAD)
            )
            self.correlation_gain = after - before

    def _borrow_control(self, path: str, control: FinishedRun) -> None:
        borrowed = {
            key: scores
            for key, scores in control.scores.items()
            if key[0] == SEQKD and key not in self.scores and (PLAD, key[1]) in self.scores
        }
        if borrowed and (control.prompts, control.references) != (self.prompts, self.references):
            raise UserError(
                f"{path}: its held-out prompts differ from those of the run whose sequence-level KD it is compared "
                "with; give all variants the same prompts"
            )
        self.scores |= borrowed

    def figures(self) -> dict[str, RunFigure]:
        """Return the figures by name, as far as the run has them.

        They belong to the main decoding, or with the prefix `greedy_` to greedy decoding.
        """
        values_P: dict[str, Scores] = {}
        for (system, prefix), scores in self.scores.items():
            values_P[f"{prefix}rouge_l_{system}"] = scores.rouge_l
            values_P[f"{prefix}no_eos_share_{system}"] = 1.0 - scores.finished
            if system != PLAD:
                plad = self.scores[PLAD, prefix]
                values_P[f"{prefix}win_rate_vs_{system}"] = wins(plad.rouge_l, scores.rouge_l)
                values_P[f"{prefix}rouge_l_gain_over_{system}"] = plad.rouge_l - scores.rouge_l
        if self.correlation_gain is not None:
            values_P["calibration_gain"] = self.correlation_gain
        figures = {name: self._over_prompts(values) for name, values in values_P.items() if not np.isnan(values).all()}
        gain = None if self.ranking is None else _over_pairs(self.ranking)
        return figures | ({} if gain is None else {"pair_accuracy_gain": gain})

    def _over_prompts(self, values_P: Scores) -> RunFigure:
        """Return the mean of values that are NaN for prompts without one, such as a reference."""
        mean, count = float(np.nanmean(values_P)), np.count_nonzero(~np.isnan(values_P))
        errors: dict[str, float] = defaultdict(float)
        for prompt, value in zip(self.prompts, values_P, strict=True):
            errors[prompt] += 0.0 if np.isnan(value) else float(value - mean) / count
        return RunFigure(mean, errors)


def _over_pairs(ranking: Ranking) -> RunFigure | None:
    """Return the gain in pair accuracy, or None if it was not measured before and after.

    The errors of the two shares are taken to be independent, although they are shares of the same
    pairs.
    """
    if ranking.before is None or ranking.after is None:
        return None
    after, before = ranking.after.pair_accuracy, ranking.before.pair_accuracy
    variance = sum(accuracy * (1 - accuracy) for accuracy in (after, before)) / ranking.pairs
    return RunFigure(after - before, variance=variance)


def over_seeds(runs: Sequence[FinishedRun]) -> dict[str, Interval]:
    """Return the means over the seeds of the figures that all runs have."""
    by_run = [run.figures() for run in runs]
    common = [name for name in by_run[0] if all(name in figures for figures in by_run)]
    return {name: _interval([figures[name] for figures in by_run]) for name in common}


def _interval(figures: Sequence[RunFigure]) -> Interval:
    count, means = len(figures), np.array([figure.mean for figure in figures])
    errors: dict[str, float] = defaultdict(float)
    for figure in figures:
        for prompt, error in figure.errors.items():
            errors[prompt] += error / count
    variance = sum(error**2 for error in errors.values()) + sum(figure.variance for figure in figures) / count**2
    seeds_half = _student_quantile(count - 1) * float(means.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    half, mean = math.hypot(seeds_half, _NORMAL * math.sqrt(variance)), float(means.mean())
    return Interval(value=mean, low=mean - half, high=mean + half)


def _student_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t.

    Beyond the table it follows the expansion of Fisher and Cornish, which is right to three places.
    """
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


@dataclass(frozen=True)
class VariantFigures:
    """Figures of one variant of a study over its seeds: an entry of ``study.json``."""

    variant: str
    seeds: int
    figures: Mapping[str, Interval]

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        figures = {name: interval.to_json() for name, interval in self.figures.items()}
        return {"variant": self.variant, "seeds": self.seeds} | figures


def study_over_seeds(seeds: Sequence[Mapping[str, str]]) -> list[VariantFigures]:
    """Return the figures of every variant of a study over its seeds.

    A variant without a control is compared with the control of the first variant of the same seed.

    Args:
        seeds: run directories by variant, for each seed; the same variants for every seed.
    """
    runs: dict[str, list[FinishedRun]] = {}
    for folders in seeds:
        first: FinishedRun | None = None
        for variant, folder in folders.items():
            run = FinishedRun(folder, first)
            first = first or run
            runs.setdefault(variant, []).append(run)
    return [VariantFigures(variant, len(of_variant), over_seeds(of_variant)) for variant, of_variant in runs.items()]
