"""Groups from pairs and texts, and the checks before the first step, which name part and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from plad_dist.config import Loss, Model
from plad_dist.config_file import parse_config
from plad_dist.data.conversation import Conversation
from plad_dist.data.dataset import Dataset
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.data.reasoning import ResponseForm
from plad_dist.data.schemas import INITIAL_LOGPS, PROMPTS, SAMPLES
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import RunDir, open_run
from plad_dist.training.batches.blocks import ReferenceRows, ResponseRows
from plad_dist.training.batches.building import TextGroupBuilder
from plad_dist.training.batches.check import check_pairs, check_texts
from plad_dist.training.batches.groups import DataSpec, fit, open_groups
from plad_dist.training.batches.micro_batch import Group, Layout
from plad_dist.training.plan import plan_phase
from tests.conftest import write_prompts
from tests.numerics.workers import config_with_pairs, make_run, some_pairs
from tests.tiny import TEMPLATE

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def raw(folder: Path) -> dict[str, Any]:
    return config_with_pairs(folder)


def run_of(folder: Path, raw: dict[str, Any], blocks: list[Rows], name: str) -> RunDir:
    return make_run(raw | {"run": {"dir": str(folder / name), "seed": 5}}, blocks)


def groups_of(run: RunDir, folder: Path, kind: str = "pairs", **spec: Any) -> Any:
    settings = Model(path=str(folder / "student"), template=TEMPLATE)
    data = DataSpec(kind, run.pairs().path, **({"context": 1000} | spec))  # type: ignore[arg-type]
    return open_groups(data, run.storage, str(folder / "student"), settings)


def test_pairs_of_a_prompt_are_one_group_with_every_response_once(folder: Path, raw: dict[str, Any]) -> None:
    rows = some_pairs(0, 1)[:1]
    shared = [rows[0], rows[0] | {"rejected_token_ids": [150, 2]}, rows[0] | {"chosen_token_ids": [9, 2]}]
    other = some_pairs(1, 1)[:1]
    source = groups_of(run_of(folder, raw, [shared, other], "one"), folder)
    assert len(source) == 2
    first, second = source.take([0, 1])
    chosen, rejected = rows[0]["chosen_token_ids"], rows[0]["rejected_token_ids"]
    assert first.responses == [chosen, [9, 2], rejected, [150, 2]]
    assert first.pairs == [(0, 2, 1), (0, 3, 1), (1, 2, 1)]
    assert list(first.anchored) == [0, 1]
    assert second.responses == [other[0]["chosen_token_ids"], other[0]["rejected_token_ids"]]
    assert "part-00001.arrow: row 0 (counted from 0), prompt 1-0" in second.name


def test_groups_are_read_by_index_in_any_order_from_any_block(folder: Path, raw: dict[str, Any]) -> None:
    run = run_of(folder, raw, [some_pairs(0, 9), [], some_pairs(1, 5)], "many")
    source = groups_of(run, folder)
    names = [group.prompt_id for group in source.take(np.arange(14))]
    assert names == [f"0-{n}" for n in range(9)] + [f"1-{n}" for n in range(5)]
    assert [group.prompt_id for group in source.take([13, 0, 9, 8])] == ["1-4", "0-0", "1-0", "0-8"]


def test_a_list_is_ranked_by_score_and_all_its_responses_are_compared(folder: Path, raw: dict[str, Any]) -> None:
    base = some_pairs(0, 1)[0]
    rows = [
        base | {"chosen_token_ids": [5, 2], "chosen_score": 0.4, "rejected_token_ids": [150, 2], "rejected_score": 0.5},
        base | {"chosen_token_ids": [6, 2], "chosen_score": 0.9, "rejected_token_ids": [150, 2], "rejected_score": 0.5},
    ]
    (group,) = groups_of(run_of(folder, raw, [rows], "lists"), folder, "lists", end_ids=(2,)).take([0])
    assert group.responses == [[6, 2], [150, 2], [5, 2]]
    assert group.pairs == [(0, 1, 1), (0, 2, 2), (1, 2, 1)]
    assert list(group.anchored) == [0]


def test_a_response_cut_at_the_token_limit_ranks_behind_all_finished_ones(folder: Path, raw: dict[str, Any]) -> None:
    base = some_pairs(0, 1)[0]
    cut = base | {
        "chosen_token_ids": [5, 2],
        "chosen_score": 0.1,
        "rejected_token_ids": [150, 151],
        "rejected_score": 0.9,
    }
    source = groups_of(run_of(folder, raw, [[cut]], "cut"), folder, "lists", end_ids=(2,))
    (group,) = source.take([0])
    assert group.responses == [[5, 2], [150, 151]]
    assert list(group.anchored) == [0]
    both_cut = cut | {"chosen_token_ids": [5, 6]}
    (group,) = groups_of(run_of(folder, raw, [[both_cut]], "both-cut"), folder, "lists", end_ids=(2,)).take([0])
    assert list(group.anchored) == [], "the anchor raises no response that was cut"


def test_a_list_has_every_response_once_and_does_not_compare_equal_scores(folder: Path, raw: dict[str, Any]) -> None:
    base = some_pairs(0, 1)[0] | {"chosen_token_ids": [5, 2], "chosen_score": 0.4}
    rows = [
        base | {"rejected_token_ids": [5, 2], "rejected_score": 0.4},
        base | {"rejected_token_ids": [6, 2], "rejected_score": 0.4},
        base | {"rejected_token_ids": [7, 2], "rejected_score": 0.1},
    ]
    (group,) = groups_of(run_of(folder, raw, [rows], "ties"), folder, "lists", end_ids=(2,)).take([0])
    assert group.responses == [[5, 2], [6, 2], [7, 2]]
    assert group.pairs == [(0, 2, 1), (1, 2, 1)]


def test_initial_logps_of_other_rows_are_refused(folder: Path, raw: dict[str, Any]) -> None:
    run = run_of(folder, raw, [some_pairs(0, 3)], "compared")
    other = Dataset(run.storage, "initial-logps", INITIAL_LOGPS)
    rows = run.pairs().read()["prompt_id"].to_pylist()
    values = pa.array([0.0] * len(rows), pa.float32())
    table = pa.table([pa.array(["other", *rows[1:]]), values, values], names=INITIAL_LOGPS.names).cast(INITIAL_LOGPS)
    other.commit(0, table, fingerprint="x", attempt="a")
    other.finish(1, fingerprint="x", facts={})
    with pytest.raises(RunFailed, match="belong to other rows"):
        groups_of(run, folder, initial_logps="initial-logps").take([0])


def make_raw(folder: Path, raw: dict[str, Any], **student: Any) -> dict[str, Any]:
    return raw | {"run": {"dir": str(folder / "plan"), "seed": 5}, "student": raw["student"] | student}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"deepspeed": "zero3_multinode", "num_workers": 12},
            r"num_workers=12 is no multiple of zero_hpz_partition_size=8",
        ),
    ],
)
def test_a_setting_that_would_stop_a_phase_is_refused_before_it_starts(
    tmp_path: Path, raw: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    changed_raw = make_raw(tmp_path, raw) | {"training": raw["training"] | change}
    run = make_run(changed_raw)
    with pytest.raises(UserError, match=message):
        plan_phase("round-0", parse_config(changed_raw, "test"), run)


def test_pairs_in_the_tokens_of_another_student_are_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    changed_raw = make_raw(tmp_path, raw)
    run = make_run(changed_raw)
    manifest = run.pairs().require("pair")
    changed = replace(manifest, facts=manifest.facts | {"tokenizer": "another"})
    run.storage.replace(f"{run.pairs().path}/manifest.json", changed.to_json())
    with pytest.raises(UserError, match=r"pairs/round-0: the pairs hold the tokens of another student"):
        plan_phase("round-0", parse_config(changed_raw, "test"), run)


class TokensAsTexts:
    """A renderer for texts that are token ids already."""

    model, end_id = "here", 1
    form = ResponseForm()

    class control_tokens:
        """No text has control tokens."""

        without_end = staticmethod(lambda text: text)
        find = staticmethod(lambda text: None)
        has_any = staticmethod(lambda ids: False)

    def prompt_ids(self, prompts: list[Conversation]) -> list[Any]:
        return [prompt.messages for prompt in prompts]

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]

    def without_end(self, ids: list[int]) -> list[int]:
        return ids


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ([], "\5", "prompt p: renders to no token"),
        ([5], "\t\x14", "prompt p: the tokenizer of here returns token 20, .* for 20 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_trained_on_is_named(prompt: list[int], response: str, message: str) -> None:
    build = TextGroupBuilder(TokensAsTexts(), 20)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        build([[{"prompt_id": "p", "messages": prompt, "reference": response}]])


def test_texts_with_control_tokens_are_no_groups(folder: Path) -> None:
    renderer = Renderer(str(folder / "student"), Model(path=str(folder / "student"), template=TEMPLATE))
    rows = [
        {"prompt_id": "p", "messages": [{"role": "user", "content": "a"}], "reference": text}
        for text in ("b</s>", "<s>b")
    ]
    kept, dropped = TextGroupBuilder(renderer, 1 << 20)([[row] for row in rows])
    assert kept is not None
    assert kept.responses == [renderer.response_ids(["b"])[0]]
    assert dropped is None


def test_groups_of_chosen_responses_have_every_chosen_response_once(folder: Path, raw: dict[str, Any]) -> None:
    base = some_pairs(0, 1)[0]
    rows = [base, base | {"rejected_token_ids": [150, 2]}]
    (group,) = groups_of(run_of(folder, raw, [rows], "chosen"), folder, "chosen").take([0])
    assert group.responses == [base["chosen_token_ids"]]
    assert not group.pairs


def bounded(over_long: str, **spec: Any) -> DataSpec:
    return DataSpec("pairs", "", over_long=over_long, **({"context": 1000} | spec))  # type: ignore[arg-type]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("longest", range(6, 30))
def test_a_cut_group_fits_and_keeps_its_pairs(longest: int, shares: bool) -> None:
    group = Group(list(range(20)), [[1] * 9, [2] * 5], pairs=[(0, 1, 1)], name="here")
    cut = fit(group, bounded("truncate", max_group_tokens=longest, layout=Layout(shares_prompts=shares)))
    assert cut is not None
    assert (cut.tokens if shares else cut.places_unshared) <= longest
    assert cut.pairs == group.pairs
    assert cut.prompt == group.prompt[-len(cut.prompt) :], (
        "the end of the prompt is kept, because the response continues it"
    )
    if longest > (14 if shares else 18):
        assert cut.responses == group.responses
    assert fit(group, bounded("truncate", max_group_tokens=60)) is group
    assert fit(group, bounded("drop", max_group_tokens=longest)) is None
    with pytest.raises(
        UserError, match=rf"here: the prompt and its responses have 32 tokens, .*max_group_tokens is {longest}"
    ):
        fit(group, bounded("fail", max_group_tokens=longest))


@pytest.mark.parametrize("context", [3, 8, 20, 28])
def test_the_context_bounds_each_sequence_and_not_the_group(context: int) -> None:
    group = Group(list(range(20)), [[1] * 9, [2] * 9, [3] * 9], name="here")
    assert fit(group, bounded("fail", context=29)) is group, "the group has 44 tokens, but no sequence has more than 29"
    cut = fit(group, bounded("truncate", context=context))
    assert cut is not None
    assert len(cut.prompt) + max(map(len, cut.responses)) <= context
    with pytest.raises(UserError, match="a response has 29 tokens, but the student's context holds"):
        fit(group, bounded("fail", context=context))


def with_values(row: int, **values: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[row].update(values)


@pytest.mark.parametrize(
    ("damage", "loss", "message"),
    [
        (with_values(3, chosen_token_ids=[]), Loss(), r"part-00001\.arrow: row 3 .*chosen_token_ids is empty"),
        (with_values(2, prompt_token_ids=[]), Loss(), r"row 2 .*prompt_token_ids is empty"),
        (
            with_values(4, rejected_token_ids=[5, 999]),
            Loss(),
            r"row 4 .*rejected_token_ids holds token 999.*another model",
        ),
        (with_values(4, rejected_token_ids=[-1]), Loss(), "holds token -1"),
        (
            with_values(1, chosen_score=None),
            Loss(name="margin"),
            r"row 1 .*chosen_score is None, but the loss margin needs",
        ),
        (with_values(1, rejected_score=float("nan")), Loss(name="listwise"), "rejected_score is nan"),
        (
            with_values(-1, prompt_token_ids=[5] * 300),
            Loss(),
            r"part-00001\.arrow: row .*the student's context holds 100",
        ),
        (with_values(-1, prompt_token_ids=[5] * 80), Loss(), r"more than training\.micro_batch_tokens=64 holds"),
    ],
)
def test_bad_pairs_are_named_before_the_first_step(
    folder: Path, raw: dict[str, Any], tmp_path: Path, damage: Callable[[Rows], None], loss: Loss, message: str
) -> None:
    rows = some_pairs(1, 8)
    damage(rows)
    run = run_of(tmp_path, raw, [some_pairs(0, 8), rows], "bad")
    spec = DataSpec("pairs", run.pairs().path, context=100)
    model = str(folder / "student")
    with pytest.raises(UserError, match=message):
        check_pairs(spec, run.storage, model, Model(path=model, template=TEMPLATE), loss, 64)


def test_sound_pairs_pass_and_identical_responses_count_once(folder: Path, raw: dict[str, Any]) -> None:
    """A chosen response of several pairs is computed once, so the group fits."""
    base = some_pairs(0, 1)[0] | {"chosen_token_ids": [5] * 40}
    rows = [base | {"rejected_token_ids": [150 + number, 2]} for number in range(4)]
    run = run_of(folder, raw, [rows, some_pairs(1, 8)], "sound")
    model = str(folder / "student")
    settings = Model(path=model, template=TEMPLATE)
    tokens = max(len(base["prompt_token_ids"]) + 39 + 4, 60)
    spec = DataSpec("pairs", run.pairs().path, context=100)
    check_pairs(spec, run.storage, model, settings, Loss(), tokens)
    with pytest.raises(UserError, match="more than"):
        check_pairs(replace(spec, layout=Layout(shares_prompts=False)), run.storage, model, settings, Loss(), tokens)


@pytest.fixture(scope="module")
def run_with_long_texts(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> RunDir:
    """A run with a reference and, for another prompt, a teacher response of 200 words."""
    run_folder = tmp_path_factory.mktemp("long")
    raw = config_with_pairs(run_folder)
    lines = write_prompts(run_folder, 60).read_text().splitlines()
    lines[41] = json.dumps({"prompt": "the long reference", "answer": "so " * 200})
    (run_folder / "prompts.jsonl").write_text("\n".join(lines))
    raw["prompts"]["block_size"] = 16
    config = parse_config(raw, "test")
    run = open_run(config)
    prepare(config, run.storage)
    prompts, samples = train_prompts(run.storage), run.samples("teacher")
    for block, part in enumerate(prompts.require("prepare").parts):
        ids = prompts.read_block(block)["prompt_id"].to_pylist()
        rows = [
            {
                "prompt_id": prompt_id, "sample_index": 0, "role": "teacher", "round": 0, "model": "m", "logprob": None,
                "text": "no " * (200 if (block, row) == (1, 3) else 2), "token_ids": [], "num_tokens": 1,
                "finish_reason": "stop", "error": None,
            }
            for row, prompt_id in enumerate(ids)
        ]  # fmt: skip
        table = pa.Table.from_pylist(rows, schema=SAMPLES)
        samples.commit(block, table, fingerprint="f", attempt="a", counts={"finished": part.rows})
    samples.finish(block + 1, fingerprint="f", facts={})
    return run


@pytest.mark.parametrize("kind", ["references", "teacher"])
def test_a_text_too_long_for_a_micro_batch_is_named_before_the_first_step(
    folder: Path, run_with_long_texts: RunDir, kind: str
) -> None:
    run, model = run_with_long_texts, str(folder / "student")
    path = "" if kind == "references" else run.samples("teacher").path
    spec = DataSpec(kind, path, context=5000, over_long="truncate")  # type: ignore[arg-type]
    settings = Model(path=model, template=TEMPLATE)
    groups = open_groups(spec, run.storage, model, settings)
    longest = max(groups.take(range(len(groups))), key=lambda group: group.tokens)
    with pytest.raises(
        UserError, match=rf"{longest.name}: with its response it has {longest.tokens} tokens, more than"
    ):
        check_texts(spec, run.storage, model, settings, longest.tokens - 1)
    check_texts(spec, run.storage, model, settings, longest.tokens)
    check_texts(replace(spec, max_group_tokens=64), run.storage, model, settings, 64)


def test_a_text_has_at_least_as_many_bytes_as_tokens(folder: Path, run_with_long_texts: RunDir) -> None:
    """The check of the longest texts relies on it. Template and leading spaces add some tokens."""
    groups = groups_of(run_with_long_texts, folder, "references")
    empty = {"prompt_id": "", "messages": [{"role": "user", "content": ""}], "reference": ""}
    added_tokens = groups._build([[empty]])[0].tokens + 2
    for block in range(4):
        longest = groups.longest(block, 0, 1000)
        indices, sizes = [index for _, index in longest], [size for size, _ in longest]
        rows = [row for index in indices for row in groups._rows(index)]
        assert sizes == [len(row["reference"]) + sum(len(m["content"]) for m in row["messages"]) for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == groups_in(run_with_long_texts, block)
        at_least = sizes[len(sizes) // 2]
        assert len(groups.longest(block, at_least, 1000)) == sum(size >= at_least for size in sizes)
        for group, size in zip(groups.take(indices), sizes, strict=True):
            assert group.tokens <= size + added_tokens


def groups_in(run: RunDir, block: int) -> int:
    return train_prompts(run.storage).require("prepare").parts[block].counts["references"]


def test_groups_of_texts_have_the_whole_conversation_and_the_tools() -> None:
    call = {"function": {"name": "weather", "arguments": {"town": "Graz"}}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    prompt = Conversation([*turns, {"role": "user", "content": "ho"}], [{"name": "weather"}])
    row = {"prompt_id": "p", "reference": "ha", "meta": None, "teacher": None, **prompt.to_row()}
    prompts = pa.Table.from_pylist([row], schema=PROMPTS)
    sample = {"prompt_id": "p", "text": "he", "finish_reason": "stop", "reasoning": None, "token_ids": []}
    responses = ResponseRows(prompts, pa.Table.from_pylist([sample]), TeacherForms())
    for rows, response in ((ReferenceRows(prompts), "ha"), (responses, "he")):
        (group,) = rows.rows(0)
        assert (Conversation.from_row(group), group["reference"]) == (prompt, response)
        assert rows.sizes()[0] >= len(json.dumps(prompt.messages)) + len(json.dumps(prompt.tools))
