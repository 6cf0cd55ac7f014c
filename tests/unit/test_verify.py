"""`plad verify`: whatever is missing, surplus, truncated or altered is named; a sound run passes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import save_file

from plad_dist import __version__
from plad_dist.cli import main
from plad_dist.config_file import parse_config
from plad_dist.data.models import weights_problems
from plad_dist.data.prompts import heldout_prompts, prepare, train_prompts
from plad_dist.data.schemas import PAIRS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, part_name
from plad_dist.errors import RunFailed
from plad_dist.fingerprint import FORMAT
from plad_dist.rundir import RunDir, open_run
from plad_dist.verify.parts import check_dataset
from plad_dist.verify.repair import repair
from plad_dist.verify.run import verify
from tests.conftest import tiny_config, write_prompts


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose prompts and teacher samples are complete, two a prompt."""
    write_prompts(tmp_path, 300)
    raw = tiny_config(tmp_path)
    raw["sampling"]["teacher"]["n"] = 2
    config = parse_config(raw, "test")
    run = open_run(config)
    prepare(config, run.storage)
    sample(run.samples("teacher"), train_prompts(run.storage), 2)
    sample(run.heldout_samples("teacher"), heldout_prompts(run.storage), 1)
    return run


def sample(output: Dataset, prompts: Dataset, n: int, fingerprint: str = "f") -> None:
    blocks = len(prompts.require("prepare").parts)
    for block in range(blocks):
        output.commit(block, samples_of(prompts, block, n), fingerprint=fingerprint, attempt="a")
    output.finish(blocks, fingerprint=fingerprint, facts={})


def samples_of(prompts: Dataset, block: int, n: int) -> pa.Table:
    rows = [
        {"prompt_id": prompt, "sample_index": index, "role": "teacher", "text": "x", "token_ids": [1], "logprob": -1.0,
         "num_tokens": 1, "finish_reason": "stop", "error": None, "model": "m", "round": 0}
        for prompt in prompts.read_block(block)["prompt_id"].to_pylist()
        for index in range(n)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def problems(run: RunDir) -> list[str]:
    checked, others = verify(run.storage.url)
    return [f"{item.path}: {problem}" for item in checked for problem in item.problems] + others


def part(run: RunDir, block: int = 1) -> Path:
    return run.root / "samples/teacher/round-0" / part_name(block)


def test_a_sound_run_passes_and_shows_what_was_checked(run: RunDir) -> None:
    checked, others = verify(run.storage.url)
    assert others == []
    assert {item.path: item.state for item in checked} == {
        "prompts": "complete",
        "eval/prompts": "complete",
        "samples/teacher/round-0": "complete",
        "eval/round-0/pair-samples/teacher": "complete",
    }
    assert all(item.problems == [] for item in checked)


def remove(run: RunDir) -> None:
    part(run).unlink()


def truncate(run: RunDir) -> None:
    path = part(run)
    path.write_bytes(path.read_bytes()[:-100])


def alter(run: RunDir) -> None:
    data = bytearray(part(run).read_bytes())
    data[len(data) // 2] ^= 1
    part(run).write_bytes(data)


def add(run: RunDir) -> None:
    part(run, 99).write_bytes(part(run).read_bytes())


def damage_manifest(run: RunDir) -> None:
    (run.root / "samples/teacher/round-0/manifest.json").write_text("{")


def remove_manifest(run: RunDir) -> None:
    (run.root / "prompts/manifest.json").unlink()


def alter_config(run: RunDir) -> None:
    path = run.root / "run.yaml"
    path.write_text(path.read_text().replace("seed: 5", "seed: 6"))


def sample_of_another_model(run: RunDir) -> None:
    rewrite(run, "other", samples_of(train_prompts(run.storage), 1, 2))


def sample_twice(run: RunDir) -> None:
    table = samples_of(train_prompts(run.storage), 1, 2)
    rewrite(run, "f", pa.concat_tables([table.slice(0, 2), table.slice(0, 2), table.slice(4)]))


def lose_a_row(run: RunDir) -> None:
    rewrite(run, "f", samples_of(train_prompts(run.storage), 1, 2).slice(2))


def other_columns(run: RunDir) -> None:
    dataset = run.samples("teacher")
    part(run).unlink()
    narrow = Dataset(run.storage, dataset.path, pa.schema([SAMPLES.field("prompt_id")]))
    narrow.commit(1, samples_of(train_prompts(run.storage), 1, 2).select(["prompt_id"]), fingerprint="f", attempt="b")
    narrow.finish(len(train_prompts(run.storage).require("prepare").parts), fingerprint="f", facts={})


def damage_prompts(run: RunDir) -> None:
    path = run.root / "prompts" / part_name(0)
    path.write_bytes(path.read_bytes()[:-50])
    alter(run)


def too_many_blocks(run: RunDir) -> None:
    dataset = run.samples("teacher")
    blocks = len(dataset.require("sample").parts)
    table = samples_of(train_prompts(run.storage), 0, 2)
    dataset.commit(blocks, table, fingerprint="f", attempt="b")
    dataset.finish(blocks + 1, fingerprint="f", facts={})


def too_few_blocks(run: RunDir) -> None:
    for block in range(2, len(run.samples("teacher").require("sample").parts)):
        part(run, block).unlink()
    run.samples("teacher").finish(2, fingerprint="f", facts={})


def alter_what_only_a_journal_knows(run: RunDir) -> None:
    dataset = run.samples("teacher")
    manifest = dataset.require("sample")
    dataset.rewrite_journal("f", manifest.parts)
    (run.root / dataset.path / "manifest.json").unlink()
    alter(run)


def cut_figures(run: RunDir) -> None:
    run.storage.replace(run.metrics, b'{"systems": [')


def no_figures(run: RunDir) -> None:
    run.storage.replace(run.metrics, b"[]")


def figures_of_what_is_gone(run: RunDir) -> None:
    figures = {"main_decoding": "greedy", "judges": {}, "verdict": [], "settings": ""}
    rows = [{"system": "plad", "decoding": "greedy"}]
    run.storage.replace(run.metrics, json.dumps(figures | {"systems": rows}).encode())


def rewrite(run: RunDir, fingerprint: str, table: pa.Table) -> None:
    """Another part and a manifest that agrees with it."""
    dataset = run.samples("teacher")
    (run.root / dataset.path / "manifest.json").unlink()
    part(run).unlink()
    dataset.commit(1, table, fingerprint=fingerprint, attempt="b")
    blocks = len(train_prompts(run.storage).require("prepare").parts)
    known = dataset.committed_parts()
    dataset.finish(blocks, fingerprint="f", facts={}, known=known.values())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove, "samples/teacher/round-0: part-00001.arrow: missing"),
        (truncate, "part-00001.arrow: damaged: it has"),
        (alter, "part-00001.arrow: damaged: its checksum"),
        (add, "part-00099.arrow: surplus"),
        (damage_manifest, "manifest.json: damaged: Expecting property name"),
        (remove_manifest, "prompts/manifest.json: missing, though samples/teacher/round-0 was made from it"),
        (alter_config, "run.yaml: its fingerprint is not that of its config"),
        (sample_of_another_model, "part-00001.arrow: made by another config or of other inputs"),
        (sample_twice, "occurs twice"),
        (lose_a_row, "is missing"),
        (damage_prompts, "prompts: part-00000.arrow: damaged: it has"),
        (damage_prompts, "samples/teacher/round-0: part-00001.arrow: damaged"),
        (too_many_blocks, "6 parts, where 5 blocks of prompts were to be sampled"),
        (too_few_blocks, "2 parts, where 5 blocks of prompts were to be sampled"),
        (alter_what_only_a_journal_knows, "part-00001.arrow: damaged: its checksum"),
        (
            cut_figures,
            "eval/round-0/metrics.json: not valid JSON, or no figures. Delete it and run `plad evaluate` again",
        ),
        (no_figures, "eval/round-0/metrics.json: not valid JSON, or no figures"),
        (
            figures_of_what_is_gone,
            "eval/round-0/samples/plad/greedy: missing, though eval/round-0/metrics.json was made from it",
        ),
        (figures_of_what_is_gone, "models/round-0: missing, though eval/round-0/metrics.json was made from it"),
        (other_columns, "its columns are not those of samples/teacher/round-0: prompt_id"),
    ],
)
def test_what_is_wrong_is_named(run: RunDir, harm: Callable[[RunDir], None], message: str) -> None:
    harm(run)
    found = problems(run)
    assert any(message in problem for problem in found), found


def test_an_interrupted_stage_is_no_damage(run: RunDir) -> None:
    dataset = run.samples("student")
    dataset.commit(0, samples_of(train_prompts(run.storage), 0, 1), fingerprint="g", attempt="a")
    checked, others = verify(run.storage.url)
    assert others == []
    states = {item.path: (item.state, item.problems) for item in checked}
    assert states["samples/student/round-0"] == ("incomplete", [])


def test_no_flipped_bit_of_a_part_is_a_traceback(run: RunDir) -> None:
    """Also where no manifest knows a checksum: what can be read is read, and the rest is named."""
    dataset = run.samples("student")
    dataset.commit(0, samples_of(train_prompts(run.storage), 0, 1).slice(0, 2), fingerprint="g", attempt="a")
    path = run.root / dataset.path / part_name(0)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 128]) + whole[at + 1 :])
        found = check_dataset(dataset)
        assert found.problems or (found.parts, found.rows) == (1, 2), "a part is read, or named"


@pytest.mark.parametrize("harm", [remove, truncate, alter, add, damage_manifest, too_few_blocks, sample_twice])
def test_repair_takes_out_what_is_bad_and_nothing_else(run: RunDir, harm: Callable[[RunDir], None]) -> None:
    dataset = run.samples("teacher")
    before = {item.name: item for item in dataset.require("sample").parts}
    harm(run)
    checked, _ = verify(run.storage.url)
    bad = {name for item in checked for name in item.bad if name.startswith("part")}
    said = repair(run.storage.url, checked)
    assert said
    assert all(line.startswith("samples/teacher/round-0/") for line in said)
    aside = run.root / dataset.path / "damaged"
    assert harm is remove or any(aside.iterdir()), "bad parts are kept aside"
    assert dataset.manifest() is None
    kept = dataset.committed()
    assert not {part_name(block) for block in kept} & bad
    if harm not in (damage_manifest, sample_twice):
        assert all(item == before[item.name] for item in kept.values() if item), "sound parts keep their checksums"
        assert all(item is not None for item in kept.values())
    prompts = train_prompts(run.storage)
    blocks = range(len(prompts.require("prepare").parts))
    for block in blocks:
        if block not in kept:
            dataset.commit(block, samples_of(prompts, block, 2), fingerprint="f", attempt="again")
    dataset.finish(len(blocks), fingerprint="f", facts={}, known=[item for item in kept.values() if item])
    assert problems(run) == []


def test_repair_of_one_part_does_not_hide_the_damage_of_another(run: RunDir) -> None:
    checked, _ = verify(run.storage.url)
    alter(run)
    checked, _ = verify(run.storage.url)
    path = part(run, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)  # after the check
    repair(run.storage.url, checked)
    dataset, prompts = run.samples("teacher"), train_prompts(run.storage)
    dataset.commit(1, samples_of(prompts, 1, 2), fingerprint="f", attempt="again")
    known = [item for item in dataset.committed().values() if item]
    dataset.finish(5, fingerprint="f", facts={}, known=known)
    assert any("part-00002.arrow: damaged: its checksum" in problem for problem in problems(run))


def test_the_command_exits_with_0_or_1(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(*options: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["plad", "verify", run.storage.url, *options])
        try:
            main()
        except SystemExit as left:
            return left.code
        return 0

    assert code() == 0
    assert "nothing is wrong" in capsys.readouterr().out
    alter(run)
    assert code() == 1
    printed = capsys.readouterr()
    assert "samples/teacher/round-0: part-00001.arrow: damaged" in printed.out.replace("\n", " ")
    assert f"`plad verify {run.storage.url} --repair` sets bad parts aside" in printed.err
    assert code("--repair") == 0
    said = capsys.readouterr().out
    assert "samples/teacher/round-0/part-00001.arrow: moved to samples/teacher/round-0/damaged/" in said.replace(
        "\n", " "
    )
    assert "--repair" not in said, "advice to do what is being done"
    assert code() == 0, "an incomplete dataset is no damage"
    assert "not complete yet: samples/teacher/round-0 (`plad sample`)" in capsys.readouterr().out


def test_storage_that_does_not_answer_is_no_damage_and_nothing_is_moved(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Storage.view

    def view(self: Storage, key: str) -> Any:
        if key.endswith("teacher/round-0/part-00001.arrow"):
            raise RunFailed(f"{key}: cannot be read: 503 SlowDown")
        return real(self, key)

    monkeypatch.setattr(Storage, "view", view)
    monkeypatch.setattr(sys, "argv", ["plad", "verify", run.storage.url, "--repair"])
    before = part(run).read_bytes()
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "could not be checked in full" in capsys.readouterr().err
    assert part(run).read_bytes() == before
    assert run.samples("teacher").manifest() is not None


def test_what_is_committed_between_the_check_and_the_repair_is_not_moved(run: RunDir) -> None:
    data = part(run).read_bytes()
    part(run).unlink()
    checked, _ = verify(run.storage.url)
    part(run).write_bytes(data)
    assert repair(run.storage.url, checked) == []
    assert part(run).read_bytes() == data
    assert run.samples("teacher").manifest() is not None


def test_the_parts_of_a_damaged_manifest_are_checked_too(run: RunDir) -> None:
    damage_manifest(run)
    truncate(run)
    found = problems(run)
    assert any("The checksums of the parts are lost with it" in problem for problem in found)
    assert any("part-00001.arrow: damaged: not a readable Arrow file" in problem for problem in found)


@pytest.mark.parametrize("text", ["null", "[]", "3", '{"fingerprint": "f", "facts": {}, "parts": [{"name": 1}]}'])
def test_a_manifest_of_another_shape_is_damage_and_no_traceback(run: RunDir, text: str) -> None:
    (run.root / "samples/teacher/round-0/manifest.json").write_text(text)
    assert any("manifest.json: damaged" in problem for problem in problems(run))


def test_a_dataset_whose_only_part_was_set_aside_is_to_be_made_anew_and_its_figures_go(run: RunDir) -> None:
    dataset = run.heldout_samples("teacher")
    for key in ("eval/round-0/metrics.json", "eval/round-0/report.html"):
        run.storage.replace(key, b"{}")
    (path,) = (run.root / dataset.path).glob("part-*.arrow")
    path.write_bytes(path.read_bytes()[:-9])
    repair(run.storage.url, verify(run.storage.url)[0])
    states = {item.path: item.state for item in verify(run.storage.url)[0]}
    assert states[dataset.path] == "incomplete"
    assert not run.storage.holds("eval/round-0/metrics.json")
    assert not run.storage.holds("eval/round-0/report.html")


def test_damage_of_the_same_part_twice_keeps_both(run: RunDir) -> None:
    dataset, prompts = run.samples("teacher"), train_prompts(run.storage)
    for attempt in ("a", "b"):
        truncate(run)
        repair(run.storage.url, verify(run.storage.url)[0])
        dataset.commit(1, samples_of(prompts, 1, 2), fingerprint="f", attempt=attempt)
        dataset.finish(5, fingerprint="f", facts={}, known=[item for item in dataset.committed().values() if item])
    assert len(list((run.root / dataset.path / "damaged").glob("part-00001.arrow.*"))) == 2


def test_a_source_that_is_made_anew_is_no_problem_of_what_was_made_from_it(run: RunDir) -> None:
    for role in ("student",):
        sample(run.samples(role), train_prompts(run.storage), 1)
    pairs = run.pairs()
    pairs.commit(0, PAIRS.empty_table(), fingerprint="p", attempt="a")
    pairs.finish(1, fingerprint="p", facts={})
    assert problems(run) == []
    alter(run)
    repair(run.storage.url, verify(run.storage.url)[0])
    assert problems(run) == []


def test_what_cannot_be_repaired_is_left_and_said(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alter(run)
    alter_config(run)
    monkeypatch.setattr(sys, "argv", ["plad", "verify", run.storage.url, "--repair"])
    with pytest.raises(SystemExit, match="1"):
        main()
    printed = capsys.readouterr()
    assert "cannot be repaired here" in printed.err
    assert "run.yaml" in printed.err
    assert "part-00001.arrow" in printed.out


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "has no *.safetensors weights"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "model.safetensors: has "),
        (lambda file: file.write_bytes(b"\0" * 5), "model.safetensors: not a safetensors file"),
        (lambda file: (file.parent / "config.json").write_text("{"), "config.json: damaged"),
        (lambda file: (file.parent / "tokenizer_config.json").unlink(), "tokenizer_config.json: missing"),
    ],
)
def test_damaged_weights_of_a_model_are_found_without_reading_them(
    run: RunDir, harm: Callable[[Path], None], message: str
) -> None:
    folder = run.root / "models/warmup"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(3, 5)}, folder / "model.safetensors")
    (folder / "plad.json").write_text('{"fingerprint": "f", "facts": {}}')
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    assert problems(run) == []
    harm(folder / "model.safetensors")
    (found,) = problems(run)
    assert found.startswith("models/warmup: ")
    assert message in found


def test_a_shard_that_the_index_lists_is_missed(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "model-00003-of-00003.safetensors")
    (tmp_path / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "nowhere")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_problems(tmp_path) == [
        "model-00001-of-00002.safetensors: missing",
        "model-00002-of-00002.safetensors: missing",
    ]


@pytest.mark.parametrize(
    ("harm", "state"),
    [
        (remove, "1 part missing"),
        (truncate, "1 part of another size"),
        (damage_manifest, "manifest.json cannot be read"),
    ],
)
def test_status_does_not_call_a_dataset_complete_where_a_part_is_missing_or_cut(
    run: RunDir, harm: Callable[[RunDir], None], state: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    harm(run)
    monkeypatch.setattr(sys, "argv", ["plad", "status", run.storage.url])
    with pytest.raises(SystemExit, match="0"):
        main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "samples/teacher/round-0" in line]
    assert "damaged" in line
    assert state in line


@pytest.mark.parametrize("command", ["status", "verify"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: [", "run.yaml: damaged (line 1"),
        ("- 3\n", "run.yaml: damaged (expected `config` and `fingerprint`"),
        ("config: {run: {}}\nfingerprint: f\n", "run.yaml"),
    ],
)
def test_a_damaged_run_file_is_named(
    run: RunDir, command: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (run.root / "run.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["plad", command, run.storage.url])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr().err
    assert left.value.code in (1, 2)
    assert message in printed
    assert "run.dir:" not in printed.replace("run.dir: missing", "")
    assert "byte string" not in printed, "a parser's own words"


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_run_of_an_older_format_is_refused_by_its_name(
    run: RunDir, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.root / "run.yaml"
    document = yaml.safe_load(path.read_text())
    assert document.pop("format") == FORMAT
    path.write_text(yaml.safe_dump(document))
    monkeypatch.setattr(sys, "argv", ["plad", command, run.storage.url])
    with pytest.raises(SystemExit, match="2"):
        main()
    message = capsys.readouterr().err
    assert f"run.yaml: the run has format 1, plad-dist {__version__} reads format {FORMAT}" in message
    assert "use another run.dir" in message
