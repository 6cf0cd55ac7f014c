"""Does it work? The quickstart with three seeds: how much better its student is, with intervals over seeds and prompts.

Every seed is a run of its own from nothing (models, samples, pairs), in RUNS/seed-<seed>; what is there already is not made again.
Decoding is the main one (`sampled`), the judge ROUGE-L against the references. `win_rate_vs_seqkd` is against sequence-level KD that
computed as many tokens from the same teacher's samples: the peer, measured in the same run. Intervals resample seeds, then the held-out
prompts of each (pairs: two binomial shares): three seeds are few, so they are wide.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from plad_dist.config_file import load_config
from plad_dist.evaluation.metrics import score_system
from plad_dist.evaluation.stage import candidates_of, evaluated_prompts, outputs_of
from plad_dist.evaluation.statistics import Scores, rank_correlations, wins
from plad_dist.rundir import RunDir

CONFIG, SEEDS, RESAMPLES = "examples/quickstart.yaml", (17, 18, 19), 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--runs", default="runs/quality", help="folder of the runs")
    arguments = parser.parse_args()
    started = time.monotonic()
    runs = [_finished(seed, Path(arguments.runs)) for seed in SEEDS]
    figures: dict[str, Any] = {name: _interval([draw(run) for run in runs]) for name, draw in _FIGURES.items()}
    figures |= {"seeds": len(runs), "prompts": runs[0].prompts, "minutes": round((time.monotonic() - started) / 60, 1)}
    print(json.dumps({"benchmark": "quality", **figures}, indent=None if arguments.json else 1))


class Finished:
    """What a finished run has measured."""

    def __init__(self, overrides: list[str]) -> None:
        config = load_config(CONFIG, overrides)
        run = RunDir.of(config)
        metrics = run.storage.read_json(run.metrics)
        assert metrics is not None
        references = evaluated_prompts(config, run)["reference"].to_pylist()
        self.rouge_l = {
            system: score_system(references, outputs_of(run, system, metrics["main_decoding"])).rouge_l
            for system in ("warmup", "seqkd", "plad")
        }
        self.prompts, self.ranking = len(references), metrics["ranking"]
        candidates = candidates_of(config, run, references)
        assert candidates is not None
        before, after = (
            rank_correlations(candidates.logps[name], candidates.quality_PK) for name in ("warmup", "plad")
        )
        self.correlation_gain = (after - before)[~np.isnan(after - before)]


def _finished(seed: int, folder: Path) -> Finished:
    overrides = [f"run.dir={folder}/seed-{seed}", f"run.seed={seed}"]
    command = [sys.executable, "-c", "from plad_dist.cli import main; main()", "run", CONFIG, *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return Finished(overrides)


Draw = Callable[
    [np.random.Generator | None], float
]  # a figure of one run, of resampled prompts where there is a generator


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


_FIGURES: dict[str, Callable[[Finished], Draw]] = {
    "win_rate_vs_warmup": lambda run: _of_prompts(wins(run.rouge_l["plad"], run.rouge_l["warmup"])),
    "win_rate_vs_seqkd": lambda run: _of_prompts(wins(run.rouge_l["plad"], run.rouge_l["seqkd"])),
    "rouge_l_gain": lambda run: _of_prompts(run.rouge_l["plad"] - run.rouge_l["warmup"]),
    "pair_accuracy_gain": lambda run: _of_pairs(run.ranking),
    "calibration_gain": lambda run: _of_prompts(run.correlation_gain),
}


def _interval(draws: list[Draw]) -> dict[str, float]:
    rng = np.random.default_rng(0)
    resampled = [
        np.mean([draws[index](rng) for index in rng.integers(0, len(draws), len(draws))]) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(np.mean([draw(None) for draw in draws])), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
