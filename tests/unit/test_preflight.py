"""Checks before a run: what a config names fits together, and what has no effect is named."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config import Lora, Model, Training
from plad_dist.config_file import parse_config
from plad_dist.data.models import check_local_model
from plad_dist.decoding_checks import check_decoding, decoding_notes, sampled_models
from plad_dist.errors import UserError
from plad_dist.preflight import check_adapters, check_inputs
from plad_dist.rundir import RunDir
from plad_dist.training.model.deepspeed_config import check_workers
from tests.conftest import tiny_config


def model_folder(folder: Path, generation: dict[str, Any] | None = None) -> str:
    """Write the configs of a model with a context of 512 tokens."""
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 32, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"stop_token_ids": [3, 32000]}, "sampling.teacher.stop_token_ids: 32000: .* has tokens 0 to 31999"),
        ({"engine": {"max_model_len": 513}}, "sampling.teacher.engine.max_model_len: 513: .* a context of 512 tokens"),
        ({"engine": {"max_model_len": 512}, "stop_token_ids": [31999]}, None),
        ({"engine": {"max_model_len": 513, "hf_overrides": {}}}, None),
    ],
)
def test_a_decoding_that_the_engine_would_refuse_is_refused(
    tmp_path: Path, sampling: dict[str, Any], message: str | None
) -> None:
    raw = {
        "run": {"dir": "x"},
        "prompts": {"source": {"type": "files", "paths": ["a.jsonl"]}},
        "teacher": {"path": model_folder(tmp_path / "a")},
        "student": {"path": model_folder(tmp_path / "s"), "max_length": 513},
        "sampling": {"teacher": sampling},
        "evaluation": {"judges": {"j": {"type": "llm", "model": {"path": str(tmp_path / "s"), "max_length": 600}}}},
    }
    student, teacher, judge = sampled_models(parse_config(raw, "x"))
    with pytest.raises(UserError, match=r"student.max_length: 513: "):
        check_decoding(student)
    with pytest.raises(UserError, match=r"evaluation.judges.j.model.max_length: 600: "):
        check_decoding(judge)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_decoding(teacher)


def test_settings_without_the_expected_effect_are_named(tmp_path: Path) -> None:
    thoughtful = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    raw: dict[str, Any] = {
        "run": {"dir": "x"},
        "prompts": {"source": {"type": "files", "paths": ["a.jsonl"]}},
        "teachers": {
            "a": {"path": model_folder(tmp_path / "a", thoughtful)},
            "b": {"path": str(tmp_path / "a"), "sampling": thoughtful | {"do_sample": None}},
        },
        "student": {"path": model_folder(tmp_path / "s")},
        "sampling": {"teacher": {"temperature": 0.6, "top_p": 1.0, "max_tokens": 512}},
    }
    del raw["teachers"]["b"]["sampling"]["do_sample"]
    assert list(decoding_notes(parse_config(raw, "x"))) == [
        f"teachers.a: generation_config.json of {tmp_path}/a sets top_k 20, repetition_penalty 1.05, which are not "
        "used; sampling.teacher samples with top_k 0, repetition_penalty 1",
        "sampling.teacher.max_tokens: 512: responses of teachers.a end earlier, at its context of 512 tokens",
    ]
    raw["sampling"] = {"student": {"engine": {"max_model_len": 300}, "max_tokens": 400}}
    shortened, ended = (note for note in decoding_notes(parse_config(raw, "x")) if note.startswith("sampling.student"))
    assert shortened.startswith("sampling.student.engine.max_model_len: 300: shortens the context of student from 512")
    assert ended.endswith("end earlier, at its context of 300 tokens")
    raw["sampling"] = {"student": {"temperature": 0}}
    raw["evaluation"] = {"candidates": 4}
    assert "evaluation.candidates: none are sampled" in next(decoding_notes(parse_config(raw, "x")))


def test_settings_that_a_server_does_not_get_are_named(tmp_path: Path) -> None:
    server = {"url": "http://host/v1", "model": "m", "mode": "batch", "requests_per_minute": 60}
    raw: dict[str, Any] = {
        "run": {"dir": "x"},
        "prompts": {"source": {"type": "files", "paths": ["a.jsonl"]}},
        "teacher": {"endpoint": server},
        "student": {"path": model_folder(tmp_path / "s")},
        "sampling": {"teacher": {"engine": {"max_num_seqs": 8}}},
    }
    assert list(decoding_notes(parse_config(raw, "x"))) == [
        "sampling.teacher.engine: has no effect, because teacher is behind a server",
        "teacher.endpoint.requests_per_minute: has no effect with `mode: batch`",
    ]


def test_the_path_of_a_model_is_a_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "s")
    with pytest.raises(UserError, match=rf"is a file; name the folder that holds it, {folder}"):
        check_local_model(f"{folder}/config.json")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"deepspeed": "zero2", "num_workers": (1, 2)}, "training.num_workers: an elastic group needs ZeRO stage 3"),
        ({"deepspeed": "zero2", "watch": {}}, "training.watch: reads checkpoints of ZeRO stage 3"),
        ({"deepspeed": "zero3_multinode", "num_workers": 12}, "no multiple of zero_hpz_partition_size=8"),
        ({"deepspeed": "zero3", "num_workers": (1, 2), "watch": {}}, None),
    ],
)
def test_workers_that_the_deepspeed_config_forbids_are_refused(training: dict[str, Any], message: str | None) -> None:
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_workers(Training(**training))


def test_adapters_of_layers_that_the_student_lacks_are_refused(tmp_path: Path) -> None:
    student = Model(path=model_folder(tmp_path / "s")).pretrained()
    assert student is not None
    check_adapters(student, Lora(target_modules=["q_proj", "up_proj"]))
    with pytest.raises(UserError, match=r"target_modules: c_attn: expected names .*; it has down_proj, gate_proj, k_p"):
        check_adapters(student, Lora(target_modules=["q_proj", "c_attn"]))
    with pytest.raises(UserError, match=r"target_modules: must not be empty without target_parameters; name .*q_proj"):
        check_adapters(student, Lora(target_modules=[]))


@pytest.mark.parametrize("is_created", [False, True])
def test_an_auxiliary_loss_for_a_student_without_experts_is_refused(tmp_path: Path, is_created: bool) -> None:
    raw = tiny_config(tmp_path)
    raw["training"]["router_aux_loss"] = 0.1
    if not is_created:
        raw["student"] = {"path": model_folder(tmp_path / "s")}
    config = parse_config(raw, "x")
    with pytest.raises(UserError, match=r"training.router_aux_loss: llama models of this config have no experts"):
        check_inputs(config, RunDir.of(config))
