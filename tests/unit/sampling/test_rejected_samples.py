"""Rejected samples: which model draws them, with which seeds, and what their fingerprint covers."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from plad_dist import pipeline
from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.decoding_checks import decoding_notes
from plad_dist.errors import UserError
from plad_dist.holders import Holder
from plad_dist.pairing.forms import REJECTED, pair_forms
from plad_dist.preflight import check_inputs
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.sampling import stage
from plad_dist.sampling.job import SamplingJob
from tests.tiny import TEMPLATE, make_random_model, sampling_config

PAIRS = ("samples/student/round-0", "eval/round-0/pair-samples/student")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config whose student has a warm-up, a smaller model with another tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("run")
    raw = sampling_config(folder, 40)
    make_random_model(folder / "weak", 3, text="another text with other tokens")
    raw["training"] = {"warmup": {"epochs": 1}}
    raw["prompts"]["heldout_fraction"] = 0.2
    config = parse_config(raw, "test")
    run = RunDir.of(config)
    run.storage.replace("run.yaml", b"")
    prepare(config, run.storage)
    shutil.copytree(folder / "student", run.model("warmup"))
    return raw


def config_of(raw: dict[str, Any], rejected: dict[str, Any] | None, **sections: Any) -> Config:
    changed = copy.deepcopy(raw) | sections
    changed["sampling"] |= {"rejected": rejected}
    return parse_config(changed, "test")


def weak(raw: dict[str, Any]) -> str:
    return str(Path(raw["run"]["dir"]).parent / "weak")


def jobs(config: Config) -> dict[str, tuple[str, SamplingJob]]:
    """Return the responder and the job of each dataset of the student's side."""
    work = stage.assignments_of_roles(config, RunDir.of(config), ["student"])
    return {
        assignment.job.output: (responder.name, assignment.job)
        for responder, assignments in work
        for assignment in assignments
    }


def test_the_raw_student_draws_what_a_run_without_a_warmup_would_draw(raw: dict[str, Any]) -> None:
    """The jobs are equal, seeds and fingerprints included."""
    of_raw_student = jobs(config_of(raw, {"phase": "student-init"}))
    without_warmup = jobs(config_of(raw, None, training={}))
    for path in PAIRS:
        assert of_raw_student[path] == without_warmup[path]


def test_the_raw_student_and_the_warmup_share_engines(raw: dict[str, Any]) -> None:
    config = config_of(raw, {"phase": "student-init"})
    work = jobs(config)
    assert {name for name, _ in work.values()} == {"student"}
    weights = {path: job.weights for path, (_, job) in work.items()}
    assert {weights.pop(path) for path in PAIRS} == {raw["student"]["path"]}
    assert set(weights.values()) == {str(RunDir.of(config).model("warmup"))}, "the evaluation samples the warm-up"


def test_another_model_draws_in_the_students_place(raw: dict[str, Any]) -> None:
    work, own = jobs(config_of(raw, {"path": weak(raw)})), jobs(config_of(raw, None))
    for path in PAIRS:
        name, job = work[path]
        assert (name, job.role, job.model) == ("rejected", "student", weak(raw))
        assert job.decoding == own[path][1].decoding
        assert job.fingerprint != own[path][1].fingerprint
    assert {path: item for path, item in work.items() if path not in PAIRS} == {
        path: item for path, item in own.items() if path not in PAIRS
    }


def test_the_samples_of_another_model_depend_on_it_and_not_on_the_student(raw: dict[str, Any], tmp_path: Path) -> None:
    fixed = jobs(config_of(raw, {"path": weak(raw)}))[PAIRS[0]][1].fingerprint
    student = config_of(raw, {"path": weak(raw)}, training={}, student=raw["student"] | {"max_length": 64})
    assert jobs(student)[PAIRS[0]][1].fingerprint == fixed
    other = make_random_model(tmp_path / "other", 4)
    assert jobs(config_of(raw, {"path": str(other)}))[PAIRS[0]][1].fingerprint != fixed


def test_every_round_pairs_the_samples_of_the_first(raw: dict[str, Any]) -> None:
    config = config_of(raw, {"phase": "student-init"}, rounds={"most": 2, "stop": "never"})
    run = RunDir.of(config).at_round(1)
    assert run.of_samples(config).samples("student").path == PAIRS[0]
    assert RunDir.of(config).at_round(1).of_samples(config_of(raw, None)).round == 1


def test_a_teacher_that_writes_rejected_responses_gets_no_prompts_to_share(raw: dict[str, Any], tmp_path: Path) -> None:
    teachers = {"strong": raw["teacher"], "weak": {"path": weak(raw), "template": TEMPLATE}}
    sections = {"teacher": None, "teachers": teachers, "run": raw["run"] | {"dir": str(tmp_path / "run")}}
    config = config_of(raw, {"teacher": "weak"}, **sections, training={})
    run = RunDir.of(config)
    run.storage.replace("run.yaml", b"")
    prepare(config, run.storage)
    assert set(train_prompts(run.storage).read()["teacher"].to_pylist()) == {"strong"}
    name, job = jobs(config)[PAIRS[0]]
    assert (name, job.role, job.model) == ("weak", "student", weak(raw))
    [(strong, _)] = stage.assignments_of_roles(config, run, ["teacher"])
    assert strong.name == "strong"


def test_forms_follow_from_the_writer(raw: dict[str, Any], tmp_path: Path) -> None:
    def forms(rejected: dict[str, Any] | None, **sections: Any) -> Any:
        config = config_of(raw, rejected, **sections)
        return pair_forms(config, RunDir.of(config))

    own, before = forms(None), forms({"phase": "student-init"})
    assert (own.rejected, own.is_on_policy) == (None, True)
    assert (before.rejected, before.is_on_policy) == (None, False)
    assert forms({"phase": "student-init"}, training={}).is_on_policy, "without a warm-up it is the starting student"
    other = forms({"path": weak(raw)})
    assert not other.is_on_policy
    assert not other.rejected.same_tokens, "its tokenizer is another one"
    assert other.rejected.control_texts
    assert own.teachers == before.teachers == other.teachers
    twin = tmp_path / "twin"
    shutil.copytree(raw["student"]["path"], twin)
    assert forms({"path": str(twin)}).rejected.same_tokens == (REJECTED,)


def test_a_model_that_cannot_be_sampled_is_refused_before_anything_starts(raw: dict[str, Any], tmp_path: Path) -> None:
    run = raw["run"] | {"dir": str(tmp_path / "new")}
    folder = tmp_path / "incomplete"
    shutil.copytree(weak(raw), folder)
    check_inputs(config := config_of(raw, {"path": str(folder)}, run=run), RunDir.of(config))
    for name, problem in (("tokenizer.json", "tokenizer cannot be loaded"), ("config.json", "has no config.json")):
        (folder / name).unlink()
        with pytest.raises(UserError, match=rf"sampling\.rejected\.path: .*{problem}"):
            check_inputs(config, RunDir.of(config))


def test_a_model_with_code_of_its_own_is_refused_with_a_way_to_allow_it(raw: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(weak(raw), folder)
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}')
    (folder / "configuration_own.py").write_text("raise AssertionError('was run')")
    config = config_of(raw, {"path": str(folder)}, run=raw["run"] | {"dir": str(tmp_path / "new")})
    with pytest.raises(UserError, match=r"sampling\.rejected\.path: .*declare the model with it under `teachers`"):
        check_inputs(config, RunDir.of(config))


@pytest.mark.parametrize("key", ["sampling.rejected", "teachers.short"])
def test_a_context_without_room_for_a_prompt_is_refused(raw: dict[str, Any], tmp_path: Path, key: str) -> None:
    """The prompts are not chosen by this context, so `prompts.over_long` does not refuse it."""
    tokens = raw["sampling"]["student"]["max_tokens"]
    short = str(make_random_model(tmp_path / "short", 6, max_position_embeddings=tokens))
    sections, rejected = {"run": raw["run"] | {"dir": str(tmp_path / "new")}}, {"path": short}
    if key == "teachers.short":
        sections |= {
            "teacher": None,
            "teachers": {"strong": raw["teacher"], "short": {"path": short, "template": TEMPLATE}},
        }
        rejected = {"teacher": "short"}
    config = config_of(raw, rejected, **sections)
    message = rf"sampling\.student\.max_tokens: {tokens}: the context of {key} is {tokens} tokens"
    with pytest.raises(UserError, match=message):
        check_inputs(config, RunDir.of(config))
    sections["sampling"] = raw["sampling"] | {"student": raw["sampling"]["student"] | {"max_tokens": tokens - 1}}
    config = config_of(raw, rejected, **sections)
    check_inputs(config, RunDir.of(config))


def test_the_refusal_of_a_too_long_context_names_the_key_of_the_writer(raw: dict[str, Any], tmp_path: Path) -> None:
    new = {"run": raw["run"] | {"dir": str(tmp_path / "new")}}
    config = config_of(raw, {"path": weak(raw), "max_length": 1 << 20}, **new)
    with pytest.raises(UserError, match=r"sampling\.rejected\.max_length: 1048576: "):
        check_inputs(config, RunDir.of(config))


def test_another_model_renders_its_prompts_with_the_students_template(raw: dict[str, Any]) -> None:
    writer = config_of(raw, {"path": weak(raw)}).rejected_writer()
    assert writer is not None
    assert writer.model.template == TEMPLATE


def test_a_writer_that_cannot_do_its_work_is_noted(raw: dict[str, Any], tmp_path: Path) -> None:
    short = make_random_model(tmp_path / "short", 6, max_position_embeddings=64)
    [note] = [note for note in decoding_notes(config_of(raw, {"path": str(short)})) if "shorter" in note]
    assert note.startswith("sampling.rejected: its context of 64 tokens")
    scratch = {"scratch": {"architecture": {"model_type": "llama"}}, "template": TEMPLATE}
    notes = list(decoding_notes(config_of(raw, {"phase": "student-init"}, student=scratch)))
    assert "writes no sensible text to reject" in notes[0]
    assert not list(decoding_notes(config_of(raw, {"path": weak(raw)})))


def test_nothing_is_drawn_before_the_raw_student_exists(raw: dict[str, Any], tmp_path: Path) -> None:
    scratch = {"scratch": {"architecture": {"model_type": "llama"}}, "template": TEMPLATE}
    config = config_of(raw, {"phase": "student-init"}, student=scratch)
    with pytest.raises(UserError, match=r"student-init: missing; run `plad train --phase warmup` first"):
        stage.sample(config, RunDir.of(config), Progress(), ["student"])


def test_a_later_round_samples_only_a_writer_that_was_trained(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "continues_after", lambda *_: True)
    for rejected, is_sampled in ((None, True), ({"phase": "student-init"}, False), ({"path": weak(raw)}, False)):
        config = config_of(raw, rejected, rounds={"most": 2, "stop": "never"})
        steps = {step.name: step for step in pipeline.steps_of(config, RunDir.of(config), Progress())}
        assert ("sample, round 1" in steps) == is_sampled
        assert Holder("sample", "rejected") in steps["sample"].holders
