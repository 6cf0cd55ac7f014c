"""Runs that differ in their seed, taken together: figures whose 95% intervals cover the seed too.

An interval's half width is the root of two squared ones: of the seeds, by Student's t over the runs' means (two or three seeds make it
wide), and of the held-out prompts, which the runs share: 1.96 standard errors, clustered by prompt (Cameron and Miller 2015). The spread
between seeds holds some of the prompts' noise already, so it is rather too wide than too narrow. Of one run it is the prompts' alone.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from plad_dist.catalog.systems import systems_of
from plad_dist.errors import UserError
from plad_dist.evaluation.metrics import score_system
from plad_dist.evaluation.report import with_interval
from plad_dist.evaluation.stage import candidates_of, evaluated_prompts, evaluated_run, outputs_of
from plad_dist.evaluation.statistics import Interval, rank_correlations
from plad_dist.phases import SEQKD, WARMUP
from plad_dist.rundir import PLAD
from plad_dist.text_metrics import Scores, wins

_NORMAL = 1.959964  # 97.5% of the standard normal
# 97.5% of Student's t with 1, 2, ... degrees
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Figure:
    """A figure of one run.

    Attributes:
        errors: by prompt, what it adds to the mean's deviation from what all prompts would give.
        variance: of the mean, by what no other run shares.
    """

    mean: float
    errors: dict[str, float] = field(default_factory=dict)
    variance: float = 0.0


class Finished:
    """What a finished run has measured, one value a held-out prompt.

    Args:
        control: the run whose sequence-level KD stands beside this one, which has none; of the same seed.

    Raises:
        UserError: the run is not evaluated, or the control's prompts are others.
    """

    def __init__(self, path: str, control: Finished | None = None) -> None:
        config, run, metrics = evaluated_run(path)
        prompts = evaluated_prompts(config, run)
        self.references = prompts["reference"].to_pylist()
        self.prompts = [json.dumps(messages, sort_keys=True) for messages in prompts["messages"].to_pylist()]
        decodings = {"": metrics["main_decoding"]} | (
            {"greedy_": "greedy"} if metrics["main_decoding"] != "greedy" else {}
        )
        self.scores = {
            (system, prefix): score_system(self.references, outputs_of(run, system, decoding))
            for system in (WARMUP, SEQKD, PLAD)
            if system in systems_of(config, run)
            for prefix, decoding in decodings.items()
            if decoding in config.system_decodings(system)
        }
        borrowed = {
            key: scores
            for key, scores in ({} if control is None else control.scores).items()
            if key[0] == SEQKD and key not in self.scores and (PLAD, key[1]) in self.scores
        }
        if (
            control is not None
            and borrowed
            and (control.prompts, control.references) != (self.prompts, self.references)
        ):
            raise UserError(
                f"{path}: its held-out prompts are not those of the run whose sequence-level KD stands beside it"
            )
        self.scores |= borrowed
        self.ranking = metrics.get("ranking")
        self.correlation_gain: Scores | None = None
        if (candidates := candidates_of(config, run, self.references)) is not None:
            before, after = (
                rank_correlations(candidates.logps[name], candidates.quality_PK) for name in (WARMUP, PLAD)
            )
            self.correlation_gain = after - before

    def figures(self) -> dict[str, Figure]:
        """Figures by name, those that the run has: of the main decoding, and of greedy outputs with the prefix `greedy_`."""
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
        found = {name: self._over_prompts(values) for name, values in values_P.items() if not np.isnan(values).all()}
        return found | ({} if self.ranking is None else {"pair_accuracy_gain": _over_pairs(self.ranking)})

    def _over_prompts(self, values_P: Scores) -> Figure:
        """NaN: a prompt that has no value, such as one without reference."""
        mean, count = float(np.nanmean(values_P)), np.count_nonzero(~np.isnan(values_P))
        errors: dict[str, float] = defaultdict(float)
        for prompt, value in zip(self.prompts, values_P, strict=True):
            errors[prompt] += 0.0 if np.isnan(value) else float(value - mean) / count
        return Figure(mean, errors)


def _over_pairs(ranking: Any) -> Figure:
    """Of two shares of the same pairs, whose errors are taken to be independent, as if they were of different ones."""
    after, before = (ranking[name]["pair_accuracy"] for name in ("after", "before"))
    return Figure(after - before, variance=sum(share * (1 - share) for share in (after, before)) / ranking["pairs"])


def over_seeds(runs: Sequence[Finished]) -> dict[str, Interval]:
    """The figures that all runs have: means over the seeds."""
    figures = [run.figures() for run in runs]
    common = [name for name in figures[0] if all(name in each for each in figures)]
    return {name: _interval([each[name] for each in figures]) for name in common}


def _interval(figures: Sequence[Figure]) -> Interval:
    count, means = len(figures), np.array([figure.mean for figure in figures])
    errors: dict[str, float] = defaultdict(float)
    for figure in figures:
        for prompt, error in figure.errors.items():
            errors[prompt] += error / count
    variance = sum(error**2 for error in errors.values()) + sum(figure.variance for figure in figures) / count**2
    of_seeds = _student(count - 1) * float(means.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    half, mean = math.hypot(of_seeds, _NORMAL * math.sqrt(variance)), float(means.mean())
    return Interval(mean, mean - half, mean + half)


def _student(degrees: int) -> float:
    """97.5% of Student's t; beyond the table by Fisher and Cornish's expansion, right to three places."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def study_over_seeds(seeds: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The variants of a study, each over its seeds. The control of a variant without one is the first variant's, of the same seed.

    Args:
        seeds: run directories by variant, the same variants for every seed.
    """
    runs: dict[str, list[Finished]] = {}
    for folders in seeds:
        first: Finished | None = None
        for variant, folder in folders.items():
            run = Finished(folder, first)
            first = first or run
            runs.setdefault(variant, []).append(run)
    return [
        {"variant": variant, "seeds": len(runs[variant])}
        | {name: interval.to_json() for name, interval in over_seeds(runs[variant]).items()}
        for variant in runs
    ]


def seeds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The variants for the terminal: percentages, but for correlations; 95% intervals over seeds and prompts in brackets."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"PLaD over {rows[0]['seeds']} seeds; 95% intervals over seeds and prompts"
    columns = {
        "rouge_l_plad": "ROUGE-L", "win_rate_vs_warmup": "win vs warm-up", "win_rate_vs_seqkd": "win vs seqkd",
        "greedy_win_rate_vs_seqkd": "greedy:\nwin vs seqkd", "pair_accuracy_gain": "pairs ranked\nright, gain",
    }  # fmt: skip
    table.add_column("variant")
    for header in [*columns.values(), "rank\ncorrelation, gain"]:
        table.add_column(Text(header), justify="right")
    for row in rows:
        gain = row.get("calibration_gain")
        correlation = "–" if gain is None else f"{gain['value']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
        table.add_row(Text(row["variant"]), *(Text(with_interval(row.get(key))) for key in columns), Text(correlation))
    return table
