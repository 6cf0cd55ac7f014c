"""`plad verify` names missing, surplus, truncated and altered parts, and passes a sound run."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plad_dist.data.models import weights_problems
from plad_dist.data.parts import part_name
from plad_dist.data.prompts import train_prompts
from plad_dist.data.schemas import PAIRS
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import RunDir
from plad_dist.verify.parts import check_dataset
from plad_dist.verify.repair import repair
from plad_dist.verify.run import verify
from tests.damaged_runs import (
    add,
    alter,
    alter_a_journaled_part,
    alter_config,
    cut_figures,
    damage_manifest,
    damage_prompts,
    figures_without_responses,
    lose_a_row,
    no_figures,
    other_columns,
    problems_of,
    remove,
    remove_manifest,
    sample_of_another_model,
    sample_twice,
    samples_of,
    too_few_blocks,
    too_many_blocks,
    truncate,
    write_samples,
)
from tests.unit.data.test_checksums import flips


def test_a_sound_run_passes_and_every_dataset_is_listed(run: RunDir) -> None:
    results, other_problems = verify(run.storage.url)
    assert other_problems == []
    assert {item.path: item.state for item in results} == {
        "prompts": "complete",
        "eval/prompts": "complete",
        "samples/teacher/round-0": "complete",
        "eval/round-0/pair-samples/teacher": "complete",
    }
    assert all(item.problems == [] for item in results)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "samples/teacher/round-0: part-00001.arrow: missing"),
        (truncate, "part-00001.arrow: damaged: it has"),
        (alter, "part-00001.arrow: damaged: its checksum"),
        (add, "part-00099.arrow: surplus"),
        (damage_manifest, "manifest.json: damaged: Expecting property name"),
        (remove_manifest, "prompts/manifest.json: missing, though samples/teacher/round-0 was made from it"),
        (alter_config, "run.yaml: its fingerprint is not that of its config"),
        (sample_of_another_model, "part-00001.arrow: made by another config or from other inputs"),
        (sample_twice, "occurs twice"),
        (lose_a_row, "is missing"),
        (damage_prompts, "prompts: part-00000.arrow: damaged: it has"),
        (damage_prompts, "samples/teacher/round-0: part-00001.arrow: damaged"),
        (too_many_blocks, "6 parts, where 5 blocks of prompts were to be sampled"),
        (too_few_blocks, "2 parts, where 5 blocks of prompts were to be sampled"),
        (alter_a_journaled_part, "part-00001.arrow: damaged: its checksum"),
        (
            cut_figures,
            "eval/round-0/metrics.json: not valid JSON, or no figures. Delete it and run `plad evaluate` again",
        ),
        (no_figures, "eval/round-0/metrics.json: not valid JSON, or no figures"),
        (
            figures_without_responses,
            "eval/round-0/samples/plad/greedy: missing, though eval/round-0/metrics.json was made from it",
        ),
        (figures_without_responses, "models/round-0: missing, though eval/round-0/metrics.json was made from it"),
        (other_columns, "its columns are not those of samples/teacher/round-0: prompt_id"),
    ],
)
def test_every_kind_of_damage_is_named(run: RunDir, damage: Callable[[RunDir], None], message: str) -> None:
    damage(run)
    messages = problems_of(run)
    assert any(message in problem for problem in messages), messages


def test_an_interrupted_stage_is_no_damage(run: RunDir) -> None:
    dataset = run.samples("student")
    dataset.commit(0, samples_of(train_prompts(run.storage), 0, 1), fingerprint="g", attempt="a")
    results, other_problems = verify(run.storage.url)
    assert other_problems == []
    states = {item.path: (item.state, item.problems) for item in results}
    assert states["samples/student/round-0"] == ("incomplete", [])


def test_no_flipped_bit_of_a_part_causes_a_traceback(run: RunDir) -> None:
    """Without a manifest, no checksum is available: a part is either readable or reported."""
    dataset = run.samples("student")
    dataset.commit(0, samples_of(train_prompts(run.storage), 0, 1).slice(0, 2), fingerprint="g", attempt="a")
    path = run.root / dataset.path / part_name(0)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 128]) + whole[at + 1 :])
        result = check_dataset(dataset)
        assert result.problems or (result.parts, result.rows) == (1, 2), "a part is either readable or reported"


def test_the_parts_of_a_damaged_manifest_are_checked_too(run: RunDir) -> None:
    damage_manifest(run)
    truncate(run)
    messages = problems_of(run)
    assert any("the checksums of the parts are lost with it" in problem for problem in messages)
    assert any("part-00001.arrow: damaged: not a readable Arrow file" in problem for problem in messages)


@pytest.mark.parametrize("text", ["null", "[]", "3", '{"fingerprint": "f", "facts": {}, "parts": [{"name": 1}]}'])
def test_a_manifest_of_another_shape_is_damage_and_causes_no_traceback(run: RunDir, text: str) -> None:
    (run.root / "samples/teacher/round-0/manifest.json").write_text(text)
    assert any("manifest.json: damaged" in problem for problem in problems_of(run))


def test_an_input_that_is_being_rebuilt_is_no_problem_of_its_outputs(run: RunDir) -> None:
    write_samples(run.samples("student"), train_prompts(run.storage), 1)
    pairs = run.pairs()
    pairs.commit(0, PAIRS.empty_table(), fingerprint="p", attempt="a")
    pairs.finish(1, fingerprint="p", facts={})
    assert problems_of(run) == []
    alter(run)
    repair(run.storage.url, verify(run.storage.url)[0])
    assert problems_of(run) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "has no *.safetensors weights"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "model.safetensors: has "),
        (lambda file: file.write_bytes(b"\0" * 5), "model.safetensors: not a safetensors file"),
        (lambda file: (file.parent / "config.json").write_text("{"), "config.json: damaged"),
        (lambda file: (file.parent / "tokenizer_config.json").unlink(), "tokenizer_config.json: missing"),
    ],
)
def test_damaged_weights_of_a_model_are_found_without_reading_them(
    run: RunDir, damage: Callable[[Path], None], message: str
) -> None:
    folder = run.root / "models/warmup"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(3, 5)}, folder / "model.safetensors")
    (folder / "plad.json").write_text('{"fingerprint": "f", "facts": {}}')
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    assert problems_of(run) == []
    damage(folder / "model.safetensors")
    (problem,) = problems_of(run)
    assert problem.startswith("models/warmup: ")
    assert message in problem


def test_a_missing_shard_of_an_index_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "model-00003-of-00003.safetensors")
    (tmp_path / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "nowhere")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_problems(tmp_path) == [
        "model-00001-of-00002.safetensors: missing",
        "model-00002-of-00002.safetensors: missing",
    ]


def test_every_flipped_bit_of_run_yaml_is_found(run: RunDir) -> None:
    path = run.root / "run.yaml"
    for altered in islice(flips(path.read_bytes(), samples=0), 0, None, 60):
        path.write_bytes(altered)
        assert found(run), altered


def found(run: RunDir) -> list[str] | str:
    """Return the problems that a verification finds, or the message with which it ends."""
    try:
        return problems_of(run)
    except (RunFailed, UserError) as error:
        return str(error)
