"""The verdict: sentences that state what the figures of a comparison show, whatever their sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from plad_dist.evaluation.document import Calibration, HeldoutFigures, Interval, Metrics, Ranking, SystemRow
from plad_dist.evaluation.formatting import NO_EOS_WARNING, NO_REFERENCES, points, share, signed, system_phrase
from plad_dist.systems import PLAD, SEQKD, WARMUP

_CONTRADICTS = 0.3  # share of opposite verdicts above which a judge is reported as inconsistent


def verdict(metrics: Metrics) -> tuple[str, ...]:
    """Return the sentences on the figures; `metrics.verdict` itself is not read."""
    sentences: list[str | None] = []
    gap = None
    if metrics.prompts_with_reference:
        gap = _capacity_gap(metrics)
    else:
        sentences += [NO_REFERENCES, _mean_lengths(metrics)]
    is_warning = gap is not None and gap.startswith("Warning")
    # The warning comes ahead of the sentences that it calls into question.
    sentences.append(gap if is_warning else None)
    sentences += [_against_warmup(metrics), _against_seqkd(metrics), _at_equal_length(metrics)]
    if metrics.prompts_with_reference:
        sentences += [_sharpening(metrics), None if is_warning else gap]
    sentences += [_gain_of_round(metrics), _ranking(metrics.ranking), _calibration(metrics.calibration)]
    sentences += [*_judge_warnings(metrics), _endings(metrics.systems)]
    return tuple(sentence for sentence in sentences if sentence)


def _sign(x: Interval, zero: float = 0.0) -> int:
    """Return 1 or -1 if the whole interval is above or below zero, and 0 for a tie."""
    return int(x.low > zero) - int(x.high < zero)


def _main_first(figures: Mapping[str, Interval | None], main: str) -> list[tuple[str, Interval]]:
    available = [(decoding, x) for decoding, x in figures.items() if x is not None]
    return sorted(available, key=lambda item: item[0] != main)


def _mean_lengths(metrics: Metrics) -> str:
    means = [
        f"{system_phrase(system)} {row.tokens_mean.value:.1f}"
        for system, row in metrics.rows_under(metrics.main_decoding).items()
    ]
    return f"Mean response length in tokens ({metrics.main_decoding}): {', '.join(means)}."


def _by_judge(metrics: Metrics) -> str:
    return "" if metrics.judge == "rouge_l" else f" by {metrics.judge}"


# -- PLaD against baselines


def _against_warmup(metrics: Metrics) -> str | None:
    rates = {row.decoding: row.win_rate_vs_warmup for row in metrics.systems if row.system == PLAD}
    available = _main_first(rates, metrics.main_decoding)
    if not available:
        if not metrics.prompts_with_reference and metrics.judge.startswith("rouge"):
            return None
        return (
            "PLaD and the warm-up student were not evaluated under a common decoding, so the effect of calibration is "
            "unknown."
        )
    heads = {
        1: "Calibration improved the student",
        -1: "Calibration made the student worse",
        0: "Calibration made no clear difference",
    }
    bounds = {1: "entirely above 50%", -1: "entirely below 50%", 0: "the interval includes 50%"}
    signs = [_sign(rate, 0.5) for _, rate in available]
    clauses = []
    for (decoding, rate), sign in zip(available, signs, strict=True):
        difference = metrics.rouge_l_difference.plad_minus_warmup.get(decoding)
        rouge = f" (ROUGE-L {points(difference)})" if difference else ""
        clauses.append(f"{decoding} {share(rate)}, {bounds[sign]}{rouge}")
    head = heads[signs[0]]
    if {1, -1} <= set(signs):
        head = "Calibration made the student better under one decoding and worse under another"
    return (
        f"{head} ({available[0][0]}). Win rate of PLaD against the warm-up student{_by_judge(metrics)}, ties counted "
        f"half: {'; '.join(clauses)}.{_better_worse_level(metrics)}"
    )


def _better_worse_level(metrics: Metrics) -> str:
    """Return the shares of better, worse and level responses, which a win rate hides."""
    row = metrics.main_judge.comparison(PLAD, WARMUP)
    if row is None:
        return ""
    better = row.win_rate.value - row.ties / 2
    better_100, worse_100, level_100 = (f"{100 * x:.0f}" for x in (better, 1 - better - row.ties, row.ties))
    return (
        f" Out of 100 prompts ({row.decoding}), PLaD is better on {better_100}, worse on {worse_100} and level on "
        f"{level_100}."
    )


def _against_seqkd(metrics: Metrics) -> str | None:
    """Compare by the mean ROUGE-L if ROUGE-L is the judge, by the win rate of any other judge."""
    by_rouge = metrics.judge == "rouge_l"
    figures = metrics.rouge_l_difference.plad_minus_seqkd if by_rouge else metrics.plad_vs_seqkd
    available = _main_first(figures, metrics.main_decoding)
    if not available:
        if metrics.plad_vs_seqkd:
            return None
        return (
            "The run has no sequence-level KD of equal compute, so it cannot show whether preferences add anything to "
            "plain distillation."
        )
    words = {1: "ahead", -1: "behind", 0: "tied"}
    signs = [_sign(x, 0.0 if by_rouge else 0.5) for _, x in available]
    clauses = []
    for (decoding, x), sign in zip(available, signs, strict=True):
        rate = metrics.plad_vs_seqkd[decoding]
        figure = f"ROUGE-L {points(x)}, win rate {share(rate)}" if by_rouge and rate else share(x)
        clauses.append(f"{decoding} {words[sign]} ({figure})")
    heads = {
        1: "PLaD is better than plain distillation",
        -1: "PLaD is worse than plain distillation",
        0: "PLaD shows no advantage over plain distillation",
    }
    head = f"{heads[signs[0]]} ({available[0][0]})"
    if {1, -1} <= set(signs):
        head = "Whether PLaD is better than plain distillation depends on the decoding"
    compute = "equal compute" if metrics.previous == WARMUP else "the compute of one round"
    return f"{head}. Against sequence-level KD of {compute}{_by_judge(metrics)}: {'; '.join(clauses)}."


def _at_equal_length(metrics: Metrics) -> str | None:
    """State whether the wins against the warm-up student remain at equal length."""
    row = metrics.main_judge.comparison(PLAD, WARMUP)
    if row is None:
        return None
    rate = share(row.length_controlled)
    if _sign(row.win_rate, 0.5) > 0 and _sign(row.length_controlled, 0.5) <= 0:
        return (
            f"Warning: at equal length, the win rate of PLaD against the warm-up student is not clearly above 50% "
            f"({rate}); its wins may come from longer or shorter responses."
        )
    return f"At equal length, the win rate of PLaD against the warm-up student is {rate}."


def _gain_of_round(metrics: Metrics) -> str | None:
    gain, previous = metrics.gain_of_round, metrics.previous
    if previous == WARMUP or gain is None:
        return None
    effect = {1: "improved the student", -1: "made the student worse", 0: "made no clear difference"}[_sign(gain, 0.5)]
    return f"This round {effect}: the win rate against the student of round {previous.round} is {share(gain)}."


# -- sharpening, capacity gap, likelihoods


def _sharpening(metrics: Metrics) -> str | None:
    """Compare PLaD under the main decoding with the warm-up student at lower temperatures."""
    main, differences = metrics.main_decoding, metrics.rouge_l_difference
    gain, cooler = differences.plad_minus_warmup.get(main), differences.plad_minus_cooler_warmup
    if gain is None or not cooler:
        return None
    if _sign(gain) <= 0:
        return (
            f"There is no gain for lower temperatures to explain: by ROUGE-L, PLaD ({main}) is not clearly better than "
            f"the warm-up student ({main})."
        )
    warmup_rows = {row.decoding: row for row in metrics.systems if row.system == WARMUP}
    best = max(cooler, key=lambda decoding: _rouge_l(warmup_rows[decoding]))
    lead = cooler[best]
    assert lead is not None, "PLaD has a gain by references, so every difference exists"
    figures = (
        f"ROUGE-L of PLaD ({main}) minus the warm-up student at temperature {warmup_rows[best].temperature:g}: "
        f"{points(lead)}"
    )
    if _sign(lead) <= 0:
        is_behind = _sign(lead) < 0
        effect, extent = ("better than", "is only") if is_behind else ("as well as", "may be only")
        return (
            f"A lower temperature alone does {effect} PLaD ({main}), so its gain {extent} sharpening ({figures})"
            f"{_gain_without_sampling(metrics)}."
        )
    sharpening = max(0.0, 1.0 - lead.value / gain.value)
    amount = "most" if sharpening >= 0.5 else "less than half"
    return (
        f"PLaD stays ahead of the warm-up student at lower temperatures; {amount} of its gain "
        f"({100 * sharpening:.0f}%) is sharpening ({figures})."
    )


def _rouge_l(row: SystemRow) -> float:
    assert row.rouge_l is not None
    return row.rouge_l.value


def _gain_without_sampling(metrics: Metrics) -> str:
    """Return the gain at temperature 0, which no lower temperature explains, if there is one."""
    temperatures = {row.decoding: row.temperature for row in metrics.systems if row.system == PLAD}
    for decoding, gain in metrics.rouge_l_difference.plad_minus_warmup.items():
        if gain is not None and temperatures[decoding] == 0 and _sign(gain) > 0:
            return f"; under {decoding}, where temperature plays no part, PLaD gains {points(gain)}"
    return ""


def _capacity_gap(metrics: Metrics) -> str | None:
    differences = _main_first(metrics.rouge_l_difference.teacher_minus_warmup, metrics.main_decoding)
    if not differences:
        return None
    clauses = "; ".join(f"{decoding} {points(x)}" for decoding, x in differences)
    has_gap = [_sign(x) > 0 for _, x in differences]
    if all(has_gap):
        return (
            f"There is a capacity gap: by the references, the teacher is better than the warm-up student ({clauses})."
        )
    if any(has_gap):
        return f"The capacity gap depends on the decoding (teacher minus warm-up student: {clauses})."
    return (
        "Warning: no capacity gap is shown. By the references, the teacher is not clearly better than the warm-up "
        f"student ({clauses}), so there may be no reason to prefer its responses."
    )


def _ranking(ranking: Ranking | None) -> str | None:
    """State how the share of correctly ranked held-out pairs changed.

    A change within 1.96 standard errors of two independent shares counts as none. This is cautious,
    because the shares are paired.
    """
    if ranking is None or ranking.before is None or ranking.after is None or not ranking.pairs:
        return None
    before, after = ranking.before.pair_accuracy, ranking.after.pair_accuracy
    noise = 1.96 * float(np.sqrt((before * (1 - before) + after * (1 - after)) / ranking.pairs))
    change = "did not clearly change," if abs(after - before) <= noise else "rose" if after > before else "fell"
    control = f" ({_accuracy(ranking.seqkd)} for sequence-level KD)" if ranking.seqkd else ""
    sentence = (
        f"The share of {ranking.pairs} held-out pairs that are ranked correctly {change} from "
        f"{_accuracy(ranking.before)} to {_accuracy(ranking.after)}{control}"
    )
    if ranking.after.chosen_logp < ranking.before.chosen_logp:
        sentence += "; the teacher's responses also became less likely, a sign of likelihood displacement"
    return f"{sentence}."


def _accuracy(figures: HeldoutFigures) -> str:
    return f"{100 * figures.pair_accuracy:.1f}%"


def _calibration(calibration: Calibration | None) -> str | None:
    """State whether the likelihoods rank responses by quality better than before."""
    if calibration is None:
        return None
    gain = calibration.rank_correlation_difference.get("plad_minus_warmup")
    before, after, control = (
        calibration.systems[system].rank_correlation if system in calibration.systems else None
        for system in (WARMUP, PLAD, SEQKD)
    )
    if not (before and after and gain):
        return None
    effect = {1: "better than before", -1: "worse than before", 0: "about as well as before"}[_sign(gain)]
    sentence = (
        f"PLaD's likelihoods rank responses {effect}: over {calibration.candidates} candidates per prompt, their rank "
        f"correlation with quality went from {before.value:.2f} to {after.value:.2f}, a difference of {signed(gain)}"
    )
    return f"{sentence} ({control.value:.2f} for sequence-level KD)." if control else f"{sentence}."


# -- warnings


def _judge_warnings(metrics: Metrics) -> list[str]:
    """Return the reasons to distrust the judges."""
    warnings = []
    if metrics.judge_was_trained_on:
        warnings.append(
            f"Warning: {metrics.judge} also decided which pairs were trained on, or how. A gain by this judge may only "
            "show that the student learned to please it; choose another evaluation.judge."
        )
    for name, judge in metrics.judges.items():
        if judge.biased and judge.first_position is not None:
            warnings.append(
                f"Warning: the judge {name} prefers a position: {share(judge.first_position)} of its decided verdicts "
                "are for the response that was shown first."
            )
        worst = max((row.disagreement or 0.0 for row in judge.comparisons), default=0.0)
        if worst > _CONTRADICTS:
            warnings.append(
                f"Warning: the judge {name} contradicts itself on {100 * worst:.0f}% of the prompts when the responses "
                "are swapped; each of these prompts counts as half a win."
            )
    return warnings


def _endings(systems: Sequence[SystemRow]) -> str:
    broken = [
        f"{system_phrase(row.system)} {row.decoding} {100 * row.no_eos_share.value:.1f}%"
        for row in systems
        if row.no_eos_share.value >= NO_EOS_WARNING
    ]
    if broken:
        return f"Warning: many responses were cut off at the token limit, without end-of-sequence: {', '.join(broken)}."
    worst = max(row.no_eos_share.value for row in systems)
    return f"Responses end properly: at most {100 * worst:.1f}% were cut off at the token limit."
