"""Pairs: the teacher's response over the student's; all other combinations are counted drops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plad_dist.config import Model, Pairing, ScratchModel
from plad_dist.data.conversation import Conversation
from plad_dist.data.schemas import PAIRS, PROMPTS, SAMPLES
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.pairing.answer import Answer
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.forms import REJECTED, PairForms
from plad_dist.pairing.pairs import PairBuilder
from plad_dist.pairing.scores import load_scorer
from plad_dist.text_metrics import rouge_l
from plad_dist.training.model.scratch import train_tokenizer

CONTEXT = 64


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
    renderer: Renderer,
    teacher: list[Any],
    student: list[Any],
    reference: str | None = "one two",
    forms: TeacherForms | PairForms | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    messages = [{"role": "user", "content": "three"}]
    prompts = pa.Table.from_pylist(
        [{"prompt_id": "p", "messages": messages, "reference": reference, "meta": "{}"}], schema=PROMPTS
    )
    tables = [pa.Table.from_pylist(rows, schema=SAMPLES) for rows in (teacher, student)]
    pairing = Pairing(**options)
    pair_forms = forms if isinstance(forms, PairForms) else PairForms(forms or TeacherForms())
    pairs, counts = PairBuilder(pairing, renderer, CONTEXT, load_scorer(pairing), pair_forms).build(prompts, *tables)
    assert pairs.schema == PAIRS
    return pairs.to_pylist(), counts


def test_a_pair_holds_the_teachers_text_and_the_students_own_tokens(renderer: Renderer) -> None:
    rows, counts = build(renderer, [sample("p", "one two", "teacher")], [sample("p", "four", "student", [9, 8, 2])])
    (row,) = rows
    assert row["prompt_token_ids"] == renderer.prompt_ids([Conversation([{"role": "user", "content": "three"}])])[0]
    assert row["prompt_token_ids"][0] == renderer.tokenizer.bos_token_id
    assert row["chosen_token_ids"] == renderer.response_ids(["one two"])[0]
    assert row["chosen_token_ids"][-1] == renderer.end_id
    assert row["rejected_token_ids"] == [9, 8, 2]
    assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
    assert PairFacts.from_counts(counts).teacher_better_share == 1.0


def test_a_finished_response_ends_with_end_of_sequence_and_a_truncated_one_does_not(renderer: Renderer) -> None:
    teacher = [sample("p", "one two", "teacher")]
    rows, _ = build(renderer, teacher, [sample("p", "four", "student", [9, 8])])
    assert rows[0]["rejected_token_ids"] == [9, 8, renderer.end_id]
    rows, _ = build(renderer, teacher, [sample("p", "four", "student", [9, 8], finish="length")])
    assert rows[0]["rejected_token_ids"] == [9, 8]


@pytest.mark.parametrize(
    ("teacher", "student", "options", "reason"),
    [
        (sample("p", "one", "teacher", finish="length"), sample("p", "two", "student"), {}, "chosen_truncated"),
        (sample("p", "one", "teacher", finish="error"), sample("p", "two", "student"), {}, "error"),
        (sample("p", "one", "teacher"), sample("p", "", "student", [], finish="error"), {}, "error"),
        (sample("p", " ", "teacher"), sample("p", "two", "student"), {}, "chosen_empty"),
        (sample("p", "one</s> two", "teacher"), sample("p", "two", "student"), {}, "control_token"),
        (sample("p", "<s>one", "teacher"), sample("p", "two", "student"), {}, "control_token"),
        (sample("p", "</s>", "teacher"), sample("p", "two", "student"), {}, "chosen_empty"),
        (sample("p", "one</s>", "teacher"), sample("p", "one", "student"), {}, "identical"),
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
def test_a_combination_that_is_no_preference_is_dropped_and_counted(
    renderer: Renderer, teacher: Any, student: Any, options: dict[str, Any], reason: str
) -> None:
    rows, counts = build(renderer, [teacher], [student], **options)
    assert rows == []
    assert PairFacts.from_counts(counts).drops == {reason: 1}


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
    assert PairFacts.from_counts(counts).teacher_better_share is None


# -- combinations


def teacher_and_student(teacher: list[str], student: list[str]) -> tuple[list[Any], list[Any]]:
    return (
        [sample("p", text, "teacher", index=i) for i, text in enumerate(teacher)],
        [sample("p", text, "student", [9 + i, 2], index=i) for i, text in enumerate(student)],
    )


def texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen_text"], row["rejected_text"]) for row in rows]


def test_one_takes_the_first_usable_pair_and_considers_no_further_ones(renderer: Renderer) -> None:
    samples = teacher_and_student(["one", "two", "three"], ["one", "five"])
    rows, counts = build(renderer, *samples, combine="one")
    assert texts(rows) == [("two", "five")]
    assert PairFacts.from_counts(counts).drops == {"identical": 1}


def test_best_worst_takes_the_teachers_best_against_the_students_worst(renderer: Renderer) -> None:
    samples = teacher_and_student(["five", "one two", "one"], ["one", "four", "one two three"])
    rows, counts = build(renderer, *samples, combine="best_worst")
    assert texts(rows) == [("one two", "four")]
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"]) == (1.0, 0.0)
    assert PairFacts.from_counts(counts).drops == {}


def test_best_worst_takes_the_lower_index_of_equal_scores_whatever_the_order_of_rows(renderer: Renderer) -> None:
    teacher, student = teacher_and_student(["two", "one", "five"], ["five", "four", "one two"])
    rows, _ = build(renderer, teacher[::-1], student[::-1], combine="best_worst")
    assert texts(rows) == [("two", "five")]


def test_best_worst_skips_unusable_and_unscored_samples(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: dict[str, float | None] = {"a": 3.0, "b": None, "c": 2.0, "d": 1.0, "e": 0.0, "f": None}
    monkeypatch.setattr("plad_dist.pairing.scores.rouge_scores", lambda items: [marks[i["response"]] for i in items])
    teacher, student = teacher_and_student(["a", "b", "c"], ["d", "e", "f"])
    teacher[0]["finish_reason"] = "length"
    rows, counts = build(renderer, teacher, student, combine="best_worst")
    assert texts(rows) == [("c", "e")]
    assert counts["unscored"] == 2


@pytest.mark.parametrize(
    ("finish", "reference", "reason"),
    [("stop", None, "no_score"), ("length", "one two", "chosen_truncated"), ("error", "one two", "error")],
)
def test_best_worst_drops_a_prompt_without_scores_or_usable_samples_once(
    renderer: Renderer, finish: str, reference: str | None, reason: str
) -> None:
    teacher, student = teacher_and_student(["one", "two"], ["four", "five"])
    for row in teacher:
        row["finish_reason"] = finish
    rows, counts = build(renderer, teacher, student, reference=reference, combine="best_worst")
    assert rows == []
    assert PairFacts.from_counts(counts).drops == {reason: 1}


def test_equal_pairs_are_kept_once(renderer: Renderer) -> None:
    teacher, student = teacher_and_student(["one", "one"], ["four"])
    rows, counts = build(renderer, teacher, student)
    assert texts(rows) == [("one", "four")]
    assert PairFacts.from_counts(counts).drops == {"duplicate": 1}


@pytest.mark.parametrize("combine", ["all", "one", "best_worst"])
def test_wins_are_counted_over_all_usable_combinations_whatever_is_kept(renderer: Renderer, combine: str) -> None:
    teacher, student = teacher_and_student(["one two", "five"], ["one", "four", "one two", " "])
    options = {"max_pairs_per_prompt": 1, "min_score_gap": 0.9}
    _, counts = build(renderer, teacher, student, combine=combine, **options)
    # "one two" wins over "one" and "four", and is identical to the third response. "five" ties with
    # "four" and loses to the two others.
    assert (counts["better"], counts["equal"], counts["worse"]) == (2, 1, 2)


def test_a_prompt_with_samples_of_one_side_only_has_no_pair(renderer: Renderer) -> None:
    rows, counts = build(renderer, *teacher_and_student([], ["four"]))
    assert (rows, counts["prompts"], PairFacts.from_counts(counts).drops) == ([], 1, {})
    rows, counts = build(renderer, [], [])
    assert (rows, counts["prompts"]) == ([], 0)


# -- filters


def test_a_score_gap_below_the_minimum_is_dropped(renderer: Renderer) -> None:
    samples = teacher_and_student(["one two"], ["one", "four"])
    rows, counts = build(renderer, *samples, min_score_gap=1.0)
    assert texts(rows) == [("one two", "four")]  # a gap of exactly the minimum is kept
    assert PairFacts.from_counts(counts).drops == {"score_gap": 1}
    rows, counts = build(renderer, *teacher_and_student(["four"], ["one"]), min_score_gap=-1.0)
    assert len(rows) == 1


def test_with_a_minimum_score_gap_a_missing_score_drops_the_pair(renderer: Renderer) -> None:
    rows, counts = build(renderer, *teacher_and_student(["one"], ["four"]), reference=None, min_score_gap=0.1)
    assert rows == []
    assert PairFacts.from_counts(counts).drops == {"no_score": 1}
    assert counts["unscored"] == 2


def test_the_length_ratio_bounds_chosen_over_rejected_tokens(renderer: Renderer) -> None:
    student = [sample("p", "two", "student", [9] * count + [2], index=i) for i, count in enumerate((1, 3, 7))]
    teacher = [sample("p", "one", "teacher")]
    length = len(renderer.response_ids(["one"])[0])
    rows, counts = build(renderer, teacher, student, length_ratio=(length / 4, length / 4))
    assert [len(row["rejected_token_ids"]) for row in rows] == [4]
    assert PairFacts.from_counts(counts).drops == {"length_ratio": 2}


def test_truncated_teacher_responses_that_are_kept_have_no_end_of_sequence(renderer: Renderer) -> None:
    teacher = [sample("p", "one two", "teacher", finish="length")]
    rows, _ = build(renderer, teacher, [sample("p", "four", "student")], truncated_chosen="keep")
    assert rows[0]["chosen_token_ids"] == renderer.response_ids(["one two"])[0][:-1]


def test_identical_responses_can_be_kept(renderer: Renderer) -> None:
    rows, counts = build(renderer, *teacher_and_student(["one"], [" one "]), identical="keep")
    assert texts(rows) == [("one", " one ")]
    assert counts["equal"] == 1


def test_empty_responses_that_are_kept_consist_of_end_of_sequence(renderer: Renderer) -> None:
    full, empty = sample("p", "one", "teacher"), sample("p", "", "teacher")
    rows, _ = build(renderer, [empty], [sample("p", "four", "student", [9, 2])], empty="keep")
    assert rows[0]["chosen_token_ids"] == [renderer.end_id]
    for ids in ([], [renderer.end_id]):
        rows, _ = build(renderer, [full], [sample("p", "", "student", ids)], empty="keep")
        assert rows[0]["rejected_token_ids"] == [renderer.end_id]


def test_a_response_without_any_token_is_never_kept(renderer: Renderer) -> None:
    teacher, student = [sample("p", "one", "teacher")], [sample("p", "", "student", [], finish="length")]
    rows, counts = build(renderer, teacher, student, empty="keep")
    assert (rows, PairFacts.from_counts(counts).drops) == ([], {"rejected_empty": 1})
    teacher, student = [sample("p", "", "teacher", finish="length")], [sample("p", "four", "student")]
    rows, counts = build(renderer, teacher, student, empty="keep", truncated_chosen="keep")
    assert (rows, PairFacts.from_counts(counts).drops) == ([], {"chosen_empty": 1})


def test_a_student_response_of_end_of_sequence_alone_is_empty(renderer: Renderer) -> None:
    _, counts = build(renderer, [sample("p", "one", "teacher")], [sample("p", "", "student", [renderer.end_id])])
    assert PairFacts.from_counts(counts).drops == {"rejected_empty": 1}


def test_each_distinct_usable_response_is_scored_once_and_in_one_call(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[Answer]] = []

    def scores(answers: list[Answer]) -> list[float | None]:
        calls.append(answers)
        return [float(len(answer["response"])) for answer in answers]

    monkeypatch.setattr("plad_dist.pairing.scores.rouge_scores", scores)
    teacher, student = teacher_and_student(["one", "one", "three", " "], ["one", "four", "four"])
    rows, _ = build(renderer, teacher, student)
    assert [(answer["role"], answer["response"]) for answer in calls[0]] == [
        ("teacher", "one"),
        ("teacher", "three"),
        ("student", "one"),
        ("student", "four"),
    ]
    assert len(calls) == 1
    assert all(row["chosen_score"] == len(row["chosen_text"]) for row in rows)


# -- arbitrary samples

_TEXTS = st.sampled_from(["one", "two", "one two", " one", "", " ", "three four five", "two two two two"])
_FINISH = st.sampled_from(["stop", "stop", "stop", "length", "error"])
_STUDENT_IDS = st.lists(st.integers(3, 12), max_size=6)
_OPTIONS = st.fixed_dictionaries(
    {
        "combine": st.sampled_from(["all", "one", "best_worst"]),
        "max_pairs_per_prompt": st.integers(1, 5),
        "min_score_gap": st.none() | st.floats(-1, 1),
        "max_tokens": st.none() | st.integers(8, 20),
        "length_ratio": st.none() | st.tuples(st.floats(0, 1), st.floats(1, 3)),
        **{
            name: st.sampled_from(["keep", "drop"])
            for name in ("identical", "empty", "truncated_chosen", "truncated_rejected")
        },
    }
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    teacher=st.lists(st.tuples(_TEXTS, _FINISH), max_size=4),
    student=st.lists(st.tuples(_TEXTS, _FINISH, _STUDENT_IDS), max_size=4),
    reference=st.sampled_from(["one two", "one", " ", None]),
    options=_OPTIONS,
)
def test_pairs_and_drops_add_up_and_no_pair_breaks_a_bound(
    renderer: Renderer, teacher: list[Any], student: list[Any], reference: str | None, options: dict[str, Any]
) -> None:
    by_teacher = [sample("p", text, "teacher", [], finish, i) for i, (text, finish) in enumerate(teacher)]
    by_student = [sample("p", text, "student", ids, finish, i) for i, (text, finish, ids) in enumerate(student)]
    rows, counts = build(renderer, by_teacher, by_student, reference, **options)
    considered = len(rows) + sum(PairFacts.from_counts(counts).drops.values())
    combinations = len(teacher) * len(student)
    assert counts["pairs"] == len(rows)
    match options["combine"]:
        case "all":
            assert considered == combinations
            assert len(rows) <= options["max_pairs_per_prompt"]
        case "one":
            assert considered == combinations or (considered < combinations and len(rows) == 1)
        case "best_worst":
            assert considered == min(1, combinations)
    token_ids = [(tuple(row["chosen_token_ids"]), tuple(row["rejected_token_ids"])) for row in rows]
    assert len(set(token_ids)) == len(token_ids)
    for row in rows:
        check_bounds(row, renderer, by_teacher, by_student, reference, options)


def check_bounds(
    row: dict[str, Any], renderer: Renderer, teacher: list[Any], student: list[Any], reference: str | None, options: Any
) -> None:
    chosen, rejected = row["chosen_token_ids"], row["rejected_token_ids"]
    chosen_text, rejected_text = row["chosen_text"], row["rejected_text"]
    by_teacher = {s["finish_reason"] for s in teacher if s["text"] == chosen_text}
    by_student = {s["finish_reason"] for s in student if s["text"] == rejected_text}
    assert by_teacher & ({"stop"} if options["truncated_chosen"] == "drop" else {"stop", "length"})
    assert by_student & ({"stop"} if options["truncated_rejected"] == "drop" else {"stop", "length"})
    assert chosen
    assert rejected
    limit = min(options["max_tokens"] or CONTEXT, CONTEXT)
    assert len(row["prompt_token_ids"]) + max(len(chosen), len(rejected)) <= limit
    if options["empty"] == "drop":
        assert chosen_text.strip()
        assert rejected_text.strip()
    if options["identical"] == "drop":
        assert chosen_text.strip() != rejected_text.strip()
        assert chosen != rejected
    if options["length_ratio"] is not None:
        assert options["length_ratio"][0] <= len(chosen) / len(rejected) <= options["length_ratio"][1]
    expected = [None, None]
    if reference is not None and reference.strip():
        expected = [rouge_l(reference, chosen_text), rouge_l(reference, rejected_text)]
    assert [row["chosen_score"], row["rejected_score"]] == expected
    if options["min_score_gap"] is not None:
        assert row["chosen_score"] - row["rejected_score"] >= options["min_score_gap"]


def test_the_tokenizer_splits_the_first_word_like_any_other(renderer: Renderer, tmp_path: Path) -> None:
    first, second = (renderer.tokenizer.encode(text, add_special_tokens=False) for text in ("two", "one two"))
    assert second[-len(first) :] == first


def test_the_text_of_another_writer_becomes_tokens_of_the_student(renderer: Renderer) -> None:
    """Its own tokens, and its log-likelihood of them, mean nothing to the student."""
    teacher, rejected = [sample("p", "one two", "teacher")], [sample("p", "four five", "student", [1, 3, 5])]
    [row], _ = build(renderer, teacher, rejected, forms=PairForms(rejected=TeacherForms()))
    assert row["rejected_text"] == "four five"
    assert row["rejected_token_ids"] == renderer.response_ids(["four five"])[0]
    assert row["rejected_logprob"] is None


def test_another_writer_with_the_students_tokenizer_keeps_its_tokens(renderer: Renderer) -> None:
    pieces = ["f", "o", "u", "r"]  # of the same text, not as the tokenizer would cut it
    ids = [renderer.tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    assert renderer.response_ids(["four"])[0] != [*ids, renderer.end_id]
    teacher, rejected = [sample("p", "one two", "teacher")], [sample("p", "four", "student", ids)]
    forms = PairForms(rejected=TeacherForms(same_tokens=(REJECTED,)))
    [row], _ = build(renderer, teacher, rejected, forms=forms)
    assert row["rejected_token_ids"] == [*ids, renderer.end_id]
    assert row["rejected_logprob"] is None


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (sample("p", "one <|foreign|> two", "student"), "control_token"),
        (sample("p", "one<s> two", "student"), "control_token"),
        (sample("p", " ", "student"), "rejected_empty"),
        (sample("p", "one", "student", finish="error"), "error"),
    ],
)
def test_responses_of_another_writer_are_dropped_as_rejected_ones(
    renderer: Renderer, rejected: Any, reason: str
) -> None:
    forms = PairForms(rejected=TeacherForms(control_texts=("<|foreign|>",)))
    rows, counts = build(renderer, [sample("p", "one two", "teacher")], [rejected], forms=forms)
    assert not rows
    assert counts[f"drop:{reason}"] == 1


def test_a_thought_of_another_writer_is_left_out_unless_it_is_to_be_kept(renderer: Renderer) -> None:
    teacher, rejected = [sample("p", "one two", "teacher")], [sample("p", "four", "student") | {"reasoning": "five"}]
    for keep, text in (((), "four"), ((REJECTED,), "five")):
        [row], _ = build(renderer, teacher, rejected, forms=PairForms(rejected=TeacherForms(keep_thought=keep)))
        assert text in row["rejected_text"]
        assert ("five" in row["rejected_text"]) == bool(keep)


def test_only_the_starting_students_own_responses_have_its_log_likelihood(renderer: Renderer) -> None:
    """A student before its training writes the same tokens, but another model calibrates them."""
    teacher, rejected = [sample("p", "one two", "teacher")], [sample("p", "four", "student", [9, 8, 2])]
    for is_on_policy, logprob in ((True, -1.0), (False, None)):
        [row], _ = build(renderer, teacher, rejected, forms=PairForms(is_on_policy=is_on_policy))
        assert row["rejected_token_ids"] == [9, 8, renderer.end_id]
        assert row["rejected_logprob"] == logprob
