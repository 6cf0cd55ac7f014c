"""Pairs: the teacher over the student, in the student's tokens; what is not a preference is dropped and counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.config import Model, Pairing, ScratchModel
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.data.templates import Renderer
from plad_dist.pairing.build import PairBuilder, pair_facts
from plad_dist.training.scratch import train_tokenizer


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("student")
    train_tokenizer(iter(["one two three four five " * 5]), 300).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    scratch = ScratchModel(architecture={"model_type": "llama"})
    return Renderer(str(folder), Model(scratch=scratch, template="{{ messages[-1].content }} ="))


def sample(
    prompt: str, text: str, role: str, ids: list[int] | None = None, finish: str = "stop", index: int = 0
) -> Any:
    return {
        "prompt_id": prompt,
        "sample_index": index,
        "role": role,
        "text": text,
        "token_ids": ids if ids is not None else [7, 8, 2],
        "logprob": -1.0,
        "num_tokens": 3,
        "finish_reason": finish,
        "error": None,
        "model": "m",
        "round": 0,
    }


def build(
    renderer: Renderer, teacher: list[Any], student: list[Any], reference: str | None = "one two", **options: Any
) -> tuple[list[dict[str, Any]], Counter[str]]:
    messages = [{"role": "user", "content": "three"}]
    prompts = pa.Table.from_pylist(
        [{"prompt_id": "p", "messages": messages, "reference": reference, "meta": "{}"}], schema=PROMPTS
    )
    tables = [pa.Table.from_pylist(rows, schema=SAMPLES) for rows in (teacher, student)]
    return PairBuilder(Pairing(**options), renderer, context=64).build(prompts, *tables)


def test_a_pair_holds_the_teachers_text_and_the_students_own_tokens(renderer: Renderer) -> None:
    rows, counts = build(renderer, [sample("p", "one two", "teacher")], [sample("p", "four", "student", [9, 8, 2])])
    (row,) = rows
    assert row["prompt_token_ids"] == renderer.prompt_ids([[{"role": "user", "content": "three"}]])[0]
    assert row["prompt_token_ids"][0] == renderer.tokenizer.bos_token_id
    assert row["chosen_token_ids"] == renderer.response_ids(["one two"])[0]
    assert row["chosen_token_ids"][-1] == renderer.eos_id
    assert row["rejected_token_ids"] == [9, 8, 2]
    assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
    assert pair_facts(counts)["teacher_better_share"] == 1.0


def test_a_finished_response_ends_with_end_of_sequence_and_a_truncated_one_does_not(renderer: Renderer) -> None:
    teacher = [sample("p", "one two", "teacher")]
    rows, _ = build(renderer, teacher, [sample("p", "four", "student", [9, 8])])
    assert rows[0]["rejected_token_ids"] == [9, 8, renderer.eos_id]
    rows, _ = build(renderer, teacher, [sample("p", "four", "student", [9, 8], finish="length")])
    assert rows[0]["rejected_token_ids"] == [9, 8]


@pytest.mark.parametrize(
    ("teacher", "student", "options", "reason"),
    [
        (sample("p", "one", "teacher", finish="length"), sample("p", "two", "student"), {}, "chosen_truncated"),
        (sample("p", "one", "teacher", finish="error"), sample("p", "two", "student"), {}, "error"),
        (sample("p", "one", "teacher"), sample("p", "", "student", [], finish="error"), {}, "error"),
        (sample("p", " ", "teacher"), sample("p", "two", "student"), {}, "chosen_empty"),
        (sample("p", "one", "teacher"), sample("p", "", "student", []), {}, "rejected_empty"),
        (sample("p", "one", "teacher"), sample("p", " one", "student"), {}, "identical"),
        (
            sample("p", "one", "teacher"),
            sample("p", "two", "student", finish="length"),
            {"truncated_rejected": "drop"},
            "rejected_truncated",
        ),
        (sample("p", "one " * 40, "teacher"), sample("p", "two", "student"), {"max_tokens": 20}, "too_long"),
    ],
)
def test_what_is_no_preference_is_dropped_and_counted(
    renderer: Renderer, teacher: Any, student: Any, options: dict[str, Any], reason: str
) -> None:
    rows, counts = build(renderer, [teacher], [student], **options)
    assert rows == []
    assert pair_facts(counts)["drops"] == {reason: 1}


def test_several_samples_make_several_pairs_up_to_the_limit(renderer: Renderer) -> None:
    teacher = [sample("p", text, "teacher", index=i) for i, text in enumerate(["one", "two"])]
    student = [sample("p", text, "student", [9 + i, 2], index=i) for i, text in enumerate(["four", "five"])]
    rows, counts = build(renderer, teacher, student, max_pairs_per_prompt=3)
    assert [(row["chosen_text"], row["rejected_text"]) for row in rows] == [
        ("one", "four"),
        ("two", "five"),
        ("one", "five"),
    ]
    assert counts["drop:over_max_pairs_per_prompt"] == 1


def test_without_a_reference_there_are_no_scores(renderer: Renderer) -> None:
    rows, counts = build(renderer, [sample("p", "one", "teacher")], [sample("p", "two", "student")], reference=None)
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"]) == (None, None)
    assert pair_facts(counts)["teacher_better_share"] is None


def test_the_tokenizer_splits_the_first_word_as_any_other(renderer: Renderer, tmp_path: Path) -> None:
    first, second = (renderer.tokenizer.encode(text, add_special_tokens=False) for text in ("two", "one two"))
    assert second[-len(first) :] == first
