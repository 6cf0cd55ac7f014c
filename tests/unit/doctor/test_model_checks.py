"""Tokenizers, templates and embeddings that do not belong together are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from plad_dist.config_file import parse_config
from plad_dist.doctor.config_checks import check_models
from plad_dist.doctor.findings import Finding, run_check
from plad_dist.doctor.node import HERE
from plad_dist.training.model.scratch import train_tokenizer
from tests.conftest import write_config
from tests.tiny import make_random_model
from tests.unit.doctor.findings import failures, only, states


def findings_about_models(raw: dict[str, Any]) -> list[Finding]:
    return list(run_check("models", HERE, partial(check_models, parse_config(raw, "test"), [])))


def test_the_tokenizer_of_a_larger_model_exits_with_1(
    run: tuple[Path, dict[str, Any]], doctor: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = run
    texts = (f"{row} {row * row} {row:b} {row:x}" for row in range(2000))
    train_tokenizer(texts, 600).save_pretrained(folder / "student")
    code, printed = doctor(str(write_config(folder, raw)), "--json")
    assert code == 1
    (failure,) = failures(printed)
    assert "student.path" in failure["found"]
    assert "it is the tokenizer of another model" in failure["found"]


def test_an_end_token_without_embedding_fails(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    (folder / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 128_009]}))
    finding = only(findings_about_models(raw), "fail")
    assert "128009" in finding.text
    assert finding.text.startswith("teacher.path:")


def test_a_double_bos_is_a_warning(run: tuple[Path, dict[str, Any]]) -> None:
    _, raw = run
    raw["student"]["template"] = "<s><s>{{ messages[-1].content }}"
    assert "student: its prompts begin with <s> twice" in only(findings_about_models(raw), "warn").text


def test_padded_embeddings_and_a_teachers_own_tokenizer_are_no_faults(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    config_file = folder / "teacher" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"vocab_size": 384}))
    texts = ["other words than those of the student, other words"]
    train_tokenizer(iter(texts), 310).save_pretrained(folder / "teacher")
    findings = findings_about_models(raw)
    assert set(states(findings)) == {"ok"}
    assert any("padded to 384" in finding.text for finding in findings)
    assert any("another tokenizer than the student" in finding.text for finding in findings)


def test_a_model_without_a_template_fails(run: tuple[Path, dict[str, Any]]) -> None:
    _, raw = run
    del raw["student"]["template"]
    assert "no chat template" in only(findings_about_models(raw), "fail").text


def test_models_that_the_run_creates_need_not_exist_yet(tiny: tuple[Path, dict[str, Any]]) -> None:
    _, raw = tiny
    assert set(states(findings_about_models(raw))) == {"ok"}


def test_a_cut_student_is_examined_with_the_tokenizer_of_its_model(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    template = "<s><s>{{ messages[-1].content }}"
    raw["student"] = {"from": {"path": str(folder / "teacher"), "layers": 3}, "template": template}
    raw["training"] = {"warmup": {}}
    findings = findings_about_models(raw)
    assert "student: its prompts begin with <s> twice" in only(findings, "warn").text
    assert any("student: created by the run from 3 layers of " in finding.text for finding in findings)
    (folder / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 128_009]}))
    raw["teacher"]["path"] = str(folder / "student")
    assert only(findings_about_models(raw), "fail").text.startswith("student.from.path:")


def test_another_writer_of_rejected_responses_is_checked_like_a_teacher(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    make_random_model(folder / "weak", text="another text with other tokens")
    raw["sampling"]["rejected"] = {"path": str(folder / "weak")}
    texts = [finding.text for finding in findings_about_models(raw) if "sampling.rejected" in finding.text]
    assert any("another tokenizer than the student" in text for text in texts)
    (folder / "weak" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 128_009]}))
    assert only(findings_about_models(raw), "fail").text.startswith("sampling.rejected")
