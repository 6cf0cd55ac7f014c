"""Thoughts are told from answers, and written in the form of the model that learns them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from plad_dist.config import Model
from plad_dist.data.reasoning import ResponseForm, Separated, has_unmatched_tags, opened_tag, separate
from plad_dist.data.teacher_texts import OutsideText, TeacherForms, learn, outside_text
from plad_dist.data.templates import Renderer
from tests.tiny import TEMPLATE, make_random_model
from tests.unit.data.test_templates import CHATML, SHIPPED, with_chat_template

HARMONY = "<|channel|>analysis<|message|>I count.<|end|><|start|>assistant<|channel|>final<|message|>Four."
THINKS_ALWAYS = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("Four.", None, Separated(None, "Four.")),
        ("<think>\nI count.\n</think>\n\nFour.", None, Separated("I count.", "Four.")),
        ("I count.\n</think>\n\nFour.", "<think>", Separated("I count.", "Four.")),
        ("<think>I count.</think>Four.", "<think>", Separated("I count.", "Four.")),
        ("<think>\n\n</think>\n\nFour.", None, Separated(None, "Four.")),
        ("<think>I count", None, Separated("I count", "", is_complete=False)),
        ("I count", "<think>", Separated("I count", "", is_complete=False)),
        ("<think>I count.</think>", None, Separated("I count.", "")),
        ("[THINK]I count.[/THINK]Four.", None, Separated("I count.", "Four.")),
        ("The tag <think> opens a thought.", None, Separated(None, "The tag <think> opens a thought.")),
        ("I count.</think>Four.", None, Separated(None, "I count.</think>Four.")),
        (HARMONY, None, Separated("I count.", "Four.")),
        (HARMONY + "<|return|>", None, Separated("I count.", "Four.")),
        ("<|channel|>final<|message|>Four.", None, Separated(None, "Four.")),
        ("<|channel|>analysis<|message|>I count", None, Separated("I count", "", is_complete=False)),
    ],
)
def test_a_thought_is_told_from_its_answer(text: str, opened: str | None, expected: Separated) -> None:
    assert separate(text, opened) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I count.</think>\nFour.", Separated("I count.", "Four.")),
        ("analysisI count.assistantfinalFour.", Separated("I count.", "Four.")),
        ("Four.", Separated(None, "Four.")),
    ],
)
def test_a_thought_of_a_server_may_have_begun_in_the_prompt(text: str, expected: Separated) -> None:
    assert separate(text, prompt_is_known=False) == expected


@pytest.mark.parametrize(
    ("text", "opened", "unmatched"),
    [
        ("Four.", None, False),
        ("<think>I count.</think>Four.", None, False),
        ("<think>I count.", None, True),
        ("I count.</think>Four.", None, True),
        ("I count.</think>Four.", "<think>", False),
        ("Four.", "<think>", True),
    ],
)
def test_tags_without_their_counterpart_are_found(text: str, opened: str | None, unmatched: bool) -> None:
    assert has_unmatched_tags(text, opened) == unmatched


def test_the_tag_that_a_prompt_opens_is_found_in_its_tokens(tmp_path: Path) -> None:
    folder = with_chat_template(tmp_path / "m", THINKS_ALWAYS, "<|im_start|>", "<|im_end|>")
    renderer = Renderer(str(folder), Model(path=str(folder)))
    prompt = [{"role": "user", "content": "one"}]
    text = renderer.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert opened_tag(text) == "<think>"
    assert renderer.opened_tag(renderer.tokenizer(text)["input_ids"]) == "<think>"


# -- the form of the model that learns


def form_of(folder: Path, template: str, **settings: Any) -> ResponseForm:
    return Renderer(str(folder), Model(path=str(folder), template=template, **settings)).form


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.mark.parametrize(
    ("name", "kwargs", "thought", "answer"),
    [
        ("qwen3", {}, "<think>\nT\n</think>\n\nA", "A"),
        ("qwen3_5_think", {}, "T\n</think>\n\nA", "A"),
        ("deepseek_r1_distill", {}, "T\n</think>\n\nA", "A"),
        ("qwen2_5", {}, "<think>\nT\n</think>\n\nA", "A"),
        (
            "gptoss",
            {},
            "<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>A",
            "<|channel|>final<|message|>A",
        ),
    ],
)
def test_a_thought_is_written_in_the_form_of_the_students_template(
    folder: Path, name: str, kwargs: dict[str, Any], thought: str, answer: str
) -> None:
    form = form_of(folder, SHIPPED[name], template_kwargs=kwargs)
    assert form.write("T", "A") == thought
    assert form.write(None, "A") == answer


@pytest.mark.parametrize(("keeps", "text"), [((), "four"), (("teacher",), "<think>\nI count\n</think>\n\nfour")])
def test_the_student_learns_the_thought_only_if_it_is_kept(folder: Path, keeps: tuple[str, ...], text: str) -> None:
    renderer = Renderer(str(folder), Model(path=str(folder), template=TEMPLATE))
    outside = outside_text("teacher", "four", "I count", (), TeacherForms(keep_thought=keeps))
    [learnt] = learn([outside], renderer)
    assert learnt is not None
    assert learnt.text == text
    assert learnt.ids == renderer.text_ids([text])[0]


def test_the_tag_that_the_students_prompt_opens_is_not_written_twice(tmp_path: Path) -> None:
    folder = with_chat_template(tmp_path / "m", THINKS_ALWAYS, "<|im_start|>", "<|im_end|>")
    [learnt] = learn([OutsideText("four", "I count")], Renderer(str(folder), Model(path=str(folder))))
    assert learnt is not None
    assert learnt.text == "I count\n</think>\n\nfour"


def test_a_control_token_in_a_thought_is_refused_like_one_in_an_answer(folder: Path) -> None:
    renderer = Renderer(str(folder), Model(path=str(folder), template=TEMPLATE))
    assert learn([OutsideText("four", "I </s> count")], renderer) == [None]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
