"""Comparisons of simulated systems whose quality is known."""

from __future__ import annotations

import random
from typing import Any

from plad_dist.evaluation.document import Metrics, SystemRow
from plad_dist.evaluation.metrics import compare
from plad_dist.systems import System
from plad_dist.text_metrics import Output

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0, "t0.5": 0.5}
WORDS = [f"w{i}" for i in range(40)]
REFERENCES: list[str | None] = [" ".join(random.Random(i).choices(WORDS, k=6)) for i in range(150)]


def outputs_right_in(share: float, seed: int, endless: float = 0.0) -> list[Output]:
    """Return responses whose words are right with probability `share`."""
    rng = random.Random(seed)
    texts = [" ".join(w if rng.random() < share else "wrong" for w in str(r).split()) for r in REFERENCES]
    return [Output(text, 6, rng.random() >= endless) for text in texts]


def compare_shares(shares: dict[tuple[str, str], float], **options: Any) -> Metrics:
    """Compare systems, by name and decoding, by their shares of right words."""
    outputs = {
        (System.parse(name), decoding): outputs_right_in(share, seed)
        for seed, ((name, decoding), share) in enumerate(shares.items())
    }
    return compare(outputs, REFERENCES, temperatures=TEMPERATURES, resamples=300, seed=1, **options)


def row_of(metrics: Metrics, name: str, decoding: str) -> SystemRow:
    return metrics.rows_under(decoding)[System.parse(name)]


def sentence(metrics: Metrics, fragment: str) -> str:
    """Return the first sentence of the verdict that contains a fragment."""
    return next(sentence for sentence in metrics.verdict if fragment in sentence)
