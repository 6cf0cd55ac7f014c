"""Pairs of models that think, teachers' own tokens, and signs that tell chosen from rejected."""

from __future__ import annotations

import re

import pytest

from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.tells import warnings
from tests.unit.pairing.test_pairing import build, renderer, sample

__all__ = ["renderer"]  # a fixture


def test_the_student_learns_the_answer_or_thought_and_answer(renderer: Renderer) -> None:
    teacher = [sample("p", "one two", "teacher") | {"reasoning": "three"}]
    student = [sample("p", "four", "student")]
    rows, counts = build(renderer, teacher, student)
    assert rows[0]["chosen_text"] == "one two"
    assert counts["thought:chosen"] == 0
    keep = TeacherForms(keep_thought=("teacher",))
    rows, counts = build(renderer, teacher, student, forms=keep)
    assert rows[0]["chosen_text"] == "<think>\nthree\n</think>\n\none two"
    assert rows[0]["chosen_token_ids"] == renderer.response_ids([rows[0]["chosen_text"]])[0]
    assert rows[0]["chosen_score"] == 1.0, "the answer is scored"
    assert counts["thought:chosen"] == 1


def test_a_student_that_thinks_is_paired_whole(renderer: Renderer) -> None:
    ids = [*renderer.text_ids(["<think>three</think>four"])[0], renderer.end_id]
    student = [sample("p", "four", "student", ids) | {"reasoning": "three"}]
    rows, counts = build(renderer, [sample("p", "one", "teacher")], student)
    assert rows[0]["rejected_token_ids"] == ids
    assert rows[0]["rejected_text"].strip() == "<think>three</think>four"
    assert (counts["thought:rejected"], counts["unmatched:rejected"]) == (1, 0)


def test_a_thought_of_the_student_that_never_ended_is_no_empty_response(renderer: Renderer) -> None:
    ids = renderer.text_ids(["<think>three"])[0]
    student = [sample("p", "", "student", ids, finish="length") | {"reasoning": "three"}]
    rows, counts = build(renderer, [sample("p", "one", "teacher")], student)
    assert rows[0]["rejected_token_ids"] == ids
    assert counts["unmatched:rejected"] == 1


def test_a_teacher_with_the_students_tokenizer_is_paired_in_its_own_tokens(renderer: Renderer) -> None:
    ids = [token for letter in "one" for token in renderer.text_ids([letter])[0][-1:]]
    text = renderer.decode([ids])[0]
    teacher = [sample("p", text, "teacher", [*ids, renderer.end_id])]
    shares = TeacherForms(same_tokens=("teacher",))
    rows, _ = build(renderer, teacher, [sample("p", "four", "student")], forms=shares)
    assert rows[0]["chosen_token_ids"] == [*ids, renderer.end_id]
    rows, _ = build(renderer, teacher, [sample("p", "four", "student")])
    assert rows[0]["chosen_token_ids"] == renderer.response_ids([text])[0]


@pytest.mark.parametrize(
    ("counts", "warning"),
    [
        (
            {"first:chosen:a space": 40, "first:rejected:a letter": 40},
            "100% of chosen ones begin with a space, 0% of rej",
        ),
        ({"first:chosen:a space": 40, "first:rejected:a space": 30, "first:rejected:a letter": 10}, None),
        ({"thought:rejected": 20}, "chosen ones have none.*student.template_kwargs"),
        ({"thought:rejected": 20, "thought:chosen": 40}, None),
        ({"opened": 40}, "prompts open a thought, but chosen responses have none"),
        ({"unmatched:chosen": 1}, "1 chosen and 0 rejected responses open or close a thought without its counterpart"),
        ({"control_prompts": 3}, "3 prompts hold control tokens"),
    ],
)
def test_what_tells_chosen_from_rejected_is_warned_of(counts: dict[str, int], warning: str | None) -> None:
    texts = warnings(PairFacts.from_counts({"pairs": 40} | counts))
    assert bool(texts) == (warning is not None)
    if warning is not None:
        assert re.search(warning, texts[0])
