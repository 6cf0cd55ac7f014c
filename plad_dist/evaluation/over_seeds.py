"""Runs that differ in their seed, taken together: figures whose intervals cover the seed too.

The intervals resample the seeds, then the held-out prompts of each (pairs: two binomial shares). Few seeds make them wide, as they should be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from plad_dist.config_file import parse_config
from plad_dist.errors import UserError
from plad_dist.evaluation.metrics import score_system
from plad_dist.evaluation.report import with_interval
from plad_dist.evaluation.stage import candidates_of, evaluated_prompts, last_round, outputs_of, systems_of
from plad_dist.evaluation.statistics import Interval, Scores, rank_correlations, wins
from plad_dist.phases import SEQKD, WARMUP
from plad_dist.rundir import PLAD, RUN_FILE, RunDir, load_run

RESAMPLES = 4000

Draw = Callable[
    [np.random.Generator | None], float
]  # a figure of one run, of resampled prompts where there is a generator


class Finished:
    """What a finished run has measured, one value a held-out prompt.

    Args:
        control: the run whose sequence-level KD stands beside this one, which has none; of the same seed.

    Raises:
        UserError: the run is not evaluated, or the control's prompts are others.
    """

    def __init__(self, path: str, control: Finished | None = None) -> None:
        config = parse_config(load_run(path)["config"], f"{path}/{RUN_FILE}")
        run = last_round(config, RunDir.at(path))
        metrics = run.storage.read_json(run.metrics)
        if metrics is None:
            raise UserError(f"{path}: not evaluated yet; run `plad evaluate` on its config first")
        prompts = evaluated_prompts(config, run)
        self.references = prompts["reference"].to_pylist()
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
        if control is not None:
            if control.references != self.references:
                raise UserError(f"{path}: its held-out prompts are not those of the run that it is compared with")
            theirs = {
                key: scores
                for key, scores in control.scores.items()
                if key[0] == SEQKD and (PLAD, key[1]) in self.scores
            }
            self.scores = theirs | self.scores
        self.ranking = metrics.get("ranking")
        self.correlation_gain: Scores | None = None
        if (candidates := candidates_of(config, run, self.references)) is not None:
            before, after = (
                rank_correlations(candidates.logps[name], candidates.quality_PK) for name in (WARMUP, PLAD)
            )
            self.correlation_gain = after - before

    def draws(self) -> dict[str, Draw]:
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
        known = {
            name: values[~np.isnan(values)] for name, values in values_P.items()
        }  # NaN: a prompt without reference
        found = {name: _of_prompts(values) for name, values in known.items() if values.size}
        return found | ({} if self.ranking is None else {"pair_accuracy_gain": _of_pairs(self.ranking)})


def over_seeds(runs: Sequence[Finished]) -> dict[str, Interval]:
    """The figures that all runs have: means over seeds, with 95% intervals over seeds and prompts."""
    draws = [run.draws() for run in runs]
    return {name: _interval([each[name] for each in draws]) for name in draws[0] if all(name in each for each in draws)}


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
    """The variants for the terminal; percentages, 95% intervals over seeds and prompts in brackets."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"PLaD over {rows[0]['seeds']} seeds; 95% intervals over seeds and prompts"
    columns = {
        "rouge_l_plad": "ROUGE-L", "win_rate_vs_warmup": "win vs warm-up", "win_rate_vs_seqkd": "win vs seqkd",
        "greedy_win_rate_vs_seqkd": "greedy:\nwin vs seqkd", "pair_accuracy_gain": "pairs ranked\nright, gain",
        "calibration_gain": "rank corr.,\ngain",
    }  # fmt: skip
    table.add_column("variant")
    for header in columns.values():
        table.add_column(Text(header), justify="right")
    for row in rows:
        table.add_row(Text(row["variant"]), *(Text(with_interval(row.get(key))) for key in columns))
    return table


def _of_prompts(values_P: Scores) -> Draw:
    def draw(rng: np.random.Generator | None) -> float:
        return float(values_P.mean() if rng is None else values_P[rng.integers(0, values_P.size, values_P.size)].mean())

    return draw


def _of_pairs(ranking: Any) -> Draw:
    shares, pairs = [ranking[name]["pair_accuracy"] for name in ("after", "before")], ranking["pairs"]

    def draw(rng: np.random.Generator | None) -> float:
        after, before = shares if rng is None else [rng.binomial(pairs, share) / pairs for share in shares]
        return float(after - before)

    return draw


def _interval(draws: list[Draw]) -> Interval:
    rng = np.random.default_rng(0)
    resampled = [
        np.mean([draws[index](rng) for index in rng.integers(0, len(draws), len(draws))]) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(np.mean([draw(None) for draw in draws])), float(low), float(high))
