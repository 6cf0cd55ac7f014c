"""The samples of a block as responses: grouped by prompt, checked, and in student tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from plad_dist.config import Pairing
from plad_dist.data.conversation import COLUMNS, Conversation
from plad_dist.data.teacher_texts import OutsideText, learn, outside_text
from plad_dist.data.templates import Renderer
from plad_dist.pairing.forms import REJECTED, PairForms

Role = Literal["teacher", "student"]
DropReason = Literal[
    # of one response
    "error",
    "chosen_truncated",
    "rejected_truncated",
    "chosen_empty",
    "rejected_empty",
    "control_token",
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
        text: what the student learns, with the thought if it learns one.
        answer: the text without a thought, which is scored.
        ids: student tokens. Those of another model's response are set by :func:`tokenize`.
        has_thought: the text has a thought.
        outside: another model's response before it is tokenized, None for the student's.
        is_finished: the response ended with an end-of-sequence token.
        problem: reason for which no pair can contain the response, None for a usable one.
        logprob: log-likelihood of exactly `ids` under the student that the round starts from, as
            the engine reported it; None without one.
        score: quality by `pairing.score`, None without one.
    """

    role: Role  # side of its pairs, whichever model wrote it
    text: str
    answer: str
    ids: list[int]
    is_finished: bool
    problem: DropReason | None
    has_thought: bool = False
    outside: OutsideText | None = None
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
    prompts: pa.Table, teacher: pa.Table, student: pa.Table, pairing: Pairing, renderer: Renderer, forms: PairForms
) -> list[SampledPrompt]:
    """Return the prompts of a block that have samples. Those beyond `sampling.limit` have none."""
    rows = prompts.select(["prompt_id", "reference", "teacher", *COLUMNS]).to_pylist()
    by_teacher: dict[str, list[SampledResponse]] = {}
    teachers = {row["prompt_id"]: row["teacher"] or "teacher" for row in rows}
    for row in _ordered(teacher, ["reasoning", "token_ids"]):
        writer = teachers[row["prompt_id"]]
        outside = outside_text(writer, row["text"], row["reasoning"], row["token_ids"], forms.teachers)
        response = _outside_response("teacher", row, outside, pairing, renderer)
        by_teacher.setdefault(row["prompt_id"], []).append(response)
    by_student: dict[str, list[SampledResponse]] = {}
    for row in _ordered(student, ["reasoning", "token_ids", "logprob"]):
        if forms.rejected is None:
            response = _student_response(row, pairing, renderer, is_on_policy=forms.is_on_policy)
        else:
            outside = outside_text(REJECTED, row["text"], row["reasoning"], row["token_ids"], forms.rejected)
            response = _outside_response("student", row, outside, pairing, renderer)
        by_student.setdefault(row["prompt_id"], []).append(response)
    return [
        SampledPrompt(
            row["prompt_id"],
            Conversation.from_row(row),
            row["reference"],
            by_teacher.get(row["prompt_id"], []),
            by_student.get(row["prompt_id"], []),
        )
        for row in rows
        if row["prompt_id"] in by_teacher or row["prompt_id"] in by_student
    ]


def _ordered(samples: pa.Table, columns: list[str]) -> list[dict[str, Any]]:
    """Return the rows of samples in the order of prompts and sample indices."""
    rows = samples.select(["prompt_id", "sample_index", "text", "finish_reason", *columns]).to_pylist()
    return sorted(rows, key=lambda row: (row["prompt_id"], row["sample_index"]))


def _outside_response(
    role: Role, row: dict[str, Any], outside: OutsideText, pairing: Pairing, renderer: Renderer
) -> SampledResponse:
    """Return another model's response, without end tokens in its text. Its tokens are set later."""
    control = renderer.control_tokens
    answer = control.without_end(outside.text)
    problem = _problem(role, row["finish_reason"], not answer.strip(), pairing)
    if problem is None and (control.find(answer) or control.find(outside.reasoning or "")):
        problem = "control_token"
    return SampledResponse(
        role=role,
        text=answer,
        answer=answer,
        ids=[],
        is_finished=row["finish_reason"] == "stop",
        problem=problem,
        has_thought=outside.reasoning is not None,
        outside=outside,
    )


def _student_response(
    row: dict[str, Any], pairing: Pairing, renderer: Renderer, *, is_on_policy: bool
) -> SampledResponse:
    """Return a student's response as it was sampled, thought included."""
    ids, logprob, answer = row["token_ids"], row["logprob"], row["text"]
    text = answer if row["reasoning"] is None else renderer.decode([renderer.without_end(ids)])[0]
    is_finished = row["finish_reason"] == "stop"
    problem = _problem("student", row["finish_reason"], not text.strip() or not ids, pairing)
    if is_finished and not (ids and ids[-1] in renderer.end_ids):
        ids, logprob = [*ids, renderer.end_id], None
    return SampledResponse(
        role="student",
        text=text,
        answer=answer,
        ids=ids,
        is_finished=is_finished,
        problem=problem,
        has_thought=row["reasoning"] is not None,
        logprob=logprob if is_on_policy else None,
    )


def _problem(role: Role, finish_reason: str, is_empty: bool, pairing: Pairing) -> DropReason | None:
    truncated = pairing.truncated_chosen if role == "teacher" else pairing.truncated_rejected
    if finish_reason == "error":
        return "error"
    if finish_reason == "length" and truncated == "drop":
        return _TRUNCATED[role]
    return _EMPTY[role] if is_empty and pairing.empty == "drop" else None


def tokenize(prompts: Sequence[SampledPrompt], renderer: Renderer, limit: int) -> None:
    """Set the token ids of prompts and of other models' responses, and mark responses that are too
    long or empty.

    Only prompts with usable responses of both models are tokenized. A prompt that the student's
    template cannot render has no response of the student, so it is never rendered here.

    Args:
        limit: maximum length of prompt and response together, in tokens.
    """
    usable = [(prompt, responses) for prompt in prompts if (responses := prompt.usable())]
    prompt_ids = renderer.prompt_ids([prompt.conversation for prompt, _ in usable])
    for (prompt, _), ids in zip(usable, prompt_ids, strict=True):
        prompt.prompt_ids = ids
    outside = [response for _, responses in usable for response in responses if response.outside is not None]
    learnt = learn([response.outside for response in outside if response.outside is not None], renderer)
    for response, text in zip(outside, learnt, strict=True):
        if text is None:
            response.problem = "control_token"
            continue
        response.text, response.ids = text.text, [*text.ids, *([renderer.end_id] if response.is_finished else [])]
    for prompt, responses in usable:
        for response in responses:
            if response.problem is not None:
                continue
            if not response.ids:  # truncated before its first token, so nothing can be learnt from it
                response.problem = _EMPTY[response.role]
            elif len(prompt.prompt_ids) + len(response.ids) > limit:
                response.problem = "too_long"
