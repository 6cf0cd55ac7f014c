"""Reuse of another run: the files that a new run takes over, and those that it must not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from plad_dist import rundir
from plad_dist.config_file import parse_config
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.errors import RunFailed, UserError
from plad_dist.pipeline import run_pipeline
from plad_dist.reuse import take_over
from plad_dist.rundir import RunDir, check_same_run, open_run, with_date
from tests.conftest import tiny_config, write_prompts
from tests.tiny import make_random_model

FILES = (
    "models/teacher/model.safetensors", "models/warmup/model.safetensors", "events/warmup/metrics.jsonl",
    "samples/teacher/round-0/part-00000.arrow", "samples/student/round-0/part-00000.arrow",
    "samples/student/round-1/part-00000.arrow", "eval/round-0/samples/warmup/greedy/part-00000.arrow",
    "eval/round-0/samples/plad/greedy/part-00000.arrow", "pairs/round-0/part-00000.arrow",
    "models/round-0/model.safetensors",
)  # fmt: skip


DECODINGS = {"greedy": {"temperature": 0.0, "max_tokens": 8}, "sampled": {"temperature": 1.0, "max_tokens": 8}}


@pytest.fixture
def first(tmp_path: Path) -> dict[str, Any]:
    """A run with files of every stage."""
    write_prompts(tmp_path)
    raw = tiny_config(tmp_path)
    raw["run"]["dir"] = str(tmp_path / "first")
    config = parse_config(raw, "first")
    run = open_run(config)
    prepare(config, run.storage)
    for name in FILES:
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text(name)
    return raw


def variant(first: dict[str, Any], folder: Path, **sections: Any) -> Any:
    raw = {**first, "run": {**first["run"], "dir": str(folder / "second")}}
    for key, value in sections.items():
        section, _, name = key.partition("__")
        raw[section] = {**raw.get(section, {}), name: value}
    return parse_config(raw, "second")


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"training__round": {"loss": {"name": "dpo"}}}, {*FILES} - {FILES[5], FILES[7], FILES[9]}),
        ({"pairing__combine": "one"}, {*FILES} - {FILES[5], FILES[7], FILES[8], FILES[9]}),
        ({"sampling__window": 3, "sampling__limit": 100}, {*FILES[:3]}),
        ({"training__over_long": "drop"}, set()),
        # The teacher's work does not depend on the training or the sampling of the warm-up student.
        ({"training__warmup": {"epochs": 7, "batch_groups": 8}}, {FILES[0], FILES[3]}),
        (
            {"sampling__student": {"temperature": 0.7, "max_tokens": 8}, "evaluation__decodings": DECODINGS},
            {*FILES[:4]},
        ),
        ({"sampling__student": {"temperature": 0.7, "max_tokens": 8}}, {*FILES[:3]}),
        # Who writes the rejected responses does not change those that the evaluation samples.
        ({"sampling__rejected": {"phase": "student-init"}}, {*FILES[:4], FILES[6]}),
        ({"evaluation__candidates": 3}, {*FILES} - {FILES[5], FILES[6], FILES[7]}),
        # Operational keys that still change the student.
        ({"training__watch": {}}, {*FILES} - {FILES[5], FILES[7], FILES[9]}),
        ({"training__deepspeed": "zero2"}, set()),
    ],
)
def test_files_before_the_first_difference_are_taken_over(
    tmp_path: Path, first: dict[str, Any], change: dict[str, Any], taken: set[str]
) -> None:
    source, config = parse_config(first, "first"), variant(first, tmp_path, **change)
    take_over(config, [source])
    run = RunDir.of(config)
    assert {name for name in FILES if (run.root / name).is_file()} == taken
    check_same_run(config, run)
    assert train_prompts(run.storage).require("prepare").rows > 0
    take_over(config, [source])  # the run has started: nothing happens


def test_runs_with_the_same_writer_of_rejected_responses_share_them_whatever_their_warmup(
    tmp_path: Path, first: dict[str, Any]
) -> None:
    first["sampling"] = {**first["sampling"], "rejected": {"phase": "student-init"}}
    config = variant(first, tmp_path, training__warmup={"epochs": 7, "batch_groups": 8})
    shutil.rmtree(tmp_path / "first")
    source = parse_config(first, "first")
    prepare(source, open_run(source).storage)
    for name in FILES:
        (tmp_path / "first" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "first" / name).write_text(name)
    take_over(config, [source])
    assert {name for name in FILES if (RunDir.of(config).root / name).is_file()} == {FILES[0], FILES[3], FILES[4]}


def test_the_date_of_a_run_with_which_nothing_is_shared_stays_there(tmp_path: Path, first: dict[str, Any]) -> None:
    first = {**first, "run": {**first["run"], "date": "2026-01-31"}}
    source = parse_config(first, "first")
    undated = variant({**first, "run": {**first["run"], "date": None, "seed": 6}}, tmp_path)
    take_over(undated, [source])
    assert not RunDir.of(undated).storage.exists("run.yaml")
    assert with_date(undated, RunDir.of(undated)).student.rendering()["date"] is None
    assert source.student.rendering()["date"] == "2026-01-31"


def test_growing_logs_are_copied_instead_of_linked(tmp_path: Path, first: dict[str, Any]) -> None:
    config = variant(first, tmp_path, training__round={"loss": {"name": "dpo"}})
    take_over(config, [parse_config(first, "first")])
    for name, linked in (("events/warmup/metrics.jsonl", False), ("models/warmup/model.safetensors", True)):
        assert (RunDir.of(config).root / name).samefile(tmp_path / "first" / name) == linked


def test_an_interrupted_takeover_is_repeated(tmp_path: Path, first: dict[str, Any]) -> None:
    config = variant(first, tmp_path, training__round={"loss": {"name": "dpo"}})
    half = tmp_path / ".begun-0" / "pairs"
    half.mkdir(parents=True)
    (half / "half").touch()
    take_over(config, [parse_config(first, "first")])
    assert not (RunDir.of(config).root / "pairs" / "half").exists()
    assert (RunDir.of(config).root / FILES[8]).is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"sampling__teacher": {"cpus": 2.0}},
        {"sampling__student": {"replicas": 2}},
        {"training__warmup": {"keep_checkpoints": 1}},
        {"training__num_workers": 1},
    ],
)
def test_operational_keys_do_not_prevent_reuse(tmp_path: Path, first: dict[str, Any], change: dict[str, Any]) -> None:
    ((key, value),) = change.items()
    section, _, name = key.partition("__")
    merged = {**first[section][name], **value} if isinstance(value, dict) else value
    config = variant(first, tmp_path, **{key: merged})
    take_over(config, [parse_config(first, "first")])
    taken = {name for name in FILES if (RunDir.of(config).root / name).is_file()}
    assert taken == {*FILES} - {FILES[5], FILES[7]}


def test_training_keys_do_not_affect_models_that_are_not_trained(tmp_path: Path, first: dict[str, Any]) -> None:
    raw = {**first, "teacher": {"endpoint": {"url": "http://localhost:1/v1", "model": "big"}}}
    raw["training"] = {key: value for key, value in first["training"].items() if key != "teacher"}
    config = variant(raw, tmp_path, training__deepspeed="zero2")
    take_over(config, [parse_config(raw, "first")])
    run = RunDir.of(config)
    assert (run.root / FILES[3]).is_file(), "responses that were paid for are not requested again"
    assert not (run.root / FILES[1]).exists()


def test_a_running_run_can_be_reused(tmp_path: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A spooled response is removed when its block is committed; an unfinished file is hidden."""
    samples = tmp_path / "first" / "samples" / "teacher" / "round-0"
    (samples / "spool" / "00001").mkdir(parents=True)
    (samples / "spool" / "00001" / "a.arrow").write_text("paid")
    (samples / ".part-00001.arrow.12").write_text("half")
    copy = shutil.copy2

    def committed_meanwhile(file: Path, to: Path) -> None:
        if "spool" in Path(file).parts:
            Path(file).rename(samples / "part-00001.arrow")
        copy(file, to)

    monkeypatch.setattr(shutil, "copy2", committed_meanwhile)
    config = variant(first, tmp_path, training__round={"loss": {"name": "dpo"}})
    take_over(config, [parse_config(first, "first")])
    reused = RunDir.of(config).root / "samples" / "teacher" / "round-0"
    assert (reused / "part-00001.arrow").read_text() == "paid"
    assert {file.name for file in reused.iterdir()} == {"part-00000.arrow", "part-00001.arrow", "spool"}


def test_of_two_commands_that_start_a_run_one_succeeds(
    tmp_path: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one finds a complete draft, and finishes the moves of the first one."""
    config, rename = variant(first, tmp_path, training__round={"loss": {"name": "dpo"}}), Path.rename

    def late(self: Path, to: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        take_over(config, [parse_config(first, "first")], "plad study")
        open_run(config, "plad study")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(RunFailed, match=r"`plad study` on .* has taken over the run"):
        take_over(config, [parse_config(first, "first")])
    run = RunDir.of(config)
    check_same_run(config, run)
    assert len(train_prompts(run.storage).read()) == train_prompts(run.storage).require("prepare").rows
    assert [file.name for file in run.root.iterdir() if file.name.startswith(".begun")] == []


def test_a_folder_with_files_is_left_unchanged(tmp_path: Path, first: dict[str, Any]) -> None:
    config = variant(first, tmp_path)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "thesis.txt").touch()
    take_over(config, [parse_config(first, "first")])
    assert [file.name for file in (tmp_path / "second").iterdir()] == ["thesis.txt"]


def test_an_existing_empty_folder_is_filled_in_place(tmp_path: Path, first: dict[str, Any]) -> None:
    """A mount, or a link to another disk, cannot be replaced by a rename."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / ".snapshot").mkdir()
    (tmp_path / "second").symlink_to(tmp_path / "disk")
    config = variant(first, tmp_path)
    take_over(config, [parse_config(first, "first")])
    assert (tmp_path / "second").is_symlink()
    run = RunDir.of(config)
    check_same_run(config, run)
    assert train_prompts(run.storage).require("prepare").rows > 0
    assert [file.name for file in run.root.iterdir() if file.name.startswith(".")] == [".snapshot"]


def test_events_of_a_phase_without_a_model_are_not_taken_over(tmp_path: Path, first: dict[str, Any]) -> None:
    stopped = tmp_path / "first" / "events" / "round-0" / "stopped.json"
    stopped.parent.mkdir(parents=True)
    stopped.write_text("the loss has exploded")
    (tmp_path / "first" / FILES[9]).unlink()
    (tmp_path / "first" / FILES[9]).parent.rmdir()
    config = variant(first, tmp_path)
    take_over(config, [parse_config(first, "first")])
    assert (RunDir.of(config).root / FILES[8]).is_file()
    assert not (RunDir.of(config).root / "events" / "round-0").exists()


def test_a_run_takes_over_the_identical_work_of_the_run_that_it_names(tmp_path: Path, first: dict[str, Any]) -> None:
    """`plad pair` on a new run would otherwise be refused, because its samples are missing."""
    config = variant(first, tmp_path, run__reuse=str(tmp_path / "moved"), training__round={"loss": {"name": "dpo"}})
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "second").mkdir()  # a mount, say
    run_pipeline(config, "prepare")
    run = RunDir.of(config)
    assert (run.root / FILES[8]).samefile(tmp_path / "moved" / FILES[8])
    assert not (run.root / FILES[9]).exists()
    shutil.rmtree(tmp_path / "moved")
    run_pipeline(config, "prepare")  # the run has started, and no longer needs the other one
    assert (run.root / FILES[8]).is_file()


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        ("nowhere", "run.reuse: .*nowhere: no such run directory"),
        ("s3://bucket/run", "run.reuse: s3://bucket/run: is an object store"),
    ],
)
def test_a_run_that_cannot_be_reused_is_named(tmp_path: Path, first: dict[str, Any], reuse: str, message: str) -> None:
    path = reuse if "://" in reuse else str(tmp_path / reuse)
    with pytest.raises(UserError, match=message):
        run_pipeline(variant(first, tmp_path, run__reuse=path), "prepare")
    assert not (tmp_path / "second").exists()


def test_a_run_of_another_version_is_reported(first: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "__version__", "9.9.9")
    changed = parse_config({**first, "run": {**first["run"], "seed": 6}}, "first")
    with pytest.raises(
        UserError, match=r"run\.seed: 5 before, 6 now\nThe run was last continued with plad-dist .*, this is 9\.9\.9"
    ):
        check_same_run(changed, RunDir.of(changed))


def test_other_layers_of_a_cut_student_change_neither_the_prompts_nor_the_teachers_responses(
    tmp_path: Path, first: dict[str, Any]
) -> None:
    model, template = make_random_model(tmp_path / "model", num_hidden_layers=5), first["student"]["template"]
    first |= {"student": {"from": {"path": str(model), "layers": 3}, "template": template}}
    first["run"]["dir"] = str(tmp_path / "cut")
    source = parse_config(first, "cut")
    run = open_run(source)
    prepare(source, run.storage)
    names = ("models/student-init/model.safetensors", *FILES)
    for name in names:
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text(name)
    taken = {}
    for layers in (3, 4):
        config = variant(first, tmp_path / str(layers), student__from={"path": str(model), "layers": layers})
        take_over(config, [source])
        taken[layers] = {name for name in names if (RunDir.of(config).root / name).is_file()}
        assert train_prompts(RunDir.of(config).storage).require("prepare").rows > 0
    assert taken[4] == {FILES[0], FILES[3]}
    assert taken[3] > {names[0], *FILES[:5]}
