"""Groups from pairs, and the checks before the first step: bad pairs are named by part and row."""

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
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.data.schemas import INITIAL_LOGPS, SAMPLES
from plad_dist.data.store import Dataset
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import RunDir, open_run
from plad_dist.training.batches.check import check_pairs, check_texts
from plad_dist.training.batches.groups import DataSpec, _Tokenize, fit, open_groups
from plad_dist.training.batches.packing import Group
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


def test_groups_are_found_by_index_in_any_order_and_any_block(folder: Path, raw: dict[str, Any]) -> None:
    run = run_of(folder, raw, [some_pairs(0, 9), [], some_pairs(1, 5)], "many")
    source = groups_of(run, folder)
    names = [group.prompt_id for group in source.take(np.arange(14))]
    assert names == [f"0-{n}" for n in range(9)] + [f"1-{n}" for n in range(5)]
    assert [group.prompt_id for group in source.take([13, 0, 9, 8])] == ["1-4", "0-0", "1-0", "0-8"]


def test_a_list_is_ranked_by_score_and_compared_each_with_each(folder: Path, raw: dict[str, Any]) -> None:
    base = some_pairs(0, 1)[0]
    rows = [
        base | {"chosen_token_ids": [5, 2], "chosen_score": 0.4, "rejected_token_ids": [150, 2], "rejected_score": 0.5},
        base | {"chosen_token_ids": [6, 2], "chosen_score": 0.9, "rejected_token_ids": [150, 2], "rejected_score": 0.5},
    ]
    (group,) = groups_of(run_of(folder, raw, [rows], "lists"), folder, "lists", end_ids=(2,)).take([0])
    assert group.responses == [[6, 2], [150, 2], [5, 2]]
    assert group.pairs == [(0, 1, 1), (0, 2, 2), (1, 2, 1)]
    assert list(group.anchored) == [0]


def test_a_response_that_was_cut_is_ranked_behind_all_that_ended(folder: Path, raw: dict[str, Any]) -> None:
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
    neither = cut | {"chosen_token_ids": [5, 6]}
    (group,) = groups_of(run_of(folder, raw, [[neither]], "neither"), folder, "lists", end_ids=(2,)).take([0])
    assert list(group.anchored) == [], "what did not end is not raised"


def test_a_list_wants_nothing_between_equal_scores_and_has_a_text_once(folder: Path, raw: dict[str, Any]) -> None:
    base = some_pairs(0, 1)[0] | {"chosen_token_ids": [5, 2], "chosen_score": 0.4}
    rows = [
        base | {"rejected_token_ids": [5, 2], "rejected_score": 0.4},
        base | {"rejected_token_ids": [6, 2], "rejected_score": 0.4},
        base | {"rejected_token_ids": [7, 2], "rejected_score": 0.1},
    ]
    (group,) = groups_of(run_of(folder, raw, [rows], "ties"), folder, "lists", end_ids=(2,)).take([0])
    assert group.responses == [[5, 2], [6, 2], [7, 2]]
    assert group.pairs == [(0, 2, 1), (1, 2, 1)]


def test_initial_logps_of_other_rows_are_not_taken_for_these(folder: Path, raw: dict[str, Any]) -> None:
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
def test_what_would_stop_a_phase_on_its_way_is_said_before(
    tmp_path: Path, raw: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    changed_raw = make_raw(tmp_path, raw) | {"training": raw["training"] | change}
    run = make_run(changed_raw)
    with pytest.raises(UserError, match=message):
        plan_phase("round-0", parse_config(changed_raw, "test"), run)


def test_pairs_in_the_tokens_of_another_student_are_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    changed_raw = make_raw(tmp_path, raw)
    run = make_run(changed_raw)
    manifest = json.loads((run.root / run.pairs().path / "manifest.json").read_text())
    manifest["facts"]["tokenizer"] = "another"
    (run.root / run.pairs().path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"pairs/round-0: these pairs are in the tokens of another student"):
        plan_phase("round-0", parse_config(changed_raw, "test"), run)


class _Texts:
    """A renderer of what it is given."""

    model = "here"

    def prompt_ids(self, prompts: list[list[int]]) -> list[list[int]]:
        return prompts

    def response_ids(self, texts: list[list[int]]) -> list[list[int]]:
        return texts


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [([], [5], "prompt p: renders to no token"), ([5], [9, 20], "prompt p: its tokenizer gives token 20, .* has 20")],
)
def test_a_prompt_that_cannot_be_trained_on_is_named(prompt: list[int], response: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _Tokenize(_Texts(), 20)([[{"prompt_id": "p", "messages": prompt, "reference": response}]])  # type: ignore[arg-type]


def test_the_chosen_side_alone_has_every_chosen_response_once(folder: Path, raw: dict[str, Any]) -> None:
    base = some_pairs(0, 1)[0]
    rows = [base, base | {"rejected_token_ids": [150, 2]}]
    (group,) = groups_of(run_of(folder, raw, [rows], "chosen"), folder, "chosen").take([0])
    assert group.responses == [base["chosen_token_ids"]]
    assert not group.pairs


def bounds(over_long: str, **spec: Any) -> DataSpec:
    return DataSpec("pairs", "", over_long=over_long, **({"context": 1000} | spec))  # type: ignore[arg-type]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("longest", range(6, 30))
def test_a_group_that_is_cut_fits_and_keeps_its_pairs(longest: int, shares: bool) -> None:
    group = Group(list(range(20)), [[1] * 9, [2] * 5], pairs=[(0, 1, 1)], name="here")
    cut = fit(group, bounds("truncate", longest=longest, shares=shares))
    assert cut is not None
    assert (cut.tokens if shares else cut.tokens_apart) <= longest
    assert cut.pairs == group.pairs
    assert cut.prompt == group.prompt[-len(cut.prompt) :], "the end of the prompt is what is answered"
    if longest > 14:
        assert cut.responses == group.responses
    assert fit(group, bounds("truncate", longest=60)) is group
    assert fit(group, bounds("drop", longest=longest)) is None
    with pytest.raises(
        UserError, match=rf"here: its prompt and responses have 32 tokens, .*max_group_tokens is {longest}"
    ):
        fit(group, bounds("fail", longest=longest))


@pytest.mark.parametrize("context", [3, 8, 20, 28])
def test_the_context_bounds_each_sequence_and_not_the_group(context: int) -> None:
    group = Group(list(range(20)), [[1] * 9, [2] * 9, [3] * 9], name="here")
    assert fit(group, bounds("fail", context=29)) is group, "44 tokens, but no sequence of more than 29"
    cut = fit(group, bounds("truncate", context=context))
    assert cut is not None
    assert len(cut.prompt) + max(map(len, cut.responses)) <= context
    with pytest.raises(UserError, match="a response has 29 tokens, the student's context holds"):
        fit(group, bounds("fail", context=context))


def changed(row: int, **values: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[row].update(values)


@pytest.mark.parametrize(
    ("harm", "loss", "message"),
    [
        (changed(3, chosen_token_ids=[]), Loss(), r"part-00001\.arrow: row 3 .*chosen_token_ids is empty"),
        (changed(2, prompt_token_ids=[]), Loss(), r"row 2 .*prompt_token_ids is empty"),
        (changed(4, rejected_token_ids=[5, 999]), Loss(), r"row 4 .*rejected_token_ids holds token 999.*another model"),
        (changed(4, rejected_token_ids=[-1]), Loss(), "holds token -1"),
        (changed(1, chosen_score=None), Loss(name="margin"), r"row 1 .*chosen_score is None: the loss margin needs"),
        (changed(1, rejected_score=float("nan")), Loss(name="listwise"), "rejected_score is nan"),
        (changed(-1, prompt_token_ids=[5] * 300), Loss(), r"part-00001\.arrow: row .*the student's context holds 100"),
        (changed(-1, prompt_token_ids=[5] * 80), Loss(), r"more than training\.micro_batch_tokens=64 holds"),
    ],
)
def test_bad_pairs_are_named_before_the_first_step(
    folder: Path, raw: dict[str, Any], tmp_path: Path, harm: Callable[[Rows], None], loss: Loss, message: str
) -> None:
    rows = some_pairs(1, 8)
    harm(rows)
    run = run_of(tmp_path, raw, [some_pairs(0, 8), rows], "bad")
    spec = DataSpec("pairs", run.pairs().path, context=100)
    model = str(folder / "student")
    with pytest.raises(UserError, match=message):
        check_pairs(spec, run.storage, model, Model(path=model, template=TEMPLATE), loss, 64)


def test_sound_pairs_pass_and_equal_responses_count_once(folder: Path, raw: dict[str, Any]) -> None:
    """A chosen response that is in many pairs is computed once."""
    base = some_pairs(0, 1)[0] | {"chosen_token_ids": [5] * 40}
    rows = [base | {"rejected_token_ids": [150 + number, 2]} for number in range(4)]
    run = run_of(folder, raw, [rows, some_pairs(1, 8)], "sound")
    model = str(folder / "student")
    settings = Model(path=model, template=TEMPLATE)
    tokens = max(len(base["prompt_token_ids"]) + 39 + 4, 60)
    spec = DataSpec("pairs", run.pairs().path, context=100)
    check_pairs(spec, run.storage, model, settings, Loss(), tokens)
    with pytest.raises(UserError, match="more than"):
        check_pairs(replace(spec, shares=False), run.storage, model, settings, Loss(), tokens)


@pytest.fixture(scope="module")
def with_a_long_one(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> RunDir:
    """Prompts in blocks of 16, one of which has a reference of 200 words; an answer of the teacher's to another is as long."""
    where = tmp_path_factory.mktemp("long")
    raw = config_with_pairs(where)
    lines = write_prompts(where, 60).read_text().splitlines()
    lines[41] = json.dumps({"prompt": "the long one", "answer": "so " * 200})
    (where / "prompts.jsonl").write_text("\n".join(lines))
    raw["prompts"]["block_size"] = 16
    config = parse_config(raw, "test")
    run = open_run(config)
    prepare(config, run.storage)
    prompts, answers = train_prompts(run.storage), run.samples("teacher")
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
        answers.commit(block, table, fingerprint="f", attempt="a", counts={"finished": part.rows})
    answers.finish(block + 1, fingerprint="f", facts={})
    return run


@pytest.mark.parametrize("kind", ["references", "teacher"])
def test_a_text_that_no_micro_batch_holds_is_named_before_the_first_step(
    folder: Path, with_a_long_one: RunDir, kind: str
) -> None:
    run, model = with_a_long_one, str(folder / "student")
    path = "" if kind == "references" else run.samples("teacher").path
    spec, settings = DataSpec(kind, path, context=5000, over_long="truncate"), Model(path=model, template=TEMPLATE)  # type: ignore[arg-type]
    groups = open_groups(spec, run.storage, model, settings)
    longest = max(groups.take(range(len(groups))), key=lambda group: group.tokens)
    with pytest.raises(
        UserError, match=rf"{longest.name}: with its response it has {longest.tokens} tokens, more than"
    ):
        check_texts(spec, run.storage, model, settings, longest.tokens - 1)
    check_texts(spec, run.storage, model, settings, longest.tokens)
    check_texts(replace(spec, longest=64), run.storage, model, settings, 64)


def test_the_bytes_of_a_text_are_no_fewer_than_its_tokens(folder: Path, with_a_long_one: RunDir) -> None:
    """So that what is too long is always looked at. Beside them are tokens of the template and a space before each text."""
    groups = groups_of(with_a_long_one, folder, "references")
    nothing = {"prompt_id": "", "messages": [{"role": "user", "content": ""}], "reference": ""}
    around = groups._make([[nothing]])[0].tokens + 2
    for block in range(4):
        found = groups.longest(block, 0, 1000)
        indices, sizes = [index for _, index in found], [size for size, _ in found]
        rows = [row for index in indices for row in groups._rows(index)]
        assert sizes == [len(row["reference"]) + sum(len(m["content"]) for m in row["messages"]) for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == groups_in(with_a_long_one, block)
        at_least = sizes[len(sizes) // 2]
        assert len(groups.longest(block, at_least, 1000)) == sum(size >= at_least for size in sizes)
        for group, size in zip(groups.take(indices), sizes, strict=True):
            assert group.tokens <= size + around


def groups_in(run: RunDir, block: int) -> int:
    return train_prompts(run.storage).require("prepare").parts[block].counts["references"]
