"""The samples of a block as responses: grouped by prompt, checked, and in student tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Literal

import pyarrow as pa

from plad_dist.config import Pairing
from plad_dist.data.conversation import COLUMNS, Conversation
from plad_dist.data.templates import Renderer

Role = Literal["teacher", "student"]
DropReason = Literal[
    # of one response
    "error",
    "chosen_truncated",
    "rejected_truncated",
    "chosen_empty",
    "rejected_empty",
    "too_long",
    # of a combination
    "identical",
    "length_ratio",
    "no_score",
    "score_gap",
    "duplicate",
    "over_max_pairs_per_prompt",
]

_EMPTY: dict[Role, DropReason] = {"teacher": "chosen_empty", "student": "rejected_empty"}
_TRUNCATED: dict[Role, DropReason] = {"teacher": "chosen_truncated", "student": "rejected_truncated"}


@dataclass(slots=True)
class SampledResponse:
    """One sample.

    Attributes:
        ids: student tokens. Of a teacher response they are set by :func:`tokenize`.
        is_finished: the response ended with an end-of-sequence token.
        problem: reason for which no pair can contain the response, None for a usable one.
        logprob: log-likelihood that the engine reported for exactly `ids`, None without one.
        score: quality by `pairing.score`, None without one.
    """

    role: Role
    text: str
    ids: list[int]
    is_finished: bool
    problem: DropReason | None
    logprob: float | None = None
    score: float | None = None


@dataclass(slots=True)
class SampledPrompt:
    """A prompt with the responses of both models, in the order of their sample indices."""

    prompt_id: str
    conversation: Conversation
    reference: str | None
    teacher: list[SampledResponse]
    student: list[SampledResponse]
    prompt_ids: list[int] = field(default_factory=list)

    def usable(self) -> list[SampledResponse]:
        """Return the usable responses, or an empty list if one of the models has none."""
        sides = [[response for response in side if response.problem is None] for side in (self.teacher, self.student)]
        return [*sides[0], *sides[1]] if all(sides) else []


def read_prompts(
    prompts: pa.Table, teacher: pa.Table, student: pa.Table, pairing: Pairing, renderer: Renderer
) -> list[SampledPrompt]:
    """Return the prompts of a block that have samples. Those beyond `sampling.limit` have none."""
    by_teacher = _responses(teacher, "teacher", pairing, renderer)
    by_student = _responses(student, "student", pairing, renderer)
    return [
        SampledPrompt(
            prompt_id := row["prompt_id"],
            Conversation.from_row(row),
            row["reference"],
            by_teacher.get(prompt_id, []),
            by_student.get(prompt_id, []),
        )
        for row in prompts.select(["prompt_id", "reference", *COLUMNS]).to_pylist()
        if row["prompt_id"] in by_teacher or row["prompt_id"] in by_student
    ]


def _responses(samples: pa.Table, role: Role, pairing: Pairing, renderer: Renderer) -> dict[str, list[SampledResponse]]:
    """Return the responses of each prompt, in the order of their sample indices."""
    names = ("prompt_id", "sample_index", "text", "finish_reason", "logprob")
    # The teacher's tokens belong to another vocabulary: its text is tokenized later.
    ids_column = samples["token_ids"].to_pylist() if role == "student" else repeat([], samples.num_rows)
    rows = sorted(
        zip(*(samples[name].to_pylist() for name in names), ids_column, strict=True), key=lambda row: (row[0], row[1])
    )
    responses: dict[str, list[SampledResponse]] = {}
    for prompt_id, _, text, finish_reason, logprob, ids in rows:
        is_empty = not text.strip() or (role == "student" and not ids)
        problem = _problem(role, finish_reason, is_empty, pairing)
        is_finished = finish_reason == "stop"
        if is_finished and not (ids and ids[-1] in renderer.end_ids):
            ids, logprob = [*ids, renderer.end_id], None
        responses.setdefault(prompt_id, []).append(
            SampledResponse(role, text, ids, is_finished, problem, logprob if role == "student" else None)
        )
    return responses


def _problem(role: Role, finish_reason: str, is_empty: bool, pairing: Pairing) -> DropReason | None:
    truncated = pairing.truncated_chosen if role == "teacher" else pairing.truncated_rejected
    if finish_reason == "error":
        return "error"
    if finish_reason == "length" and truncated == "drop":
        return _TRUNCATED[role]
    return _EMPTY[role] if is_empty and pairing.empty == "drop" else None


def tokenize(prompts: Sequence[SampledPrompt], renderer: Renderer, limit: int) -> None:
    """Set the token ids of prompts and teacher responses, and mark responses that are too long or
    empty.

    Only prompts with usable responses of both models are tokenized. A prompt that the student's
    template cannot render has no response of the student, so it is never rendered here.

    Args:
        limit: maximum length of prompt and response together, in tokens.
    """
    usable = [(prompt, responses) for prompt in prompts if (responses := prompt.usable())]
    prompt_ids = renderer.prompt_ids([prompt.conversation for prompt, _ in usable])
    for (prompt, _), ids in zip(usable, prompt_ids, strict=True):
        prompt.prompt_ids = ids
    texts = list({r.text: None for _, responses in usable for r in responses if r.role == "teacher"})
    ids_of = dict(zip(texts, renderer.response_ids(texts), strict=True))
    for prompt, responses in usable:
        for response in responses:
            if response.role == "teacher":
                ids = ids_of[response.text]
                response.ids = ids if response.is_finished else ids[:-1]
            if not response.ids:  # truncated before its first token, so nothing can be learnt from it
                response.problem = _EMPTY[response.role]
            elif len(prompt.prompt_ids) + len(response.ids) > limit:
                response.problem = "too_long"
