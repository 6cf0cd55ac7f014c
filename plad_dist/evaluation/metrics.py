"""How good the systems' outputs are, by references and by judges, with 95% intervals: the content of metrics.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plad_dist.config.evaluation import REFERENCE_JUDGES
from plad_dist.evaluation.statistics import bootstrap_mean, by_length, length_controlled, rank_correlations, reliability
from plad_dist.evaluation.verdict import verdict
from plad_dist.text_metrics import Key, Output, Scores, exact_match, main_decoding, repetition, rouge_l, rouge_n, wins

IntervalJson = dict[str, float]

FIRST, LAST = ("teacher", "warmup", "seqkd"), "plad"  # the order in which systems are shown; rounds in between
_BIASED = 0.1  # how far from one half a judge may prefer a position


@dataclass(frozen=True)
class SystemScores:
    """One system under one decoding, a value for each prompt. Those by the reference are NaN without one."""

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
    """What a judge that reads two responses said of systems a and b, prompt by prompt.

    Attributes:
        a_first, a_second: 1 where it preferred a, 0 where b, 0.5 for a tie, NaN where it gave no verdict that could be read or was not
            asked; with a's response shown first, and second.
        asked: prompts, the first ones.
    """

    a_first: Scores
    a_second: Scores
    asked: int

    @property
    def wins(self) -> Scores:
        """Of a, over both orders: a judge that contradicts itself has given a tie. NaN where one order has no verdict."""
        return (self.a_first + self.a_second) / 2.0


@dataclass(frozen=True)
class Judgement:
    """What one judge said: `scores` of single responses, or `preferences` between two systems under the main decoding."""

    kind: str
    scores: Mapping[Key, Scores] | None = None
    preferences: Mapping[tuple[str, str], Preferences] | None = None


@dataclass(frozen=True)
class Candidates:
    """Several responses to each prompt, their quality, and how likely each system finds them.

    Attributes:
        judge: what `quality_PK` is by.
        tokens_PK: lengths, the end-of-sequence token included.
        logps: by system, `[prompts, candidates]`.
    """

    judge: str
    quality_PK: Scores
    tokens_PK: Scores
    logps: Mapping[str, Scores]


def score_system(references: Sequence[str | None], outputs: Sequence[Output]) -> SystemScores:
    """Score the outputs of one system, prompt by prompt. A blank reference counts as none."""
    if len(references) != len(outputs):
        raise ValueError(f"score_system: {len(references)} references but {len(outputs)} outputs; one per prompt")
    paired = [(r if r and r.strip() else None, o.text) for r, o in zip(references, outputs, strict=True)]

    def by_reference(score: Any) -> Scores:
        return np.array([np.nan if r is None else score(r, text) for r, text in paired], dtype=np.float64)

    return SystemScores(
        rouge_1=by_reference(lambda r, text: rouge_n(r, text, 1)),
        rouge_2=by_reference(lambda r, text: rouge_n(r, text, 2)),
        rouge_l=by_reference(rouge_l),
        exact=by_reference(exact_match),
        tokens=np.array([o.num_tokens for o in outputs], dtype=np.float64),
        characters=np.array([len(o.text) for o in outputs], dtype=np.float64),
        finished=np.array([o.finished for o in outputs], dtype=np.float64),
        repetition=np.array([repetition(o.text) for o in outputs], dtype=np.float64),
    )


def compare(
    outputs: Mapping[Key, Sequence[Output]],
    references: Sequence[str | None],
    *,
    temperatures: Mapping[str, float],
    resamples: int,
    seed: int,
    ranking: Mapping[str, Any] | None = None,
    judge: str = "rouge_l",
    judgements: Mapping[str, Judgement] | None = None,
    trained_on: str | None = None,
    previous: str = "warmup",
    candidates: Candidates | None = None,
) -> dict[str, Any]:
    """The content of metrics.json.

    `outputs`: by (system, decoding), one for each prompt, in the order of `references`. `temperatures`: of every
    decoding, by name. `ranking`: shares of held-out pairs ranked right, as the trainer measured them. Whatever needs a
    reference is null where no prompt has one. `rouge_l_difference` holds mean differences on the same prompts by
    decoding; its `plad_minus_cooler_warmup` is PLaD under the main decoding minus the warm-up student under that one.
    `judge`: whose win rates head the figures; ROUGE judges are always there, others come in `judgements`. `trained_on`: the
    judge, if any, whose score decided what was trained on. `previous`: the system that the round began as.
    """
    if missing := sorted({decoding for _, decoding in outputs} - set(temperatures)):
        raise ValueError(f"compare: no temperature given for the decodings {missing}")
    if not outputs or not references:
        raise ValueError("compare: nothing to compare: no outputs or no prompts")
    scores = {key: score_system(references, outputs[key]) for key in sorted(outputs, key=lambda k: _rank(k[0]))}
    main = main_decoding(scores, temperatures)
    judges = {
        name: Judgement("reference", {key: getattr(found, name) for key, found in scores.items()})
        for name in REFERENCE_JUDGES
    } | dict(judgements or {})
    plan = _Comparison(scores, judges, judge, main, resamples, seed)
    cooler = [d for s, d in scores if s == "warmup" and temperatures[d] < temperatures[main]]
    shown = dict.fromkeys((judge, *(judgements or {})))
    metrics: dict[str, Any] = {
        "prompts": len(references),
        "prompts_with_reference": int(sum(1 for r in references if r and r.strip())),
        "main_decoding": main,
        "judge": judge,
        "systems": [plan.row(key, temperatures[key[1]]) for key in scores],
        "plad_vs_seqkd": {d: plan.rate(("plad", d), ("seqkd", d)) for d in plan.shared("plad", "seqkd")},
        "gain_of_round": plan.rate(("plad", main), (previous, main)),
        "previous": previous,
        "rouge_l_difference": {
            **{
                f"{a}_minus_{b}": {d: plan.difference((a, d), (b, d)) for d in plan.shared(a, b)}
                for a, b in (("plad", "warmup"), ("plad", "seqkd"), ("teacher", "warmup"))
            },
            "plad_minus_cooler_warmup": {
                d: plan.difference(("plad", main), ("warmup", d)) for d in cooler if ("plad", main) in scores
            },
        },
        "judges": {name: plan.judged(name, compared_pairs(previous)) for name in shown},
        "judge_was_trained_on": trained_on == judge,
        "ranking": dict(ranking) if ranking else None,
        "calibration": plan.calibration(candidates) if candidates is not None else None,
    }
    return {**metrics, "verdict": verdict(metrics)}


def compared_pairs(previous: str = "warmup") -> list[tuple[str, str]]:
    """The systems between which judges decide."""
    return [("plad", other) for other in dict.fromkeys(("warmup", "seqkd", previous, "teacher"))]


def _rank(system: str) -> tuple[int, int]:
    if system in FIRST:
        return FIRST.index(system), 0
    number = system.rpartition("-")[2]  # of an earlier round
    return len(FIRST) + (system == LAST), int(number) if number.isdigit() else 0


@dataclass(frozen=True)
class _Comparison:
    scores: Mapping[Key, SystemScores]
    judges: Mapping[str, Judgement]
    judge: str
    main: str
    resamples: int
    seed: int

    def shared(self, a: str, b: str) -> list[str]:
        return [d for s, d in self.scores if s == a and (b, d) in self.scores]

    def interval(self, values_P: Scores | None) -> IntervalJson | None:
        known = values_P[~np.isnan(values_P)] if values_P is not None else np.empty(0)
        return bootstrap_mean(known, self.resamples, self.seed).to_json() if known.size else None

    def wins(self, a: Key, b: Key, judge: str | None = None) -> Scores | None:
        """Of a over b by a judge, None where it did not decide between them."""
        judgement = self.judges[judge or self.judge]
        if judgement.scores is not None:
            found = judgement.scores
            return wins(found[a], found[b]) if a in found and b in found else None
        assert judgement.preferences is not None
        if (a[1], b[1]) != (self.main, self.main):
            return None
        if (a[0], b[0]) in judgement.preferences:
            return judgement.preferences[a[0], b[0]].wins
        reverse = judgement.preferences.get((b[0], a[0]))
        return None if reverse is None else 1.0 - reverse.wins

    def rate(self, a: Key, b: Key) -> IntervalJson | None:
        return self.interval(self.wins(a, b)) if a in self.scores and b in self.scores else None

    def difference(self, a: Key, b: Key) -> IntervalJson | None:
        return self.interval(self.scores[a].rouge_l - self.scores[b].rouge_l)

    def baseline(self, key: Key) -> Key | None:
        """The warm-up student under the same decoding; for its own extra temperatures, under the main one."""
        system, decoding = key
        own_extra = system == "warmup" and not any(s != "warmup" and d == decoding for s, d in self.scores)
        baseline = ("warmup", self.main if own_extra else decoding)
        return baseline if baseline in self.scores and baseline != key else None

    def row(self, key: Key, temperature: float) -> dict[str, Any]:
        scores, baseline = self.scores[key], self.baseline(key)
        return {
            "system": key[0],
            "decoding": key[1],
            "temperature": float(temperature),
            **{name: self.interval(getattr(scores, name)) for name in REFERENCE_JUDGES},
            "exact_match": self.interval(scores.exact),
            "tokens_mean": self.interval(scores.tokens),
            "no_eos_share": self.interval(1.0 - scores.finished),
            "repetition": self.interval(scores.repetition),
            "win_rate_vs_warmup": self.rate(key, baseline) if baseline else None,
        }

    def judged(self, name: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """All that a judge said of the pairs of systems under the main decoding, at any length and at equal length."""
        judgement = self.judges[name]
        found = [self._judged_pair(name, a, b) for a, b in pairs]
        comparisons = [row for row in found if row]
        preferences = judgement.preferences or {}
        orders = [preferences[pair] for pair in pairs if pair in preferences]
        first = self.interval(np.concatenate([_chose_first(each) for each in orders])) if orders else None
        return {
            "kind": judgement.kind,
            "comparisons": comparisons,
            "first_position": first,
            "biased": first is not None
            and abs(first["value"] - 0.5) > _BIASED
            and not first["low"] <= 0.5 <= first["high"],
        }

    def _judged_pair(self, name: str, a: str, b: str) -> dict[str, Any] | None:
        keys = (a, self.main), (b, self.main)
        wins_P = self.wins(*keys, judge=name) if all(key in self.scores for key in keys) else None
        if wins_P is None or np.isnan(wins_P).all():
            return None
        known = ~np.isnan(wins_P)
        lengths_a, lengths_b = (self.scores[key].characters[known] for key in keys)
        given = wins_P[known], lengths_a, lengths_b
        preferences = (self.judges[name].preferences or {}).get((a, b))
        more: dict[str, Any] = {}
        if preferences is not None:
            opposite = np.abs(preferences.a_first[known] - preferences.a_second[known]) == 1.0
            more = {
                "without_verdict": preferences.asked - int(known.sum()),
                "disagreement": float(opposite.mean()),
            }
        return {
            "a": a,
            "b": b,
            "decoding": self.main,
            "prompts": int(known.sum()),
            "win_rate": self.interval(wins_P),
            "ties": float((wins_P[known] == 0.5).mean()),
            "length_controlled": length_controlled(*given).to_json(),
            "by_length": by_length(*given, self.resamples, self.seed),
            **more,
        }

    def calibration(self, candidates: Candidates) -> dict[str, Any]:
        """How well each system's likelihoods rank the candidates: the sums, as the loss sees them, and the means per token."""
        correlations = {s: rank_correlations(logps, candidates.quality_PK) for s, logps in candidates.logps.items()}
        found = {}
        for system, logps_PK in candidates.logps.items():
            per_token = rank_correlations(logps_PK / candidates.tokens_PK, candidates.quality_PK)
            found[system] = {
                "rank_correlation": self.interval(correlations[system]),
                "rank_correlation_per_token": self.interval(per_token),
                "reliability": reliability(logps_PK, candidates.quality_PK),
            }
        return {
            "judge": candidates.judge,
            "candidates": int(candidates.quality_PK.shape[1]),
            "systems": found,
            "rank_correlation_difference": {
                f"{a}_minus_{b}": self.interval(correlations[a] - correlations[b])
                for a, b in (("plad", "warmup"), ("plad", "seqkd"))
                if a in correlations and b in correlations
            },
        }


def _chose_first(preferences: Preferences) -> Scores:
    """For each prompt the share of decided verdicts that went to the response shown first; NaN without any."""
    verdicts = np.stack([preferences.a_first, 1.0 - preferences.a_second])
    decided = ~np.isnan(verdicts) & (verdicts != 0.5)
    count_P = decided.sum(0)
    share_P = np.where(decided, verdicts, 0.0).sum(0) / np.maximum(count_P, 1)
    return np.where(count_P > 0, share_P, np.nan)
