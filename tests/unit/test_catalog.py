"""Every product of a run has one entry in the catalog, with its inputs and deciding keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plad_dist.catalog import DatasetEntry, ModelEntry, Purpose, datasets_of, products_of, stored_rounds
from plad_dist.config import Config
from plad_dist.config.root import schema_fields
from plad_dist.config_file import parse_config
from plad_dist.data.prompts import train_prompts
from plad_dist.data.schemas import INITIAL_LOGPS, PAIRS, PROMPTS, SAMPLES
from plad_dist.recipes import RECIPES, is_decisive, recipes_decided_by, section_of
from plad_dist.rundir import RunDir
from tests.catalog import entries_without_folder, folders_without_entry
from tests.conftest import tiny_config

JUDGES = {
    "reader": {"type": "llm", "model": {"path": "reader"}},
    "teacher": {"type": "teacher_likelihood"},
}
# Datasets that are named by a fingerprint or belong to judges are listed as they are stored.
STORED = (
    "pairs/round-0/initial-logps-0123456789ab",
    "eval/round-0/pairs/initial-logps-0123456789ab",
    "eval/round-0/judges/reader/0123456789abcdef/prompts",
    "eval/round-0/judges/reader/0123456789abcdef/answers",
    "eval/round-1/scored/teacher/warmup",
)


def config_of(folder: Path, **sections: Any) -> Config:
    raw = tiny_config(folder) | {"rounds": {"most": 2, "stop": "never"}} | sections
    raw["evaluation"] = raw["evaluation"] | {"judges": JUDGES}
    return parse_config(raw, "test")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path)


def write_finished_run(config: Config) -> RunDir:
    """Write a file in place of every product that a run of two rounds makes."""
    run = RunDir.of(config)
    for path in STORED:
        write(run, f"{path}/manifest.json")
    for product in products_of(config, run):
        match product:
            case DatasetEntry():
                write(run, f"{product.path}/manifest.json")
            case ModelEntry():
                write(run, f"{product.path}/model.safetensors")
            case _:
                write(run, product.path)
    write(run, "run.yaml")
    write(run, "logs/plad.log")
    write(run, "checkpoints/round-1/step-00000010/state.json")
    return run


def write(run: RunDir, path: str) -> None:
    (run.root / path).parent.mkdir(parents=True, exist_ok=True)
    (run.root / path).touch()


def test_every_folder_of_a_run_has_an_entry_and_every_entry_a_folder(config: Config) -> None:
    run = write_finished_run(config)
    assert folders_without_entry(config, run) == set()
    assert entries_without_folder(config, run) == set()
    assert set(STORED) <= {entry.path for entry in datasets_of(config, run)}
    write(run, "eval/round-0/more/manifest.json")
    write(run, "models/other/model.safetensors")
    assert folders_without_entry(config, run) == {"eval/round-0/more", "models/other"}


def test_paths_are_unique_and_every_input_is_an_entry(config: Config) -> None:
    run = write_finished_run(config)
    products = list(products_of(config, run))
    paths = [product.path for product in products]
    assert len(paths) == len(set(paths))
    for product in products:
        if isinstance(product, DatasetEntry | ModelEntry):
            assert set(product.inputs) <= set(paths), product.path


def test_an_entry_knows_the_prompts_and_the_number_of_rows(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    raw["sampling"]["teacher"]["n"], raw["sampling"]["limit"] = 3, 100
    config = parse_config(raw, "test")
    entries = {entry.path: entry for entry in datasets_of(config, RunDir.of(config))}
    sampled = entries["samples/teacher/round-0"]
    assert (sampled.prompts, sampled.limit, sampled.rows_per_prompt) == (
        train_prompts(RunDir.of(config).storage),
        100,
        3,
    )
    candidates = entries["eval/round-0/scored/candidates/plad"]
    assert (candidates.limit, candidates.rows_per_prompt) == (40, 2)
    assert candidates.is_heldout
    assert not sampled.is_heldout
    assert entries["pairs/round-0"].rows_per_prompt is None


def test_the_purpose_of_a_dataset_decides_its_columns(config: Config) -> None:
    schemas = {Purpose.PROMPTS: PROMPTS, Purpose.QUESTIONS: PROMPTS, Purpose.PAIRS: PAIRS}
    schemas |= {Purpose.INITIAL_LOGPS: INITIAL_LOGPS}
    for entry in datasets_of(config, write_finished_run(config)):
        assert entry.schema == schemas.get(entry.purpose, SAMPLES), entry.path


def test_the_teacher_is_sampled_once_for_all_rounds(config: Config) -> None:
    paths = [entry.path for entry in datasets_of(config, RunDir.of(config)) if entry.responder == "teacher"]
    assert not [path for path in paths if "round-1" in path]


def test_rejected_responses_of_a_model_that_is_not_trained_are_sampled_once_for_all_rounds(tmp_path: Path) -> None:
    for rejected, model in (({"phase": "student-init"}, ("models/student-init",)), ({"path": "weak"}, ())):
        raw = tiny_config(tmp_path)
        config = config_of(tmp_path, sampling=raw["sampling"] | {"rejected": rejected})
        entries = {entry.path: entry for entry in datasets_of(config, RunDir.of(config))}
        for prompts, path in (("prompts", "samples/student"), ("eval/prompts", "eval/round-0/pair-samples/student")):
            [name] = [name for name in entries if name.startswith(path)]
            assert entries[name].inputs == (prompts, *model), "not the student that the warm-up trains"
            assert entries[name].responder == "rejected"
        assert "samples/student/round-0" in entries["pairs/round-1"].inputs


def test_rounds_in_storage_count_even_if_the_config_allows_fewer(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds={"most": 1})
    run = RunDir.of(config)
    assert stored_rounds(config, run) == 1
    write(run, "samples/student/round-2/part-00000.arrow")
    assert stored_rounds(config, run) == 3
    assert "pairs/round-2" in {entry.path for entry in datasets_of(config, run, rounds=3)}


def test_every_key_that_decides_a_product_belongs_to_a_section() -> None:
    sections = {"training", "cluster", "rounds"}  # all keys that decide a product are in their subsections
    keys = [key for key, _ in schema_fields() if is_decisive(key) and key not in sections]
    assert [key for key in keys if section_of(key) is None] == []


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("run.seed", ["prompts"]),
        ("teacher.max_length", ["prompts"]),
        ("training.warmup.epochs", ["warmup"]),
        ("training.dtype", ["teacher", "warmup", "round", "seqkd"]),
        ("training.deepspeed", ["teacher", "warmup", "round", "seqkd"]),
        ("student.from.layers", ["student"]),
        ("sampling.limit", ["teacher samples", "rejected samples", "student samples"]),
        ("sampling.student.temperature", ["rejected samples", "student samples"]),
        ("sampling.rejected.path", ["rejected samples"]),
        ("sampling.rejected.teacher", ["prompts"]),
        ("evaluation.candidates", ["student samples"]),
        ("evaluation.examples", ["evaluation"]),
        ("pairing.combine", ["pairs"]),
        ("training.watch.prompts", ["round"]),
        ("training.seqkd.epochs", ["seqkd"]),
        ("unknown.key", ["prompts"]),
    ],
)
def test_the_most_specific_section_decides(key: str, names: list[str]) -> None:
    assert [recipe.name for recipe in recipes_decided_by(key)] == names


def test_every_trace_is_at_or_above_a_product_of_its_recipe(config: Config) -> None:
    """A trace that no product can leave would never freeze a key."""
    run = write_finished_run(config)
    for recipe in RECIPES:
        paths: list[str] = []
        for product in products_of(config, run):
            if product.recipe == recipe:
                paths += [product.path, f"{product.path}/manifest.json"]
                paths += (
                    (f"checkpoints/{product.name}", f"events/{product.name}") if isinstance(product, ModelEntry) else ()
                )
        for trace in recipe.traces:
            assert any(path == trace or path.startswith(f"{trace}/") for path in paths), trace
