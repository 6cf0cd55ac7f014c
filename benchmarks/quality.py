"""Quality of the quickstart's student over three seeds, with intervals over seeds and prompts.

Each seed is an independent run from scratch (models, samples, pairs) in RUNS/seed-<seed>. Stages
that are already complete there are not repeated. Outputs use the main decoding (`sampled`); the
judge is ROUGE-L against the references. `win_rate_vs_seqkd` compares with the control,
sequence-level KD, which computes as many tokens from the same teacher samples in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from plad_dist.evaluation.over_seeds import FinishedRun, over_seeds

CONFIG, SEEDS = "examples/quickstart.yaml", (17, 18, 19)
FIGURES = {
    "win_rate_vs_warmup": "win_rate_vs_warmup",
    "win_rate_vs_seqkd": "win_rate_vs_seqkd",
    "rouge_l_gain": "rouge_l_gain_over_warmup",
    "pair_accuracy_gain": "pair_accuracy_gain",
    "calibration_gain": "calibration_gain",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON object on one line instead of indented")
    parser.add_argument("--runs", default="runs/quality", help="folder that holds the runs")
    arguments = parser.parse_args()
    started = time.monotonic()
    runs = [finished_run(seed, Path(arguments.runs)) for seed in SEEDS]
    intervals = over_seeds(runs)
    figures: dict[str, Any] = {name: intervals[figure].to_json() for name, figure in FIGURES.items()}
    figures |= {"seeds": len(runs), "prompts": len(runs[0].references)}
    figures |= {"minutes": round((time.monotonic() - started) / 60, 1)}
    print(json.dumps({"benchmark": "quality", **figures}, indent=None if arguments.json else 1))


def finished_run(seed: int, folder: Path) -> FinishedRun:
    """Run the quickstart with a seed, or what is missing of it, and return its measurements."""
    run_dir = f"{folder}/seed-{seed}"
    command = [sys.executable, "-c", "from plad_dist.cli import main; main()", "run", CONFIG]
    subprocess.run([*command, f"run.dir={run_dir}", f"run.seed={seed}"], check=True, stdout=sys.stderr)
    return FinishedRun(run_dir)


if __name__ == "__main__":
    main()
