"""Token ids of prompts and of texts from outside: no control token gets in, or stands at an end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from plad_dist.config import Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.model_checks import check_vocabulary
from plad_dist.data.teacher_texts import LearntText, OutsideText, TeacherForms, learn, outside_text
from plad_dist.data.templates import PROBE, Renderer
from plad_dist.errors import UserError
from tests.tiny import TEMPLATE, make_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def renderer(folder: Path) -> Renderer:
    return Renderer(str(folder), Model(path=str(folder), template=TEMPLATE))


def changed(folder: Path, target: Path, change: Any) -> Path:
    """Write a copy of a model whose tokenizer is changed."""
    make_random_model(target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(target)
    return target


def texts_of(learnt: list[LearntText | None]) -> list[str | None]:
    return [None if text is None else text.text for text in learnt]


# -- prompts


def appending_model(folder: Path, target: Path) -> Path:
    """Write a model whose tokenizer puts tokens before and after whole texts."""

    def append_end(tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)

    return changed(folder, target, append_end)


def test_a_prompt_never_ends_with_a_token_that_the_tokenizer_appends(folder: Path, tmp_path: Path) -> None:
    appending = appending_model(folder, tmp_path / "appending")
    plain, other = (Renderer(str(path), Model(path=str(path), template=TEMPLATE)) for path in (folder, appending))
    assert other.tokenizer("a")["input_ids"][-1] == other.tokenizer.eos_token_id
    assert other.prompt_ids([PROBE]) == plain.prompt_ids([PROBE])
    assert other.prompt_ids([PROBE])[0][0] == other.tokenizer.bos_token_id


@pytest.mark.parametrize("end", ["", "{{ eos_token }}"])
def test_a_model_that_reads_conversations_gets_the_token_that_the_tokenizer_appends(
    end: str, folder: Path, tmp_path: Path
) -> None:
    path = str(appending_model(folder, tmp_path / "appending"))
    reader = Renderer(path, Model(path=path, template="{{ messages[-1].content }}" + end), generates=False)
    assert reader.prompt_ids([PROBE]) == [reader.tokenizer("question")["input_ids"]]


# -- texts from outside


@pytest.mark.parametrize(
    ("text", "learnt"),
    [
        ("four", "four"),
        ("four</s>", "four"),
        ("four </s>\n", "four "),
        ("four</s></s>", "four"),
        ("</s>", ""),
        ("four</s> five", None),
        ("<s>four", None),
        ("four <pad>", None),
        ("four < s > five", "four < s > five"),
    ],
)
def test_end_tokens_are_taken_off_and_other_control_tokens_are_refused(
    renderer: Renderer, text: str, learnt: str | None
) -> None:
    [result] = learn([OutsideText(text)], renderer)
    assert texts_of([result]) == [learnt]
    if result is not None:
        assert not set(result.ids) & set(renderer.tokenizer.all_special_ids)
        assert [*result.ids, renderer.end_id] == renderer.response_ids([result.text])[0]


def test_texts_are_learnt_and_checked_if_the_template_needs_a_system_message(folder: Path) -> None:
    template = "{{ messages[0].content }} {{ messages[1].content }}"
    renderer = Renderer(str(folder), Model(path=str(folder), template=template))
    assert texts_of(learn([OutsideText("four")], renderer)) == ["four"]
    check_vocabulary("student", renderer, len(renderer.tokenizer))


def test_characters_that_a_tokenizer_does_not_know_are_no_control_tokens(folder: Path, tmp_path: Path) -> None:
    def add_unknown(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"unk_token": "<unk>"})

    model = changed(folder, tmp_path / "unknown", add_unknown)
    renderer = Renderer(str(model), Model(path=str(model), template=TEMPLATE))
    assert not renderer.control_tokens.has_any([renderer.tokenizer.unk_token_id])
    assert texts_of(learn([OutsideText("a <unk> b")], renderer)) == [None]


def test_the_tokens_of_a_teacher_with_the_students_tokenizer_are_used(renderer: Renderer) -> None:
    merged = renderer.text_ids(["one"])[0]
    letters = [token for letter in (" o", "n", "e") for token in renderer.text_ids([letter])[0][-1:]]
    ids = [*letters, renderer.end_id]
    text = renderer.decode([letters])[0]
    own, foreign = (TeacherForms(same_tokens=names) for names in (("teacher",), ()))
    [used] = learn([outside_text("teacher", text, None, ids, own)], renderer)
    [tokenized] = learn([outside_text("teacher", text, None, ids, foreign)], renderer)
    assert used is not None
    assert tokenized is not None
    assert used.ids == letters
    assert tokenized.ids == renderer.text_ids([text])[0]
    assert merged  # the text has tokens at all


def test_tokens_of_a_teacher_that_stand_for_another_text_are_not_used(renderer: Renderer) -> None:
    ids = renderer.text_ids(["one two STOP"])[0]
    [learnt] = learn([OutsideText("one two ", own_ids=tuple(ids))], renderer)  # a stop string was taken off
    assert learnt is not None
    assert learnt.ids == renderer.text_ids(["one two "])[0]


def test_control_tokens_that_a_teacher_wrote_as_tokens_are_refused(renderer: Renderer) -> None:
    ids = [*renderer.text_ids(["one"])[0], renderer.tokenizer.bos_token_id]
    text = renderer.decode([ids])[0]
    assert learn([OutsideText(text, own_ids=tuple(ids))], renderer) == [None]


# -- the vocabulary of the model


def test_a_model_without_rows_for_its_end_token_is_refused(folder: Path, tmp_path: Path) -> None:
    model = make_random_model(tmp_path / "m")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 400]}))
    with pytest.raises(UserError, match=r"vocabulary of 320 tokens, but its responses end with token 400"):
        check_vocabulary("m", Renderer(str(model), Model(path=str(model), template=TEMPLATE)), 320)


def test_a_model_without_rows_for_tokens_of_texts_is_refused(renderer: Renderer) -> None:
    check_vocabulary("m", renderer, len(renderer.tokenizer))
    with pytest.raises(UserError, match=r"its tokenizer has 4 more, such as token \d+ .*tokenizer of another model"):
        check_vocabulary("m", renderer, len(renderer.tokenizer) - 4)


def test_a_token_for_padding_or_images_needs_no_row_unless_the_template_writes_it(folder: Path, tmp_path: Path) -> None:
    def add_image(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})

    model = changed(folder, tmp_path / "image", add_image)
    rows = len(AutoTokenizer.from_pretrained(folder))
    check_vocabulary("m", Renderer(str(model), Model(path=str(model), template=TEMPLATE)), rows)
    writes = Renderer(str(model), Model(path=str(model), template="<image>" + TEMPLATE))
    with pytest.raises(UserError, match=r"<image>"):
        check_vocabulary("m", writes, rows)


def test_control_tokens_of_users_are_found_but_not_refused(renderer: Renderer) -> None:
    prompt = Conversation([{"role": "user", "content": "what is </s>?"}])
    assert renderer.control_tokens.find(prompt.messages[0]["content"]) == "</s>"
    assert renderer.tokenizer.eos_token_id in renderer.prompt_ids([prompt])[0]
    assert not re.search("</s>", renderer.control_tokens.without_end("what is </s>"))


def test_a_control_token_of_the_teacher_is_no_text_for_a_student_with_another_tokenizer(renderer: Renderer) -> None:
    forms = TeacherForms(keep_thought=("teacher",), control_texts=("<|python_tag|>",))
    texts = [("four", None), ("<|python_tag|>four", None), ("four", "I <|python_tag|> count")]
    learnt = learn([outside_text("teacher", text, thought, (), forms) for text, thought in texts], renderer)
    assert [item is None for item in learnt] == [False, True, True]
