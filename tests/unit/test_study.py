"""Studies: what a variant takes over from another one, and what it must not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist import rundir
from plad_dist.config_file import parse_config
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.errors import UserError
from plad_dist.pipeline import run_pipeline
from plad_dist.reuse import take_over
from plad_dist.rundir import RunDir, check_same_run, open_run
from plad_dist.study import load_study
from tests.conftest import tiny_config, write_prompts

MADE = (
    "models/teacher/model.safetensors", "models/warmup/model.safetensors", "events/warmup/metrics.jsonl",
    "samples/teacher/round-0/part-00000.arrow", "samples/student/round-0/part-00000.arrow",
    "samples/student/round-1/part-00000.arrow", "eval/round-0/samples/warmup/greedy/part-00000.arrow",
    "eval/round-0/samples/plad/greedy/part-00000.arrow", "pairs/round-0/part-00000.arrow", "models/round-0/model.safetensors",
)  # fmt: skip


DECODINGS = {"greedy": {"temperature": 0.0, "max_tokens": 8}, "sampled": {"temperature": 1.0, "max_tokens": 8}}


@pytest.fixture
def first(tmp_path: Path) -> dict[str, Any]:
    """A run of which something of every stage is there."""
    write_prompts(tmp_path)
    raw = tiny_config(tmp_path)
    raw["run"]["dir"] = str(tmp_path / "first")
    config = parse_config(raw, "first")
    run = open_run(config)
    prepare(config, run.storage)
    for name in MADE:
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
        ({"training__round": {"loss": {"name": "dpo"}}}, {*MADE} - {MADE[5], MADE[7], MADE[9]}),
        ({"pairing__combine": "one"}, {*MADE} - {MADE[5], MADE[7], MADE[8], MADE[9]}),
        ({"sampling__window": 3, "sampling__limit": 100}, {*MADE[:3]}),
        ({"training__over_long": "drop"}, set()),
        # What the teacher made does not hang on the warm-up student's training, nor on how that is sampled.
        ({"training__warmup": {"epochs": 7, "batch_groups": 8}}, {MADE[0], MADE[3]}),
        ({"sampling__student": {"temperature": 0.7, "max_tokens": 8}, "evaluation__decodings": DECODINGS}, {*MADE[:4]}),
        ({"sampling__student": {"temperature": 0.7, "max_tokens": 8}}, {*MADE[:3]}),
        # Operational, and yet the student is another.
        ({"training__watch": {}}, {*MADE} - {MADE[5], MADE[7], MADE[9]}),
        ({"training__deepspeed": "zero2"}, set()),
    ],
)
def test_what_is_made_before_the_first_difference_is_taken_over(
    tmp_path: Path, first: dict[str, Any], change: dict[str, Any], taken: set[str]
) -> None:
    source, config = parse_config(first, "first"), variant(first, tmp_path, **change)
    take_over(config, [source])
    run = RunDir.of(config)
    assert {name for name in MADE if (run.root / name).is_file()} == taken
    check_same_run(config, run)
    assert train_prompts(run.storage).require("prepare").rows > 0
    take_over(config, [source])  # it is begun: nothing happens


def test_logs_are_copied_for_they_grow(tmp_path: Path, first: dict[str, Any]) -> None:
    config = variant(first, tmp_path, training__round={"loss": {"name": "dpo"}})
    take_over(config, [parse_config(first, "first")])
    for name, linked in (("events/warmup/metrics.jsonl", False), ("models/warmup/model.safetensors", True)):
        assert (RunDir.of(config).root / name).samefile(tmp_path / "first" / name) == linked


def test_a_begin_that_was_cut_is_made_anew(tmp_path: Path, first: dict[str, Any]) -> None:
    config = variant(first, tmp_path, training__round={"loss": {"name": "dpo"}})
    half = tmp_path / ".begun-0" / "pairs"
    half.mkdir(parents=True)
    (half / "half").touch()
    take_over(config, [parse_config(first, "first")])
    assert not (RunDir.of(config).root / "pairs" / "half").exists()
    assert (RunDir.of(config).root / MADE[8]).is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"sampling__teacher": {"cpus": 2.0}},
        {"sampling__student": {"replicas": 2}},
        {"training__warmup": {"keep_checkpoints": 1}},
        {"training__num_workers": 1},
    ],
)
def test_how_the_work_is_carried_out_costs_nothing_of_what_is_there(
    tmp_path: Path, first: dict[str, Any], change: dict[str, Any]
) -> None:
    ((key, value),) = change.items()
    section, _, name = key.partition("__")
    merged = {**first[section][name], **value} if isinstance(value, dict) else value
    config = variant(first, tmp_path, **{key: merged})
    take_over(config, [parse_config(first, "first")])
    taken = {name for name in MADE if (RunDir.of(config).root / name).is_file()}
    assert taken == {*MADE} - {MADE[5], MADE[7]}


def test_how_training_goes_decides_nothing_of_models_that_come_as_they_are(
    tmp_path: Path, first: dict[str, Any]
) -> None:
    raw = {**first, "teacher": {"endpoint": {"url": "http://localhost:1/v1", "model": "big"}}}
    raw["training"] = {key: value for key, value in first["training"].items() if key != "teacher"}
    config = variant(raw, tmp_path, training__deepspeed="zero2")
    take_over(config, [parse_config(raw, "first")])
    run = RunDir.of(config)
    assert (run.root / MADE[3]).is_file(), "what the teacher said is not bought again"
    assert not (run.root / MADE[1]).exists()


def test_a_run_at_work_may_be_taken_over_from(
    tmp_path: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spooled answer goes when its block is committed; what is being written has a hidden name."""
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
    there = RunDir.of(config).root / "samples" / "teacher" / "round-0"
    assert (there / "part-00001.arrow").read_text() == "paid"
    assert {file.name for file in there.iterdir()} == {"part-00000.arrow", "part-00001.arrow", "spool"}


def test_of_two_commands_that_begin_a_run_one_does(
    tmp_path: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, rename = variant(first, tmp_path, training__round={"loss": {"name": "dpo"}}), Path.rename

    def late(self: Path, to: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        take_over(config, [parse_config(first, "first")])
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    take_over(config, [parse_config(first, "first")])
    run = RunDir.of(config)
    check_same_run(config, run)
    assert len(train_prompts(run.storage).read()) == train_prompts(run.storage).require("prepare").rows
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".begun")] == []


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path: Path, first: dict[str, Any]) -> None:
    config = variant(first, tmp_path)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "thesis.txt").touch()
    take_over(config, [parse_config(first, "first")])
    assert [file.name for file in (tmp_path / "second").iterdir()] == ["thesis.txt"]


def test_a_folder_that_is_there_and_empty_is_begun_in_place(tmp_path: Path, first: dict[str, Any]) -> None:
    """As a mount is, or a link to another disk: nothing can take its place."""
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


def test_what_a_phase_has_said_that_is_trained_anew_is_left(tmp_path: Path, first: dict[str, Any]) -> None:
    said = tmp_path / "first" / "events" / "round-0" / "stopped.json"
    said.parent.mkdir(parents=True)
    said.write_text("the loss has exploded")
    (tmp_path / "first" / MADE[9]).unlink()
    (tmp_path / "first" / MADE[9]).parent.rmdir()
    config = variant(first, tmp_path)
    take_over(config, [parse_config(first, "first")])
    assert (RunDir.of(config).root / MADE[8]).is_file()
    assert not (RunDir.of(config).root / "events" / "round-0").exists()


def study(folder: Path, **parts: Any) -> str:
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "dir": str(folder / "runs")} | parts))
    return str(path)


def test_variants_do_not_leak_into_one_another(tmp_path: Path) -> None:
    path = study(
        tmp_path,
        set={"training.round": {"epochs": 2}},
        variants={"dpo": {"training.round.loss": {"name": "dpo"}}, "plain": {}},
        seeds=[1, 2],
    )
    found = load_study(path, [])
    assert [[(name, c.training.round.loss.name, c.run.seed) for name, c in runs] for runs in found] == [
        [("dpo", "dpo", 1), ("plain", "rank", 1)],
        [("dpo", "dpo", 2), ("plain", "rank", 2)],
    ]
    assert {c.run.dir for runs in found for _, c in runs} == {
        str(tmp_path / "runs" / f"seed-{seed}" / name) for seed in (1, 2) for name in ("dpo", "plain")
    }


@pytest.mark.parametrize(
    ("parts", "overrides", "said"),
    [
        ({}, [], "variants: missing"),
        ({"variants": {"a/b": {}}}, [], "name 'a/b'"),
        (
            {"variants": {"a": {"training.round.los": 1}}},
            [],
            r"study.yaml: variant a: .*\n.*training.round.los: unknown key",
        ),
        ({"variants": {"a": {}}}, ["run.seed=3"], "is set for each run by the study"),
        ({"variants": {"a": {}}, "base": "none.yaml"}, [], "none.yaml: no such config file"),
        ({"variants": {"a": {}}, "seeds": [1, 2, 1]}, [], "a seed is given twice"),
        ({"variants": {"a": {}}, "foo": 1}, [], "foo: unknown key; a study has base, dir, set, seeds, variants"),
        ({"variants": {"a": {"run.dir": "x"}}}, [], "variant a: run.dir: is set for each run"),
        ({"variants": {"a": {"run.seed": 3}}, "seeds": [1, 2]}, [], "variant a: run.seed: is set for each run"),
        (
            {"variants": {"a": {}, "b": {"sampling.student.temperature": 0.5}}},
            [],
            "variant b: its main decoding is not that of a",
        ),
    ],
)
def test_what_is_wrong_with_a_study_is_named(
    tmp_path: Path, parts: dict[str, Any], overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        load_study(study(tmp_path, **parts), overrides)


def test_the_config_of_a_run_is_told_from_a_study(tmp_path: Path) -> None:
    path = study(tmp_path, variants={"a": {}})
    with pytest.raises(UserError, match=r"base.yaml: is the config of a run \(`plad run`\)"):
        load_study(str(Path(path).parent / "base.yaml"), [])


def test_a_run_takes_over_what_the_one_that_it_names_has_made_alike(tmp_path: Path, first: dict[str, Any]) -> None:
    """`plad pair` on a new run whose samples are there already would otherwise be refused for want of them."""
    config = variant(first, tmp_path, run__reuse=str(tmp_path / "moved"), training__round={"loss": {"name": "dpo"}})
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "second").mkdir()  # a mount, say
    run_pipeline(config, "prepare")
    run = RunDir.of(config)
    assert (run.root / MADE[8]).samefile(tmp_path / "moved" / MADE[8])
    assert not (run.root / MADE[9]).exists()
    shutil.rmtree(tmp_path / "moved")
    run_pipeline(config, "prepare")  # it is begun, and needs the other no more
    assert (run.root / MADE[8]).is_file()


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        ("nowhere", "run.reuse: .*nowhere: no such run directory"),
        ("s3://bucket/run", "run.reuse: s3://bucket/run: is an object store"),
    ],
)
def test_a_run_that_cannot_be_taken_over_from_is_named(
    tmp_path: Path, first: dict[str, Any], reuse: str, message: str
) -> None:
    place = reuse if "://" in reuse else str(tmp_path / reuse)
    with pytest.raises(UserError, match=message):
        run_pipeline(variant(first, tmp_path, run__reuse=place), "prepare")
    assert not (tmp_path / "second").exists()


def test_a_run_of_another_version_says_so(first: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "__version__", "9.9.9")
    changed = parse_config({**first, "run": {**first["run"], "seed": 6}}, "first")
    with pytest.raises(
        UserError, match=r"run\.seed: 5 before, 6 now\nThe run was last continued with plad-dist .*, this is 9\.9\.9"
    ):
        check_same_run(changed, RunDir.of(changed))
