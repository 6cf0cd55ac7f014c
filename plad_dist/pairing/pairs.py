"""Pseudo-preference pairs of one block: the teacher's responses over the student's, in the student's tokens. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal

import pyarrow as pa

from plad_dist.config import Pairing
from plad_dist.data.parts import Part
from plad_dist.data.schemas import PAIRS
from plad_dist.data.templates import Messages, Renderer
from plad_dist.errors import RunFailed
from plad_dist.pairing.answer import Answer, Scorer

_Role = Literal["teacher", "student"]


def pair_facts(counts: Mapping[str, int]) -> dict[str, Any]:
    """What the pair builder found, for the manifest and the report. The teacher's share of wins tells the capacity gap."""
    won, lost, tied = (counts.get(name, 0) for name in ("better", "worse", "equal"))
    scored = won + lost + tied
    return {
        "prompts": counts.get("prompts", 0),
        "pairs": counts.get("pairs", 0),
        "drops": {key.removeprefix("drop:"): count for key, count in sorted(counts.items()) if key.startswith("drop:")},
        "teacher_better_share": won / scored if scored else None,
        "teacher_worse_share": lost / scored if scored else None,
        "scored": scored,
        "unscored": counts.get("unscored", 0),
    }


def facts_of(parts: Sequence[Part]) -> dict[str, Any]:
    """The facts of a whole dataset, from the counts of its parts. Raises :class:`RunFailed` where not one pair was left."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    facts = pair_facts(counts)
    if not facts["pairs"]:
        raise RunFailed(f"no pair was left of {facts['prompts']:,} prompts. Dropped, by reason: {facts['drops']}")
    return facts


@dataclass(slots=True)
class _Response:
    """One sample.

    Attributes:
        ids: in the student's tokens; `logprob` is what the engine reported for just these.
        problem: why it can be in no pair, None for a usable one.
    """

    role: _Role
    text: str
    ids: list[int]
    finished: bool
    problem: str | None
    logprob: float | None = None
    score: float | None = None


@dataclass(slots=True)
class _Group:
    """A prompt with its samples, in the order of their indices."""

    prompt_id: str
    messages: Messages
    reference: str | None
    chosen: list[_Response]
    rejected: list[_Response]
    prompt_ids: list[int] = field(default_factory=list)

    def usable(self) -> list[_Response]:
        """The usable responses, none where one of the two sides has none."""
        sides = [[response for response in side if response.problem is None] for side in (self.chosen, self.rejected)]
        return [*sides[0], *sides[1]] if all(sides) else []


@dataclass(frozen=True)
class PairBuilder:
    """Makes the pairs of a block, and counts why the others were dropped.

    Attributes:
        renderer: of the student.
        context: the student's, in tokens.
        scorer: what scores a response by itself, None for `score: none`.
    """

    pairing: Pairing
    renderer: Renderer
    context: int
    scorer: Scorer | None

    def build(
        self, prompts: pa.Table, teacher: pa.Table, student: pa.Table, round_: int = 0
    ) -> tuple[pa.Table, Counter[str]]:
        """Rows of the pairs dataset, and counts.

        Counted are prompts, pairs, the `groups` that they make and the tokens of what is trained on, `drop:<reason>` of every combination that is considered and not kept, `unscored`
        responses, and how often the teacher's score is better, worse or equal. These compare all usable combinations of a
        prompt, so that they tell the same whatever is kept.
        """
        counts: Counter[str] = Counter()
        answers = self._responses(teacher, "teacher"), self._responses(student, "student")
        columns = (prompts[name].to_pylist() for name in ("prompt_id", "messages", "reference"))
        groups = [
            _Group(*row, *sides)
            for row in zip(*columns, strict=True)
            if any(sides := [side.get(row[0], []) for side in answers])  # past sampling.limit there is none
        ]
        counts["prompts"] = len(groups)
        self._tokenize(groups)
        self._score(groups, counts)
        pairs = [(group, *pair) for group in groups for pair in self._select(group, counts)]
        counts["pairs"] = len(pairs)
        _count_groups(pairs, counts)
        return _table(pairs, round_), counts

    # -- responses, one by one

    def _responses(self, samples: pa.Table, role: _Role) -> dict[str, list[_Response]]:
        """The samples of each prompt, in the order of their indices."""
        names = ("prompt_id", "sample_index", "text", "finish_reason", "logprob")
        # The teacher's tokens are its own: its text is what is tokenized.
        ids = samples["token_ids"].to_pylist() if role == "student" else repeat([], samples.num_rows)
        rows = sorted(
            zip(*(samples[name].to_pylist() for name in names), ids, strict=True), key=lambda row: (row[0], row[1])
        )
        found: dict[str, list[_Response]] = {}
        for prompt_id, _, text, finish, logprob, own in rows:
            empty = not text.strip() or (role == "student" and not own)
            problem = self._problem(role, finish, empty)
            finished = finish == "stop"
            if finished and not (own and own[-1] in self.renderer.end_ids):
                own, logprob = [*own, self.renderer.end_id], None
            found.setdefault(prompt_id, []).append(
                _Response(role, text, own, finished, problem, logprob if role == "student" else None)
            )
        return found

    def _problem(self, role: _Role, finish: str, empty: bool) -> str | None:
        side = "chosen" if role == "teacher" else "rejected"
        truncated = self.pairing.truncated_chosen if role == "teacher" else self.pairing.truncated_rejected
        if finish == "error":
            return "error"
        if finish == "length" and truncated == "drop":
            return f"{side}_truncated"
        return f"{side}_empty" if empty and self.pairing.empty == "drop" else None

    def _tokenize(self, groups: list[_Group]) -> None:
        """Token ids of the prompts and of the teacher's responses, where they may be needed."""
        # A prompt that the student's template cannot render has no answer of the student, and is not rendered here either.
        usable = [(group, responses) for group in groups if (responses := group.usable())]
        for (group, _), ids in zip(
            usable, self.renderer.prompt_ids([group.messages for group, _ in usable]), strict=True
        ):
            group.prompt_ids = ids
        texts = list({r.text: None for _, responses in usable for r in responses if r.role == "teacher"})
        ids_of = dict(zip(texts, self.renderer.response_ids(texts), strict=True))
        limit = min(self.pairing.max_tokens or self.context, self.context)
        for group, responses in usable:
            for response in responses:
                if response.role == "teacher":
                    ids = ids_of[response.text]
                    response.ids = ids if response.finished else ids[:-1]
                if not response.ids:  # truncated before its first token: nothing at all to learn from
                    response.problem = "chosen_empty" if response.role == "teacher" else "rejected_empty"
                elif len(group.prompt_ids) + len(response.ids) > limit:
                    response.problem = "too_long"

    def _score(self, groups: list[_Group], counts: Counter[str]) -> None:
        """Scores of all usable responses, each distinct one scored once."""
        if self.scorer is None:
            return
        alike: dict[tuple[str, str, str], list[_Response]] = {}
        answers: list[Answer] = []
        for group in groups:
            for response in group.usable():
                same = alike.setdefault((group.prompt_id, response.role, response.text), [])
                if not same:
                    answers.append(
                        Answer(
                            messages=group.messages,
                            reference=group.reference,
                            response=response.text,
                            role=response.role,
                        )
                    )
                same.append(response)
        scores = self.scorer(answers) if answers else []
        for same, score in zip(alike.values(), scores, strict=True):
            counts["unscored"] += score is None
            for response in same:
                response.score = score

    # -- combinations

    def _select(self, group: _Group, counts: Counter[str]) -> Iterator[tuple[_Response, _Response]]:
        """The pairs of a prompt that are kept; what else is considered is counted by its reason."""
        combinations = [(*pair, self._unusable(*pair)) for pair in _combinations(group.chosen, group.rejected)]
        _compare(combinations, counts)
        if self.pairing.combine == "best_worst":
            combinations = self._best_worst(group, combinations)
        most = self.pairing.max_pairs_per_prompt if self.pairing.combine == "all" else 1
        kept: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for better, worse, problem in combinations:
            if len(kept) == most:
                if self.pairing.combine == "one":
                    return
                problem = "over_max_pairs_per_prompt"
            if problem is None:
                problem = self._gap_problem(better, worse)
            if problem is None:
                pair = tuple(better.ids), tuple(worse.ids)
                if pair not in kept:
                    kept.add(pair)
                    yield better, worse
                    continue
                problem = "duplicate"
            counts[f"drop:{problem}"] += 1

    def _best_worst(self, group: _Group, combinations: list[_Combination]) -> list[_Combination]:
        """The teacher's best against the student's worst, the lower index where scores are equal: one combination."""
        usable = group.usable()
        if not usable:
            return combinations[:1]  # for its reason
        scored = [[r for r in usable if r.role == role and r.score is not None] for role in ("teacher", "student")]
        if not all(scored):
            return [(*combinations[0][:2], "no_score")]
        best, worst = max(scored[0], key=_score), min(scored[1], key=_score)
        return [(best, worst, self._unusable(best, worst))]

    def _unusable(self, better: _Response, worse: _Response) -> str | None:
        """Why two responses make no pair, whatever their scores."""
        if problem := better.problem or worse.problem:
            return problem
        if self.pairing.identical == "drop" and (better.text.strip() == worse.text.strip() or better.ids == worse.ids):
            return "identical"
        if self.pairing.length_ratio is not None:
            low, high = self.pairing.length_ratio
            if not low <= len(better.ids) / len(worse.ids) <= high:
                return "length_ratio"
        return None

    def _gap_problem(self, better: _Response, worse: _Response) -> str | None:
        if self.pairing.min_score_gap is None:
            return None
        if better.score is None or worse.score is None:
            return "no_score"
        return "score_gap" if better.score - worse.score < self.pairing.min_score_gap else None


_Combination = tuple[_Response, _Response, str | None]


def _combinations(chosen: list[_Response], rejected: list[_Response]) -> Iterator[tuple[_Response, _Response]]:
    """All pairs of samples; those that use every sample once come first."""
    for shift in range(len(rejected)):
        for index, better in enumerate(chosen):
            yield better, rejected[(index + shift) % len(rejected)]


def _compare(combinations: list[_Combination], counts: Counter[str]) -> None:
    for better, worse, problem in combinations:
        if problem is None and better.score is not None and worse.score is not None:
            sign = (better.score > worse.score) - (better.score < worse.score)
            counts[("equal", "better", "worse")[sign]] += 1


def _count_groups(pairs: list[tuple[_Group, _Response, _Response]], counts: Counter[str]) -> None:
    """Prompts with pairs and their distinct responses: what the trainer computes, each once."""
    sides: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for group, better, worse in pairs:
        found = sides.setdefault(group.prompt_id, {"chosen": set(), "rejected": set()})
        if not found["chosen"]:
            counts["groups"] += 1
            counts["tokens:prompt"] += len(group.prompt_ids)
        for side, response in (("chosen", better), ("rejected", worse)):
            ids = tuple(response.ids)
            if ids not in found[side]:
                found[side].add(ids)
                counts[f"responses:{side}"] += 1
                counts[f"tokens:prompts_of_{side}"] += len(group.prompt_ids)
                counts[f"tokens:{side}"] += len(ids)


def _score(response: _Response) -> float:
    assert response.score is not None
    return response.score


def _table(pairs: list[tuple[_Group, _Response, _Response]], round_: int) -> pa.Table:
    columns = {
        "prompt_id": [group.prompt_id for group, _, _ in pairs],
        "prompt_token_ids": [group.prompt_ids for group, _, _ in pairs],
        "chosen_token_ids": [better.ids for _, better, _ in pairs],
        "rejected_token_ids": [worse.ids for _, _, worse in pairs],
        "chosen_text": [better.text for _, better, _ in pairs],
        "rejected_text": [worse.text for _, _, worse in pairs],
        "chosen_score": [better.score for _, better, _ in pairs],
        "rejected_score": [worse.score for _, _, worse in pairs],
        "rejected_logprob": [worse.logprob for _, _, worse in pairs],
        "round": [round_] * len(pairs),
    }
    return pa.table(columns, schema=PAIRS)
