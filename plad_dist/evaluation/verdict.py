"""What may honestly be said of a comparison, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Key = tuple[str, str]  # system, decoding

NO_EOS_WARNING = 0.10  # share of outputs without end-of-sequence above which a system is called broken
_CONTRADICTS = 0.3  # share of contradicting verdicts above which a judge is called inconsistent

NAMES = {"teacher": "teacher", "warmup": "warm-up student", "seqkd": "sequence-level KD", "plad": "PLaD"}
IntervalJson = Mapping[str, float]


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """A few plain sentences on what the numbers show, whatever their sign."""
    rows = {(row["system"], row["decoding"]): row for row in metrics["systems"]}
    said: list[str | None] = []
    if not metrics["prompts_with_reference"]:
        said += [
            "No prompt has a reference: ROUGE, exact match and win rates by them are empty.",
            _lengths(rows, metrics["main_decoding"]),
        ]
    gap = _capacity_gap(metrics) if metrics["prompts_with_reference"] else None
    is_warning = gap is not None and gap.startswith("Warning")
    said += [gap if is_warning else None]  # what it puts in question comes after it
    said += [_against_warmup(rows, metrics), _against_seqkd(metrics), _at_equal_length(metrics)]
    if metrics["prompts_with_reference"]:
        said += [_sharpening(rows, metrics), None if is_warning else gap]
    said += [_round(metrics), _ranking(metrics["ranking"]), _calibration(metrics["calibration"])]
    said += [*_judges(metrics), _endings(metrics["systems"])]
    return [sentence for sentence in said if sentence]


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
    means = [f"{NAMES.get(s, s)} {row['tokens_mean']['value']:.1f}" for (s, d), row in rows.items() if d == main]
    return f"Mean length in tokens ({main}): {', '.join(means)}."


def _by(metrics: Mapping[str, Any]) -> str:
    return "" if metrics["judge"] == "rouge_l" else f" by {metrics['judge']}"


def _against_warmup(rows: Mapping[Key, Mapping[str, Any]], metrics: Mapping[str, Any]) -> str | None:
    rates = {d: row["win_rate_vs_warmup"] for (system, d), row in rows.items() if system == "plad"}
    known = _main_first(rates, metrics["main_decoding"])
    if not known:
        if not metrics["prompts_with_reference"] and metrics["judge"].startswith("rouge"):
            return None
        return "PLaD and the warm-up student were not both evaluated under one decoding, so calibration is not judged."
    heads = {1: "Calibration improved the student", -1: "Calibration made the student worse"}
    words = {1: "the lower end is above 50%", -1: "the upper end is below 50%", 0: "the interval includes 50%"}
    differences = metrics["rouge_l_difference"]["plad_minus_warmup"]
    clauses, signs = [], []
    for decoding, wins in known:
        signs.append(_sign(wins, 0.5))
        clauses.append(f"{decoding} {_share(wins)}, {words[signs[-1]]}{_rouge(differences.get(decoding))}")
    head = heads.get(signs[0], "Calibration made no clear difference")
    if {1, -1} <= set(signs):
        head = "Calibration made the student better under one decoding and worse under another"
    return (
        f"{head} ({known[0][0]}): PLaD wins against the warm-up student{_by(metrics)}, ties half: {'; '.join(clauses)}."
        f"{_better_worse_same(metrics)}"
    )


def _better_worse_same(metrics: Mapping[str, Any]) -> str:
    """What a win rate with ties at half hides."""
    comparisons = metrics["judges"][metrics["judge"]]["comparisons"]
    row = next((row for row in comparisons if (row["a"], row["b"]) == ("plad", "warmup")), None)
    if row is None:
        return ""
    better = row["win_rate"]["value"] - row["ties"] / 2
    shares = [f"{100 * share:.0f}" for share in (better, 1 - better - row["ties"], row["ties"])]
    return " Of 100 prompts ({}) it is better on {}, worse on {}, level on {}.".format(row["decoding"], *shares)


def _rouge(x: IntervalJson | None) -> str:
    return f" (ROUGE-L {_points(x)})" if x else ""


def _against_seqkd(metrics: Mapping[str, Any]) -> str | None:
    """By the mean ROUGE-L where ROUGE-L is the judge, by the win rate of any other judge."""
    by_rouge, main = metrics["judge"] == "rouge_l", metrics["main_decoding"]
    differences = metrics["rouge_l_difference"]["plad_minus_seqkd"]
    known = _main_first(differences if by_rouge else metrics["plad_vs_seqkd"], main)
    if not known:
        if metrics["plad_vs_seqkd"]:
            return None
        return (
            "There is no sequence-level KD of equal compute to compare with, so this run cannot tell whether "
            "preferences added anything to plain distillation."
        )
    words, signs = {1: "ahead", -1: "behind", 0: "a tie"}, [_sign(x, 0.0 if by_rouge else 0.5) for _, x in known]
    clauses = []
    for (decoding, x), sign in zip(known, signs, strict=True):
        told = f"ROUGE-L {_points(x)}, wins {_share(metrics['plad_vs_seqkd'][decoding])}" if by_rouge else _share(x)
        clauses.append(f"{decoding} {words[sign]} ({told})")
    heads = {
        1: "PLaD gives more than plain distillation here",
        -1: "PLaD gives less than plain distillation here",
        0: "No advantage of PLaD over plain distillation is shown",
    }
    head = f"{heads[signs[0]]} ({known[0][0]})"
    if {1, -1} <= set(signs):
        head = "Whether PLaD gives more than plain distillation depends on the decoding"
    compute = "equal compute" if metrics["previous"] == "warmup" else "the compute of one round"
    return f"{head}; against sequence-level KD of {compute}{_by(metrics)}: {'; '.join(clauses)}."


def _at_equal_length(metrics: Mapping[str, Any]) -> str | None:
    """Whether the wins over the warm-up student stay when lengths are equal."""
    comparisons = metrics["judges"][metrics["judge"]]["comparisons"]
    row = next((row for row in comparisons if (row["a"], row["b"]) == ("plad", "warmup")), None)
    if row is None:
        return None
    plain, equal = _sign(row["win_rate"], 0.5), _sign(row["length_controlled"], 0.5)
    if plain > 0 and equal <= 0:
        return (
            f"Warning: at equal length PLaD is not shown to win against the warm-up student ({_share(row['length_controlled'])}): its wins "
            "may be those of longer or shorter responses."
        )
    return f"At equal length PLaD wins {_share(row['length_controlled'])} against the warm-up student."


def _round(metrics: Mapping[str, Any]) -> str | None:
    gain, previous = metrics["gain_of_round"], metrics["previous"]
    if previous == "warmup" or gain is None:
        return None
    word = {1: "gained", -1: "lost", 0: "made no clear difference"}[_sign(gain, 0.5)]
    return f"This round {word}: its student wins {_share(gain)} against that of {previous}."


def _calibration(calibration: Mapping[str, Any] | None) -> str | None:
    """Whether the likelihoods rank responses by quality better than before."""
    if calibration is None:
        return None
    systems, gain = calibration["systems"], calibration["rank_correlation_difference"].get("plad_minus_warmup")
    before, after = (systems.get(name, {}).get("rank_correlation") for name in ("warmup", "plad"))
    if not (before and after and gain):
        return None
    verb = {
        1: "rank responses better than before",
        -1: "rank responses worse than before",
        0: "rank responses as before",
    }
    sentence = (
        f"PLaD's likelihoods {verb[_sign(gain)]}: rank correlation with quality over {calibration['candidates']} candidates a prompt "
        f"{before['value']:.2f} to {after['value']:.2f}, difference {gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
    )
    control = systems.get("seqkd", {}).get("rank_correlation")
    return f"{sentence} ({control['value']:.2f} for sequence-level KD)." if control else f"{sentence}."


def _judges(metrics: Mapping[str, Any]) -> list[str]:
    """What is to be known before judges are believed."""
    said = []
    if metrics["judge_was_trained_on"]:
        said.append(
            f"Warning: {metrics['judge']} also decided what was trained on; a gain by it may be a gain in pleasing it. Judge by "
            "something else (evaluation.judge)."
        )
    for name, found in metrics["judges"].items():
        if found["biased"]:
            said.append(
                f"Warning: the judge {name} prefers a position: {_share(found['first_position'])} of its decided verdicts went to the "
                "response that was shown first."
            )
        worst = max((row.get("disagreement", 0.0) for row in found["comparisons"]), default=0.0)
        if worst > _CONTRADICTS:
            said.append(
                f"Warning: the judge {name} contradicts itself on {100 * worst:.0f}% of the prompts when the order is changed; those "
                "count as half a win."
            )
    return said


def _sharpening(rows: Mapping[Key, Mapping[str, Any]], metrics: Mapping[str, Any]) -> str | None:
    """Would the untouched warm-up student, sampled cooler, do as well as PLaD under the main decoding?"""
    main, found = metrics["main_decoding"], metrics["rouge_l_difference"]["plad_minus_cooler_warmup"]
    gain = metrics["rouge_l_difference"]["plad_minus_warmup"].get(main)
    if gain is None or not found:
        return None
    if _sign(gain) <= 0:
        return f"Lower temperatures have no gain to explain: PLaD ({main}) is not shown to beat the warm-up student ({main}) by ROUGE-L."
    best = max(found, key=lambda decoding: rows["warmup", decoding]["rouge_l"]["value"])
    left = found[best]
    cooler = f"warm-up student at temperature {rows['warmup', best]['temperature']:g}"
    apart = f"ROUGE-L of PLaD ({main}) minus the untouched {cooler}: {_points(left)}"
    if _sign(left) <= 0:
        well, gain_is = ("better than", "is no more than") if _sign(left) < 0 else ("as well as", "may all be")
        said = f"A lower temperature alone does {well} PLaD ({main}): its gain there {gain_is} sharpening ({apart})"
        return f"{said}{_gain_without_sampling(rows, metrics)}."
    share = max(0.0, 1.0 - left["value"] / gain["value"])
    amount = "most" if share >= 0.5 else "less than half"
    return f"PLaD stays ahead of lower temperatures; {amount} of its gain ({100 * share:.0f}%) is sharpening ({apart})."


def _gain_without_sampling(rows: Mapping[Key, Mapping[str, Any]], metrics: Mapping[str, Any]) -> str:
    """What no temperature explains: the gain of the likeliest outputs over the likeliest ones of the warm-up student."""
    for decoding, gain in metrics["rouge_l_difference"]["plad_minus_warmup"].items():
        if gain is not None and rows["plad", decoding]["temperature"] == 0 and _sign(gain) > 0:
            return f"; {decoding}, where no temperature plays a part, PLaD gains {_points(gain)}"
    return ""


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
        f"Warning: no capacity gap is shown: by the references the teacher is not clearly better than the warm-up student ({clauses}), "
        "so preferring its responses may have no ground here."
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
        f"{NAMES.get(row['system'], row['system'])} {row['decoding']} {100 * row['no_eos_share']['value']:.1f}%"
        for row in systems
        if row["no_eos_share"]["value"] >= NO_EOS_WARNING
    ]
    if endless:
        return f"Warning: many outputs were cut at the token limit without end-of-sequence: {', '.join(endless)}."
    worst = max(systems, key=lambda row: float(row["no_eos_share"]["value"]))
    return f"Outputs end properly: at most {100 * worst['no_eos_share']['value']:.1f}% were cut at the token limit."
