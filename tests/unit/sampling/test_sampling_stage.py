"""Assignment of blocks: each has exactly one model, and all inputs of samples are fingerprinted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config import Config, Model
from plad_dist.config_file import parse_config
from plad_dist.data.models import model_identity
from plad_dist.data.prompts import heldout_prompts, prepare, train_prompts
from plad_dist.data.schemas import SAMPLES
from plad_dist.fleet.fleet import Assignment
from plad_dist.fleet.placement import Placement, replicas_that_fit
from plad_dist.rundir import RunDir
from plad_dist.sampling import stage
from plad_dist.sampling.engine_arguments import with_executor
from plad_dist.sampling.engine_placement import place, window_for
from tests.tiny import TEMPLATE, make_random_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_random_model(folder / "a", 1)
    make_random_model(folder / "b", 2)
    return folder


def config_of(folder: Path, models: Path, **changes: Any) -> Config:
    rows = [{"prompt": f"prompt {row}", "topic": "code" if row % 3 else "chat"} for row in range(200)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "files", "paths": [str(folder / "prompts.jsonl")], "meta_columns": ["topic"]}
    raw: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "prompts": {"source": source, "block_size": 16, "heldout_fraction": 0.1},
        "teachers": {
            "code": {"path": str(models / "a"), "template": TEMPLATE, "filter": "meta.topic == 'code'"},
            "chat": {"endpoint": {"url": "http://localhost:1/v1", "model": "big"}, "filter": "meta.topic == 'chat'"},
        },
        "student": {"path": str(models / "b"), "template": TEMPLATE},
        "sampling": {"teacher": {"n": 2}, "limit": 100},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = raw[section] | {name: value}
    return parse_config(raw, "test")


def work(config: Config, role: str) -> tuple[RunDir, dict[str, list[Assignment]]]:
    run = RunDir.of(config)
    run.storage.replace("run.yaml", b"")
    prepare(config, run.storage)
    return run, {
        responder.name: assignments for responder, assignments in stage.assignments_of_roles(config, run, [role])
    }


def test_several_teachers_share_each_dataset_block_by_block(tmp_path: Path, models: Path) -> None:
    config = config_of(tmp_path, models)
    run, assigned = work(config, "teacher")
    assert assigned.keys() == {"code", "chat"}
    prompts = train_prompts(run.storage)
    by_output: dict[str, list[tuple[str, Assignment]]] = {}
    for name, assignments in assigned.items():
        for assignment in assignments:
            by_output.setdefault(assignment.job.output, []).append((name, assignment))
    for output, assignments_of_output in by_output.items():
        blocks = sorted(block for _, assignment in assignments_of_output for block in assignment.blocks)
        assert blocks == list(range(len(assignments_of_output[0][1].units))), output
        assert len({assignment.job.fingerprint for _, assignment in assignments_of_output}) == 1
    for name, assignment in by_output["samples/teacher/round-0"]:
        for block in assignment.blocks:
            assert set(prompts.read_block(block)["teacher"].to_pylist()) == {name}
        assert sum(assignment.units) == 2 * 100, "n samples of each prompt up to the limit"
    models_of = {name: assignment.job.model for name, assignment in by_output["samples/teacher/round-0"]}
    assert models_of == {"code": str(models / "a"), "chat": "big"}


@pytest.mark.parametrize("limit", [1, 7, 60, 100, 171])
def test_a_limit_takes_prompts_of_every_teacher_in_proportion(tmp_path: Path, models: Path, limit: int) -> None:
    run, assigned = work(config_of(tmp_path, models, sampling__limit=limit), "teacher")
    counts = {
        name: sum(assignment.units[block] // 2 for block in assignment.blocks)
        for name, assignments in assigned.items()
        for assignment in assignments
        if assignment.job.output == "samples/teacher/round-0"
    }
    prompts = train_prompts(run.storage).read()["teacher"].to_pylist()
    assert sum(counts.values()) == min(limit, len(prompts))
    for name, count in counts.items():
        assert abs(count - limit * prompts.count(name) / len(prompts)) <= 1 or limit >= len(prompts)


def test_the_same_local_model_at_another_path_is_the_same_model(tmp_path: Path, models: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(models / "a", tmp_path / name)
    identities = {model_identity(str(tmp_path / name), Model(path=name)) for name in ("one", "two")}
    assert len(identities) == 1
    hub = [Model(path="owner/name"), Model(path="owner/other"), Model(path="owner/name", revision="v2")]
    assert len({model_identity(str(model.path), model) for model in hub} | identities) == 4


def test_other_weights_under_the_same_name_are_another_model(tmp_path: Path, models: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "a", folder)
    settings = Model(path=str(folder))
    before = model_identity(str(folder), settings)
    assert model_identity(str(folder), settings) == before
    shutil.copy(models / "b" / "model.safetensors", folder)
    after = model_identity(str(folder), settings)
    assert after != before
    (folder / "tokenizer_config.json").write_text("{}")
    assert model_identity(str(folder), settings) not in (before, after)


def test_the_student_samples_all_blocks_whatever_the_teachers_are(tmp_path: Path, models: Path) -> None:
    run, assigned = work(config_of(tmp_path, models), "student")
    (assignments,) = assigned.values()
    assert assignments[0].job.output == run.samples("student").path
    assert list(assignments[0].blocks) == list(range(len(assignments[0].units)))
    assert sum(assignments[0].units) == 100
    heldout = heldout_prompts(run.storage).require("prepare").rows
    assert all(sum(assignment.units) == heldout for assignment in assignments[1:])
    outputs = [assignment.job.output for assignment in assignments]
    assert run.candidates().path not in outputs, "their quality cannot be measured without references"


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"sampling__teacher": {"n": 3}}, True),
        ({"sampling__teacher": {"n": 2, "temperature": 0.5}}, True),
        ({"sampling__teacher": {"n": 2, "engine": {"quantization": "fp8"}}}, True),
        ({"sampling__teacher": {"n": 2, "replicas": 7, "engine": {"max_num_seqs": 8}}}, False),
        ({"sampling__limit": 99}, True),
        ({"sampling__window": 7}, False),
        ({"run__seed": 4}, True),
    ],
)
def test_the_fingerprint_changes_with_everything_that_decides_the_samples(
    tmp_path: Path, models: Path, change: dict[str, Any], differs: bool
) -> None:
    def fingerprint(**changes: Any) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        _, assigned = work(config_of(tmp_path, models, **changes), "teacher")
        return assigned["code"][0].job.fingerprint

    assert (fingerprint() != fingerprint(**change)) == differs


def test_a_dataset_of_samples_has_the_columns_of_samples(tmp_path: Path, models: Path) -> None:
    run, assigned = work(config_of(tmp_path, models), "teacher")
    assert assigned["code"][0].job.dataset(run.storage).schema == SAMPLES


def test_an_engine_stays_on_one_node_unless_it_has_a_pipeline() -> None:
    assert place({"tensor_parallel_size": 8}, 4, has_gpus=True) == Placement(4, gpus=8)
    assert place({"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, 4, has_gpus=True) == Placement(4, bundles=16)
    assert place({"tensor_parallel_size": 1}, 4, has_gpus=False) == Placement(4)
    assert with_executor({"pipeline_parallel_size": 2})["distributed_executor_backend"] == "ray"
    assert with_executor({"tensor_parallel_size": 2}) == {"tensor_parallel_size": 2}


@pytest.mark.parametrize(("concurrency", "block", "window"), [(64, 32, 8), (256, 512, 4), (1024, 512, 8), (10, 1, 40)])
def test_the_window_holds_four_times_the_rows_that_the_engine_processes_at_once(
    concurrency: int, block: int, window: int
) -> None:
    assert window_for(concurrency, block, 4) == window


def test_auto_replicas_are_as_many_as_the_gpus_hold() -> None:
    assert replicas_that_fit(Placement(1, gpus=4), {"GPU": 18}) == 4
    assert replicas_that_fit(Placement(1, bundles=16), {"GPU": 18}) == 1
    assert replicas_that_fit(Placement(1), {"CPU": 64}) == 1
