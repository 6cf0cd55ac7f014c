"""Selection of pairs: combinations of two responses are kept, or dropped for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plad_dist.config import Pairing
from plad_dist.pairing.responses import DropReason, Role, SampledPrompt, SampledResponse


@dataclass(frozen=True, slots=True)
class Combination:
    """A teacher response as chosen and a student response as rejected.

    Attributes:
        problem: reason to drop the combination, None for a usable one.
    """

    chosen: SampledResponse
    rejected: SampledResponse
    problem: DropReason | None


def select_pairs(prompt: SampledPrompt, pairing: Pairing, counts: Counter[str]) -> Iterator[Combination]:
    """Yield the combinations of a prompt that are kept as pairs.

    Counts every combination that is considered and dropped as `drop:<reason>`. Of all usable
    combinations, whatever is kept, it counts whether the teacher's score is `better`, `worse` or
    `equal`.
    """
    combinations = [
        Combination(chosen, rejected, _problem(chosen, rejected, pairing))
        for chosen, rejected in _combine_all(prompt.teacher, prompt.student)
    ]
    _count_wins(combinations, counts)
    if pairing.combine == "best_worst":
        combinations = _best_worst(prompt, combinations, pairing)
    kept_ids: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for combination in combinations:
        problem = combination.problem
        if len(kept_ids) == pairing.kept_pairs:
            if pairing.combine == "one":
                return
            problem = "over_max_pairs_per_prompt"
        problem = problem or _score_problem(combination, pairing)
        if problem is None:
            ids = tuple(combination.chosen.ids), tuple(combination.rejected.ids)
            if ids not in kept_ids:
                kept_ids.add(ids)
                yield combination
                continue
            problem = "duplicate"
        counts[f"drop:{problem}"] += 1


def _combine_all(
    teacher: Sequence[SampledResponse], student: Sequence[SampledResponse]
) -> Iterator[tuple[SampledResponse, SampledResponse]]:
    """Yield all combinations of two responses. The first ones use every response once."""
    for shift in range(len(student)):
        for index, chosen in enumerate(teacher):
            yield chosen, student[(index + shift) % len(student)]


def _best_worst(prompt: SampledPrompt, combinations: list[Combination], pairing: Pairing) -> list[Combination]:
    """Return one combination: the teacher's best and the student's worst response by score.

    The lower sample index wins between equal scores. Without usable or scored responses, it is the
    first combination, which is then dropped for its reason.
    """
    usable = prompt.usable()
    if not usable:
        return combinations[:1]

    def scored(role: Role) -> list[tuple[float, SampledResponse]]:
        return [(r.score, r) for r in usable if r.role == role and r.score is not None]

    teacher, student = scored("teacher"), scored("student")
    if not teacher or not student:
        return [Combination(combinations[0].chosen, combinations[0].rejected, "no_score")]
    _, best = max(teacher, key=lambda item: item[0])
    _, worst = min(student, key=lambda item: item[0])
    return [Combination(best, worst, _problem(best, worst, pairing))]


def _problem(chosen: SampledResponse, rejected: SampledResponse, pairing: Pairing) -> DropReason | None:
    """Return the reason to drop a combination whatever its scores, None for a usable one."""
    if problem := chosen.problem or rejected.problem:
        return problem
    is_identical = chosen.text.strip() == rejected.text.strip() or chosen.ids == rejected.ids
    if pairing.identical == "drop" and is_identical:
        return "identical"
    if pairing.length_ratio is not None:
        low, high = pairing.length_ratio
        if not low <= len(chosen.ids) / len(rejected.ids) <= high:
            return "length_ratio"
    return None


def _score_problem(combination: Combination, pairing: Pairing) -> DropReason | None:
    if pairing.min_score_gap is None:
        return None
    chosen, rejected = combination.chosen.score, combination.rejected.score
    if chosen is None or rejected is None:
        return "no_score"
    return "score_gap" if chosen - rejected < pairing.min_score_gap else None


def _count_wins(combinations: Sequence[Combination], counts: Counter[str]) -> None:
    for combination in combinations:
        chosen, rejected = combination.chosen.score, combination.rejected.score
        if combination.problem is None and chosen is not None and rejected is not None:
            counts["better" if chosen > rejected else "worse" if chosen < rejected else "equal"] += 1
