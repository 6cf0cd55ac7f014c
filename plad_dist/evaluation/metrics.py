"""Comparison of the systems by references and by judges: builds ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plad_dist.config.evaluation import REFERENCE_JUDGES
from plad_dist.evaluation.document import (
    VERSION,
    Calibration,
    Interval,
    JudgedPair,
    JudgeFigures,
    Metrics,
    Ranking,
    RougeDifferences,
    SystemCalibration,
    SystemRow,
)
from plad_dist.evaluation.scores import Candidates, Judgement, Preferences, SystemScores, score_system
from plad_dist.evaluation.statistics import (
    by_length,
    length_controlled,
    mean_interval,
    rank_correlations,
    reliability,
)
from plad_dist.evaluation.verdict import verdict
from plad_dist.systems import PLAD, SEQKD, TEACHER, WARMUP, System
from plad_dist.text_metrics import Output, Scores, SystemDecoding, main_decoding, wins

_BIASED = 0.1  # distance of a judge's first-position share from one half that counts as biased


def compare(
    outputs: Mapping[SystemDecoding, Sequence[Output]],
    references: Sequence[str | None],
    *,
    temperatures: Mapping[str, float],
    resamples: int,
    seed: int,
    ranking: Ranking | None = None,
    judge: str = "rouge_l",
    judgements: Mapping[str, Judgement] | None = None,
    trained_on: str | None = None,
    previous: System = WARMUP,
    candidates: Candidates | None = None,
    settings: str = "",
) -> Metrics:
    """Compare the systems and return the content of ``metrics.json``.

    Figures that need a reference are None if no prompt has one.

    Args:
        outputs: responses by system and decoding, one per prompt, in the order of `references`.
        temperatures: temperature of every decoding, by name.
        resamples: number of bootstrap resamples.
        ranking: figures of the held-out pairs, as the trainer measured them.
        judge: the judge whose win rates head the figures.
        judgements: judges by name, in addition to the judges by reference.
        trained_on: the judge, if any, whose score decided which pairs were trained on, or how.
        previous: the system with which the round began.
        settings: fingerprint of the evaluation settings.
    """
    if missing := sorted({decoding for _, decoding in outputs} - set(temperatures)):
        raise ValueError(f"compare: no temperature given for the decodings {missing}")
    if not outputs or not references:
        raise ValueError("compare: nothing to compare: no outputs or no prompts")
    scores = {key: score_system(references, outputs[key]) for key in sorted(outputs, key=lambda key: key[0].order)}
    main = main_decoding(scores, temperatures)
    judges = _reference_judgements(scores) | dict(judgements or {})
    comparison = _Comparison(scores, judges, judge, main, resamples, seed)
    pairs = compared_pairs(previous)
    metrics = Metrics(
        version=VERSION,
        prompts=len(references),
        prompts_with_reference=sum(1 for reference in references if reference and reference.strip()),
        main_decoding=main,
        judge=judge,
        systems=tuple(comparison.row(key, temperatures[key[1]]) for key in scores),
        plad_vs_seqkd={d: comparison.rate((PLAD, d), (SEQKD, d)) for d in comparison.shared_decodings(PLAD, SEQKD)},
        gain_of_round=comparison.rate((PLAD, main), (previous, main)),
        previous=previous,
        rouge_l_difference=comparison.rouge_l_differences(temperatures),
        judges={name: comparison.judge_figures(name, pairs) for name in dict.fromkeys((judge, *(judgements or {})))},
        judge_was_trained_on=trained_on == judge,
        ranking=ranking,
        calibration=comparison.calibration(candidates) if candidates is not None else None,
        verdict=(),
        settings=settings,
    )
    return metrics.model_copy(update={"verdict": verdict(metrics)})


def _reference_judgements(scores: Mapping[SystemDecoding, SystemScores]) -> dict[str, Judgement]:
    return {
        name: Judgement("reference", {key: getattr(system_scores, name) for key, system_scores in scores.items()})
        for name in REFERENCE_JUDGES
    }


def compared_pairs(previous: System = WARMUP) -> list[tuple[System, System]]:
    """Return the pairs of systems that judges compare."""
    return [(PLAD, opponent) for opponent in dict.fromkeys((WARMUP, SEQKD, previous, TEACHER))]


@dataclass(frozen=True)
class _Comparison:
    """Scores and judgements of all systems, and the figures that follow from them.

    Attributes:
        judge: name of the main judge.
        main: name of the main decoding.
    """

    scores: Mapping[SystemDecoding, SystemScores]
    judges: Mapping[str, Judgement]
    judge: str
    main: str
    resamples: int
    seed: int

    def shared_decodings(self, a: System, b: System) -> list[str]:
        return [decoding for system, decoding in self.scores if system == a and (b, decoding) in self.scores]

    def interval(self, values_P: Scores) -> Interval | None:
        return mean_interval(values_P, self.resamples, self.seed)

    def required_interval(self, values_P: Scores) -> Interval:
        """Return the interval of values of which at least one is a number."""
        interval = self.interval(values_P)
        assert interval is not None
        return interval

    # -- systems

    def row(self, key: SystemDecoding, temperature: float) -> SystemRow:
        scores, baseline = self.scores[key], self._baseline(key)
        return SystemRow(
            system=key[0],
            decoding=key[1],
            temperature=float(temperature),
            rouge_1=self.interval(scores.rouge_1),
            rouge_2=self.interval(scores.rouge_2),
            rouge_l=self.interval(scores.rouge_l),
            exact_match=self.interval(scores.exact),
            tokens_mean=self.required_interval(scores.tokens),
            no_eos_share=self.required_interval(1.0 - scores.finished),
            repetition=self.required_interval(scores.repetition),
            win_rate_vs_warmup=self.rate(key, baseline) if baseline else None,
        )

    def _baseline(self, key: SystemDecoding) -> SystemDecoding | None:
        """Return the warm-up student under the same decoding.

        Its additional temperatures are compared with the warm-up student under the main decoding.
        """
        system, decoding = key
        is_additional = system == WARMUP and not any(s != WARMUP and d == decoding for s, d in self.scores)
        baseline = (WARMUP, self.main if is_additional else decoding)
        return baseline if baseline in self.scores and baseline != key else None

    def rouge_l_differences(self, temperatures: Mapping[str, float]) -> RougeDifferences:
        """Return the mean differences of ROUGE-L between systems, by decoding."""

        def by_decoding(a: System, b: System) -> dict[str, Interval | None]:
            return {d: self._rouge_l_difference((a, d), (b, d)) for d in self.shared_decodings(a, b)}

        cooler = [d for s, d in self.scores if s == WARMUP and temperatures[d] < temperatures[self.main]]
        has_plad = (PLAD, self.main) in self.scores
        return RougeDifferences(
            plad_minus_warmup=by_decoding(PLAD, WARMUP),
            plad_minus_seqkd=by_decoding(PLAD, SEQKD),
            teacher_minus_warmup=by_decoding(TEACHER, WARMUP),
            plad_minus_cooler_warmup={
                d: self._rouge_l_difference((PLAD, self.main), (WARMUP, d)) for d in cooler if has_plad
            },
        )

    def _rouge_l_difference(self, a: SystemDecoding, b: SystemDecoding) -> Interval | None:
        return self.interval(self.scores[a].rouge_l - self.scores[b].rouge_l)

    # -- judges

    def rate(self, a: SystemDecoding, b: SystemDecoding) -> Interval | None:
        """Return the win rate of a over b by the main judge, or None if it did not compare them."""
        if a not in self.scores or b not in self.scores:
            return None
        wins_P = self._wins(a, b, self.judge)
        return None if wins_P is None else self.interval(wins_P)

    def _wins(self, a: SystemDecoding, b: SystemDecoding, judge: str) -> Scores | None:
        judgement = self.judges[judge]
        if judgement.scores is not None:
            scores = judgement.scores
            return wins(scores[a], scores[b]) if a in scores and b in scores else None
        assert judgement.preferences is not None
        if (a[1], b[1]) != (self.main, self.main):
            return None
        if (a[0], b[0]) in judgement.preferences:
            return judgement.preferences[a[0], b[0]].wins
        reverse = judgement.preferences.get((b[0], a[0]))
        return None if reverse is None else 1.0 - reverse.wins

    def judge_figures(self, name: str, pairs: Sequence[tuple[System, System]]) -> JudgeFigures:
        """Return the verdicts of a judge on pairs of systems under the main decoding."""
        judgement = self.judges[name]
        comparisons = tuple(row for a, b in pairs if (row := self._judged_pair(name, a, b)) is not None)
        preferences = judgement.preferences or {}
        first_shares = [_first_position_share(preferences[pair]) for pair in pairs if pair in preferences]
        first_position = self.interval(np.concatenate(first_shares)) if first_shares else None
        is_biased = (
            first_position is not None
            and abs(first_position.value - 0.5) > _BIASED
            and not first_position.low <= 0.5 <= first_position.high
        )
        return JudgeFigures(
            kind=judgement.kind, comparisons=comparisons, first_position=first_position, biased=is_biased
        )

    def _judged_pair(self, name: str, a: System, b: System) -> JudgedPair | None:
        keys = (a, self.main), (b, self.main)
        wins_P = self._wins(*keys, name) if all(key in self.scores for key in keys) else None
        if wins_P is None or np.isnan(wins_P).all():
            return None
        decided_P = ~np.isnan(wins_P)
        lengths_a, lengths_b = (self.scores[key].characters[decided_P] for key in keys)
        preferences = (self.judges[name].preferences or {}).get((a, b))
        without_verdict = disagreement = None
        if preferences is not None:
            is_opposite_P = np.abs(preferences.a_first[decided_P] - preferences.a_second[decided_P]) == 1.0
            without_verdict = preferences.prompts_asked - int(decided_P.sum())
            disagreement = float(is_opposite_P.mean())
        return JudgedPair(
            a=a,
            b=b,
            decoding=self.main,
            prompts=int(decided_P.sum()),
            win_rate=self.required_interval(wins_P),
            ties=float((wins_P[decided_P] == 0.5).mean()),
            length_controlled=length_controlled(wins_P[decided_P], lengths_a, lengths_b),
            by_length=by_length(wins_P[decided_P], lengths_a, lengths_b, self.resamples, self.seed),
            without_verdict=without_verdict,
            disagreement=disagreement,
        )

    # -- calibration

    def calibration(self, candidates: Candidates) -> Calibration:
        """Return how well each system's likelihoods rank the candidates.

        The likelihoods of whole responses are what the loss uses; the mean per token is shown
        beside them.
        """
        quality_PK = candidates.quality_PK
        correlations = {system: rank_correlations(logps, quality_PK) for system, logps in candidates.logps.items()}
        return Calibration(
            judge=candidates.judge,
            candidates=int(quality_PK.shape[1]),
            systems={
                system: SystemCalibration(
                    rank_correlation=self.interval(correlations[system]),
                    rank_correlation_per_token=self.interval(
                        rank_correlations(logps_PK / candidates.tokens_PK, quality_PK)
                    ),
                    reliability=reliability(logps_PK, quality_PK),
                )
                for system, logps_PK in candidates.logps.items()
            },
            rank_correlation_difference={
                f"{a}_minus_{b}": self.interval(correlations[a] - correlations[b])
                for a, b in ((PLAD, WARMUP), (PLAD, SEQKD))
                if a in correlations and b in correlations
            },
        )


def _first_position_share(preferences: Preferences) -> Scores:
    """Return the share of decided verdicts for the response shown first, per prompt; else NaN."""
    verdicts = np.stack([preferences.a_first, 1.0 - preferences.a_second])
    decided = ~np.isnan(verdicts) & (verdicts != 0.5)
    count_P = decided.sum(0)
    share_P = np.where(decided, verdicts, 0.0).sum(0) / np.maximum(count_P, 1)
    return np.where(count_P > 0, share_P, np.nan)
