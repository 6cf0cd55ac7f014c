"""How good a system's outputs are, with 95% intervals, and what may honestly be said of the difference.

Arrays with the suffix ``_P`` hold one value for each held-out prompt, in prompt order, so that two systems can be
compared prompt by prompt. A prompt without a reference has NaN where a reference is needed. The intervals are over
prompts: they do not cover how much another training seed would change a system.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
Key = tuple[str, str]  # system, decoding

SYSTEMS = ("teacher", "warmup", "seqkd", "plad")  # the order in which they are shown
NO_EOS_WARNING = 0.10  # share of outputs without end-of-sequence above which a system is called broken


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Output:
    """One response. `finished`: it ended with end-of-sequence or a stop string, not at the token limit."""

    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class SystemScores:
    """One system under one decoding, a value for each prompt. `rouge_l` and `exact` are NaN without a reference."""

    rouge_l: Scores
    exact: Scores
    tokens: Scores
    finished: Scores
    repetition: Scores


# ------------------------------------------------------------------------------------------------------- one response

# Scripts written without spaces, whose characters count as words: Thai, Lao, Burmese, Khmer, Chinese, Japanese.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")


def _words(text: str) -> list[str]:
    spaced = _UNSPACED.sub(r" \g<0> ", text.casefold())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced).split()  # letter, mark, number


_ASCII_WORDS = re.compile("[a-z0-9]+")


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L F1 in 0..1: `2PR / (P + R)`, `P = LCS / words of text`, `R = LCS / words of reference` (Lin 2004).

    The figure of the `rouge_score` package, without stemming, some twenty times as fast: responses are scored by the
    million. The package drops every letter outside a-z, which would score other scripts 0; where the reference has such
    letters, words are split by Unicode instead.
    """
    if reference.isascii() or not any(c.isalpha() and not c.isascii() for c in reference):
        expected, found = _ASCII_WORDS.findall(reference.lower()), _ASCII_WORDS.findall(text.lower())
    else:
        expected, found = _words(reference), _words(text)
    common = _common_words(expected, found)
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _common_words(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, with a row of its table in one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    row = every = (1 << len(a)) - 1
    for place in filter(None, map(places.get, b)):
        matches = row & place
        row = (row + matches) | (row - matches)
    return len(a) - (row & every).bit_count()


def exact_match(reference: str, text: str) -> float:
    """1 where the text is the reference, up to case and white space, else 0."""
    return float(" ".join(reference.split()).casefold() == " ".join(text.split()).casefold())


def repetition(text: str) -> float:
    """Share of word 3-grams that occurred before in the text: `1 - distinct / all` (rep-3); 0 below two 3-grams."""
    words = _words(text)
    count = len(words) - 2
    if count < 2:
        return 0.0
    return 1.0 - len(set(zip(words, words[1:], words[2:], strict=False))) / count


# -------------------------------------------------------------------------------------------------------- many prompts


def bootstrap_mean(values: Scores, resamples: int, seed: int) -> Interval:
    """Mean with its 95% percentile bootstrap interval over prompts (Efron 1979).

    Resampling is done in chunks of about two million draws. Values that are all alike give an interval of no width.
    """
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.ndim != 1 or values_P.size == 0 or np.isnan(values_P).any():
        raise ValueError(f"bootstrap_mean: expected a non-empty vector without NaN, got shape {values_P.shape}")
    count, rng = values_P.size, np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // count)
    means = np.concatenate(
        [
            values_P[rng.integers(0, count, size=(min(chunk, resamples - start), count))].mean(axis=1)
            for start in range(0, resamples, chunk)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values_P.mean()), float(low), float(high))


def _wins(a_P: Scores, b_P: Scores) -> Scores:
    """1 where a is better, 0.5 for a tie (to 1e-9, as equal F1 may differ by rounding), 0 where b is; NaN stays."""
    return np.where(np.isclose(a_P, b_P, rtol=0.0, atol=1e-9), 0.5, np.where(np.isnan(a_P - b_P), np.nan, a_P > b_P))


def win_rate(scores_a: Scores, scores_b: Scores, resamples: int, seed: int) -> Interval:
    """How often a beats b on the same prompt, ties counted half, with its bootstrap interval."""
    return bootstrap_mean(_wins(np.asarray(scores_a, float), np.asarray(scores_b, float)), resamples, seed)


def score_system(references: Sequence[str | None], outputs: Sequence[Output]) -> SystemScores:
    """Score the outputs of one system, prompt by prompt. A blank reference counts as none."""
    if len(references) != len(outputs):
        raise ValueError(f"score_system: {len(references)} references but {len(outputs)} outputs; one per prompt")
    paired = [(r if r and r.strip() else None, o.text) for r, o in zip(references, outputs, strict=True)]
    return SystemScores(
        rouge_l=np.array([np.nan if r is None else rouge_l(r, text) for r, text in paired], dtype=np.float64),
        exact=np.array([np.nan if r is None else exact_match(r, text) for r, text in paired], dtype=np.float64),
        tokens=np.array([o.num_tokens for o in outputs], dtype=np.float64),
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
) -> dict[str, Any]:
    """The content of metrics.json.

    `outputs`: by (system, decoding), one for each prompt, in the order of `references`. `temperatures`: of every
    decoding, by name. `ranking`: shares of held-out pairs ranked right, as the trainer measured them. Whatever needs a
    reference is null where no prompt has one. `rouge_l_difference` holds mean differences on the same prompts by
    decoding; its `plad_minus_cooler_warmup` is PLaD under the main decoding minus the warm-up student under that one.
    """
    if missing := sorted({decoding for _, decoding in outputs} - set(temperatures)):
        raise ValueError(f"compare: no temperature given for the decodings {missing}")
    if not outputs or not references:
        raise ValueError("compare: nothing to compare: no outputs or no prompts")
    scores = {key: score_system(references, outputs[key]) for key in sorted(outputs, key=lambda k: _rank(k[0]))}
    main = _main_decoding(scores, temperatures)
    plan = _Comparison(scores, main, resamples, seed)
    cooler = [d for s, d in scores if s == "warmup" and 0 < temperatures[d] < temperatures[main] and d != main]
    metrics: dict[str, Any] = {
        "prompts": len(references),
        "prompts_with_reference": int(sum(1 for r in references if r and r.strip())),
        "main_decoding": main,
        "systems": [plan.row(key, temperatures[key[1]]) for key in scores],
        "plad_vs_seqkd": {d: plan.wins(("plad", d), ("seqkd", d)) for d in plan.shared("plad", "seqkd")},
        "rouge_l_difference": {
            **{
                f"{a}_minus_{b}": {d: plan.difference((a, d), (b, d)) for d in plan.shared(a, b)}
                for a, b in (("plad", "warmup"), ("plad", "seqkd"), ("teacher", "warmup"))
            },
            "plad_minus_cooler_warmup": {
                d: plan.difference(("plad", main), ("warmup", d)) for d in cooler if ("plad", main) in scores
            },
        },
        "ranking": dict(ranking) if ranking else None,
    }
    return {**metrics, "verdict": verdict(metrics)}


def _rank(system: str) -> int:
    return SYSTEMS.index(system) if system in SYSTEMS else len(SYSTEMS)


def _main_decoding(scores: Mapping[Key, SystemScores], temperatures: Mapping[str, float]) -> str:
    """`sampled` where there is one, else the hottest decoding of the distilled student (or of whoever is there)."""
    names = [d for s, d in scores if s == "plad"] or [d for _, d in scores]
    return "sampled" if "sampled" in names else max(names, key=lambda name: temperatures[name])


@dataclass(frozen=True)
class _Comparison:
    scores: Mapping[Key, SystemScores]
    main: str
    resamples: int
    seed: int

    def shared(self, a: str, b: str) -> list[str]:
        return [d for s, d in self.scores if s == a and (b, d) in self.scores]

    def interval(self, values_P: Scores) -> dict[str, float] | None:
        known = values_P[~np.isnan(values_P)]
        return bootstrap_mean(known, self.resamples, self.seed).to_json() if known.size else None

    def wins(self, a: Key, b: Key) -> dict[str, float] | None:
        return self.interval(_wins(self.scores[a].rouge_l, self.scores[b].rouge_l))

    def difference(self, a: Key, b: Key) -> dict[str, float] | None:
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
            "rouge_l": self.interval(scores.rouge_l),
            "exact_match": self.interval(scores.exact),
            "tokens_mean": self.interval(scores.tokens),
            "no_eos_share": self.interval(1.0 - scores.finished),
            "repetition": self.interval(scores.repetition),
            "win_rate_vs_warmup": self.wins(key, baseline) if baseline else None,
        }


# ------------------------------------------------------------------------------------------------------------- verdict

_NAMES = {"teacher": "teacher", "warmup": "warm-up student", "seqkd": "sequence-level KD", "plad": "PLaD"}
IntervalJson = Mapping[str, float]


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """Three to six plain sentences on what the numbers show, whatever their sign."""
    rows = {(row["system"], row["decoding"]): row for row in metrics["systems"]}
    said: list[str | None] = [
        "No prompt has a reference, so no quality was measured: ROUGE-L, exact match and win rates are empty.",
        _lengths(rows, metrics["main_decoding"]),
    ]
    if metrics["prompts_with_reference"]:
        quality = (_against_warmup(rows, metrics), _against_seqkd(metrics))
        said = [*quality, _sharpening(rows, metrics), _capacity_gap(metrics)]
    return [sentence for sentence in (*said, _ranking(metrics["ranking"]), _endings(metrics["systems"])) if sentence]


def _share(x: IntervalJson) -> str:
    return f"{100 * x['value']:.1f}% [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"


def _points(x: IntervalJson) -> str:
    return f"{100 * x['value']:+.1f} points [{100 * x['low']:+.1f}, {100 * x['high']:+.1f}]"


def _sign(x: IntervalJson, zero: float = 0.0) -> int:
    """1 or -1 where the whole interval lies above or below zero, 0 where it includes it: a tie."""
    return int(x["low"] > zero) - int(x["high"] < zero)


def _main_first(found: Mapping[str, IntervalJson | None], main: str) -> list[tuple[str, IntervalJson]]:
    known = [(decoding, x) for decoding, x in found.items() if x is not None]
    return sorted(known, key=lambda item: item[0] != main)


def _lengths(rows: Mapping[Key, Mapping[str, Any]], main: str) -> str:
    means = [f"{_NAMES.get(s, s)} {row['tokens_mean']['value']:.1f}" for (s, d), row in rows.items() if d == main]
    return f"Mean length in tokens ({main}): {', '.join(means)}."


def _against_warmup(rows: Mapping[Key, Mapping[str, Any]], metrics: Mapping[str, Any]) -> str:
    differences = _main_first(metrics["rouge_l_difference"]["plad_minus_warmup"], metrics["main_decoding"])
    if not differences:
        return "PLaD and the warm-up student were not both evaluated under one decoding, so calibration is not judged."
    heads = {1: "Calibration improved the student", -1: "Calibration made the student worse"}
    words = {1: "the lower end is above 50%", -1: "the upper end is below 50%", 0: "the interval includes 50%"}
    clauses, signs = [], []
    for decoding, x in differences:
        wins = rows["plad", decoding]["win_rate_vs_warmup"]
        signs.append(_sign(wins, 0.5))
        clauses.append(f"{decoding} {_share(wins)}, {words[signs[-1]]} (ROUGE-L {_points(x)})")
    head = heads.get(signs[0], "Calibration made no clear difference")
    return f"{head} ({differences[0][0]}): PLaD wins against the warm-up student, ties half: {'; '.join(clauses)}."


def _against_seqkd(metrics: Mapping[str, Any]) -> str:
    differences = _main_first(metrics["rouge_l_difference"]["plad_minus_seqkd"], metrics["main_decoding"])
    if not differences:
        return (
            "There is no sequence-level KD of equal compute to compare with, so this run cannot tell whether "
            "preferences added anything to plain distillation."
        )
    words, signs, clauses = {1: "ahead", -1: "behind", 0: "a tie"}, [_sign(x) for _, x in differences], []
    for (decoding, x), sign in zip(differences, signs, strict=True):
        wins = metrics["plad_vs_seqkd"][decoding]
        clauses.append(f"{decoding} {words[sign]} (ROUGE-L {_points(x)}, wins {_share(wins)})")
    match (1 in signs, -1 in signs):
        case (True, False):
            head = "PLaD gives more than plain distillation here"
        case (False, True):
            head = "PLaD gives less than plain distillation here"
        case (True, True):
            head = "Whether PLaD gives more than plain distillation depends on the decoding"
        case _:
            head = "No advantage of PLaD over plain distillation is shown"
    return f"{head}; against sequence-level KD of equal compute: {'; '.join(clauses)}."


def _sharpening(rows: Mapping[Key, Mapping[str, Any]], metrics: Mapping[str, Any]) -> str | None:
    """Would the untouched warm-up student, sampled cooler, do as well as PLaD under the main decoding?"""
    main, found = metrics["main_decoding"], metrics["rouge_l_difference"]["plad_minus_cooler_warmup"]
    gain = metrics["rouge_l_difference"]["plad_minus_warmup"].get(main)
    if gain is None or not found:
        return None
    if _sign(gain) <= 0:
        return f"Lower temperatures have no gain to explain: PLaD ({main}) does not beat the warm-up student ({main})."
    best = max(found, key=lambda decoding: rows["warmup", decoding]["rouge_l"]["value"])
    left = found[best]
    cooler = f"warm-up student at temperature {rows['warmup', best]['temperature']:g}"
    apart = f"PLaD ({main}) minus the untouched {cooler}: {_points(left)}"
    if _sign(left) < 0:
        return f"A lower temperature alone does better than PLaD: its gain is no more than sharpening ({apart})."
    if _sign(left) == 0:
        return f"A lower temperature alone does as well as PLaD: its gain may all be sharpening ({apart})."
    share = max(0.0, 1.0 - left["value"] / gain["value"])
    amount = "most" if share >= 0.5 else "less than half"
    return f"PLaD stays ahead of lower temperatures; {amount} of its gain ({100 * share:.0f}%) is sharpening ({apart})."


def _capacity_gap(metrics: Mapping[str, Any]) -> str | None:
    differences = _main_first(metrics["rouge_l_difference"]["teacher_minus_warmup"], metrics["main_decoding"])
    if not differences:
        return None
    clauses = "; ".join(f"{decoding} {_points(x)}" for decoding, x in differences)
    signs = [_sign(x) for _, x in differences]
    if all(sign > 0 for sign in signs):
        return f"There is a capacity gap: the teacher beats the warm-up student by the references ({clauses})."
    if any(sign > 0 for sign in signs):
        return f"The capacity gap depends on the decoding (teacher minus warm-up student: {clauses})."
    return (
        f"Warning: no capacity gap: by the references the teacher is not better than the warm-up student ({clauses}), "
        "so preferring its responses has no ground here."
    )


def _ranking(ranking: Mapping[str, Any] | None) -> str | None:
    """A change within 1.96 standard errors of two independent shares is called none: cautious, as they are paired."""
    if not ranking or not ranking.get("before") or not ranking.get("after") or not ranking.get("pairs"):
        return None
    before, after, pairs = ranking["before"]["pair_accuracy"], ranking["after"]["pair_accuracy"], ranking["pairs"]
    noise = 1.96 * float(np.sqrt((before * (1 - before) + after * (1 - after)) / pairs))
    verb = "did not clearly change" if abs(after - before) <= noise else "rose" if after > before else "fell"
    sentence = f"Of {pairs} held-out pairs, the share ranked right {verb}: {100 * before:.1f}% to {100 * after:.1f}%"
    if ranking.get("seqkd"):
        sentence += f" ({100 * ranking['seqkd']['pair_accuracy']:.1f}% for sequence-level KD)"
    if ranking["after"]["chosen_logp"] < ranking["before"]["chosen_logp"]:
        sentence += "; the teacher's responses became less likely too, the sign of likelihood displacement"
    return f"{sentence}."


def _endings(systems: Sequence[Mapping[str, Any]]) -> str:
    endless = [
        f"{_NAMES.get(row['system'], row['system'])} {row['decoding']} {100 * row['no_eos_share']['value']:.1f}%"
        for row in systems
        if row["no_eos_share"]["value"] >= NO_EOS_WARNING
    ]
    if endless:
        return f"Warning: many outputs were cut at the token limit without end-of-sequence: {', '.join(endless)}."
    worst = max(systems, key=lambda row: float(row["no_eos_share"]["value"]))
    return f"Outputs end properly: at most {100 * worst['no_eos_share']['value']:.1f}% were cut at the token limit."
