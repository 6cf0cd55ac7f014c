"""Responses of teachers and references as texts and tokens that the student learns.

Such a text comes from outside: it may hold control tokens of the student, and a thought that the
student is to learn or not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from plad_dist.data.control_tokens import any_of
from plad_dist.data.templates import Renderer


@dataclass(frozen=True)
class TeacherForms:
    """How the responses of each teacher become responses of the student. A single teacher is named
    `teacher`.

    Attributes:
        keep_thought: teachers whose thoughts the student learns too.
        same_tokens: teachers with the student's tokenizer, whose own tokens are used.
        control_texts: control tokens of the teachers, as texts. To a student with another
            tokenizer they would be ordinary text.
    """

    keep_thought: Collection[str] = field(default=())
    same_tokens: Collection[str] = field(default=())
    control_texts: Collection[str] = field(default=())

    def to_json(self) -> dict[str, list[str]]:
        """Return the fields for fingerprints."""
        return {
            "keep_thought": sorted(self.keep_thought),
            "same_tokens": sorted(self.same_tokens),
            "control_texts": sorted(self.control_texts),
        }

    def has_control_text(self, text: str) -> bool:
        """Return True if a text contains a control token of a teacher."""
        return self._control.search(text) is not None

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return any_of(self.control_texts)


@dataclass(frozen=True, slots=True)
class OutsideText:
    """A text from outside, before it is tokenized.

    Attributes:
        text: the answer.
        reasoning: the thought before it, None without one or if the student is not to learn it.
        own_ids: the writer's own tokens of thought and answer; empty if they are not the student's.
        has_control: True if it contains a control token of its writer.
    """

    text: str
    reasoning: str | None = None
    own_ids: tuple[int, ...] = ()
    has_control: bool = False


@dataclass(frozen=True, slots=True)
class LearntText:
    """A text in the student's form.

    Attributes:
        text: thought and answer.
        ids: tokens of the student, without the one that ends a response.
    """

    text: str
    ids: list[int]


def outside_text(
    teacher: str, text: str, reasoning: str | None, ids: Sequence[int], forms: TeacherForms
) -> OutsideText:
    """Return a stored response of a teacher as the student is to learn it."""
    thought = reasoning if teacher in forms.keep_thought else None
    return OutsideText(
        text,
        thought,
        tuple(ids) if teacher in forms.same_tokens else (),
        forms.has_control_text(text) or forms.has_control_text(thought or ""),
    )


def learn(texts: Sequence[OutsideText], renderer: Renderer) -> list[LearntText | None]:
    """Return texts in the student's form and tokens.

    End tokens at the end of a text are taken off. A text with another control token is None.
    """
    control, form = renderer.control_tokens, renderer.form
    learnt: dict[OutsideText, LearntText | None] = {}
    written: dict[OutsideText, str] = {}
    for text in dict.fromkeys(texts):
        answer = control.without_end(text.text)
        if text.has_control or control.find(answer) or control.find(text.reasoning or ""):
            learnt[text] = None
        elif own := _own_tokens(text, answer, renderer):
            learnt[text] = own
        else:
            written[text] = form.write(text.reasoning, answer)
    for (text, whole), ids in zip(written.items(), renderer.text_ids(list(written.values())), strict=True):
        # The form itself may have control tokens, such as the header of a channel.
        has_foreign = not control.find(form.write(text.reasoning and "", "")) and control.has_any(ids)
        learnt[text] = None if has_foreign else LearntText(whole, ids)
    return [learnt[text] for text in texts]


def _own_tokens(text: OutsideText, answer: str, renderer: Renderer) -> LearntText | None:
    """Return the tokens that the teacher wrote, None if they stand for another text.

    They do if a thought or a stop string was taken off, or if the prompt of only one of the two
    models opens the thought.
    """
    form, ids = renderer.form, renderer.without_end(text.own_ids)
    if not ids or renderer.control_tokens.has_any(ids):
        return None
    [decoded] = renderer.decode([ids])
    if text.reasoning is None:
        # Some tokenizers drop the space that begins a text.
        is_same = decoded.lstrip(" ") == answer.lstrip(" ") and not form.answer_prefix
        return LearntText(answer, ids) if is_same else None
    before, found, after = decoded.partition(text.reasoning)
    is_same = bool(found) and after.endswith(answer) and before.strip() == form.thought_prefix.strip()
    return LearntText(decoded, ids) if is_same else None
