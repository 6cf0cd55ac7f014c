"""Inputs of the comparison: scores of responses, verdicts of judges, and candidates.

Arrays with the suffix ``_P`` hold one value per prompt, ``_PK`` one per candidate of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plad_dist.systems import System
from plad_dist.text_metrics import Output, Scores, SystemDecoding, exact_match, repetition, rouge_l, rouge_n


@dataclass(frozen=True)
class SystemScores:
    """Scores of one system under one decoding, one value per prompt.

    Scores against the reference are NaN for prompts without a reference.
    """

    rouge_1: Scores
    rouge_2: Scores
    rouge_l: Scores
    exact: Scores
    tokens: Scores
    characters: Scores
    finished: Scores
    repetition: Scores


@dataclass(frozen=True)
class Preferences:
    """Verdicts on systems a and b, prompt by prompt, of a judge that reads two responses.

    Attributes:
        a_first, a_second: 1 if the judge preferred a, 0 if it preferred b, 0.5 for a tie, NaN if it
            was not asked or its verdict could not be read; with the response of a shown first, and
            second.
        prompts_asked: number of prompts that the judge was asked about: the first ones.
    """

    a_first: Scores
    a_second: Scores
    prompts_asked: int

    @property
    def wins(self) -> Scores:
        """Wins of a over both orders: opposite verdicts make a tie.

        NaN if one order has no verdict.
        """
        return (self.a_first + self.a_second) / 2.0


@dataclass(frozen=True)
class Judgement:
    """Verdicts of one judge: scores of single responses, or preferences under the main decoding."""

    kind: str
    scores: Mapping[SystemDecoding, Scores] | None = None
    preferences: Mapping[tuple[System, System], Preferences] | None = None


@dataclass(frozen=True)
class Candidates:
    """Several responses to each prompt, their quality, and their log-likelihoods under each system.

    Attributes:
        judge: metric that measures `quality_PK`.
        tokens_PK: lengths, including the end-of-sequence token.
        logps: log-likelihoods by system, `[prompts, candidates]`.
    """

    judge: str
    quality_PK: Scores
    tokens_PK: Scores
    logps: Mapping[System, Scores]


def score_system(references: Sequence[str | None], outputs: Sequence[Output]) -> SystemScores:
    """Score the responses of one system, prompt by prompt. A blank reference counts as none."""
    if len(references) != len(outputs):
        raise ValueError(f"score_system: {len(references)} references but {len(outputs)} outputs; one per prompt")
    usable = [reference if reference and reference.strip() else None for reference in references]

    def against_reference(score: Callable[[str, str], float]) -> Scores:
        scores = [
            np.nan if reference is None else score(reference, output.text)
            for reference, output in zip(usable, outputs, strict=True)
        ]
        return np.array(scores, dtype=np.float64)

    return SystemScores(
        rouge_1=against_reference(lambda reference, text: rouge_n(reference, text, 1)),
        rouge_2=against_reference(lambda reference, text: rouge_n(reference, text, 2)),
        rouge_l=against_reference(rouge_l),
        exact=against_reference(exact_match),
        tokens=np.array([output.num_tokens for output in outputs], dtype=np.float64),
        characters=np.array([len(output.text) for output in outputs], dtype=np.float64),
        finished=np.array([output.finished for output in outputs], dtype=np.float64),
        repetition=np.array([repetition(output.text) for output in outputs], dtype=np.float64),
    )
