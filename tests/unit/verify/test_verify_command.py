"""Exit codes and messages of `plad verify` and `plad status`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist import __version__
from plad_dist.cli import main
from plad_dist.config_file import parse_config
from plad_dist.data.prompts import heldout_prompts, prepare, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.fingerprint import FORMAT
from plad_dist.rundir import RunDir, load_run, open_run
from plad_dist.status import status_table
from tests.conftest import tiny_config, write_prompts
from tests.damaged_runs import (
    alter,
    alter_config,
    damage_manifest,
    part_path,
    problems_of,
    remove,
    truncate,
    write_samples,
)


def test_the_command_exits_with_0_or_1(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(*options: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["plad", "verify", run.storage.url, *options])
        try:
            main()
        except SystemExit as exited:
            return exited.code
        return 0

    assert code() == 0
    assert "nothing is wrong" in capsys.readouterr().out
    alter(run)
    assert code() == 1
    printed = capsys.readouterr()
    assert "samples/teacher/round-0: part-00001.arrow: damaged" in printed.out.replace("\n", " ")
    assert f"`plad verify {run.storage.url} --repair` sets bad parts aside" in printed.err
    assert code("--repair") == 0
    output = capsys.readouterr().out.replace("\n", " ")
    assert "samples/teacher/round-0/part-00001.arrow: moved to samples/teacher/round-0/damaged/" in output
    assert "--repair" not in output, "advice to repair during a repair"
    assert code() == 0, "an incomplete dataset is no damage"
    assert "not complete yet: samples/teacher/round-0 (`plad sample`)" in capsys.readouterr().out


def test_storage_that_does_not_respond_is_no_damage_and_nothing_is_moved(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Storage.read_with_checksum

    def read(self: Storage, key: str) -> Any:
        if key.endswith("teacher/round-0/part-00001.arrow"):
            raise RunFailed(f"{key}: cannot be read: 503 SlowDown")
        return real(self, key)

    monkeypatch.setattr(Storage, "read_with_checksum", read)
    monkeypatch.setattr(sys, "argv", ["plad", "verify", run.storage.url, "--repair"])
    before = part_path(run).read_bytes()
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "could not be checked in full" in capsys.readouterr().err
    assert part_path(run).read_bytes() == before
    assert run.samples("teacher").manifest() is not None


def test_a_problem_that_cannot_be_repaired_is_named_and_nothing_changes(
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
    ("damage", "state"),
    [
        (remove, "1 part missing"),
        (truncate, "1 part of another size"),
        (damage_manifest, "manifest.json cannot be read"),
    ],
)
def test_status_reports_a_dataset_with_a_missing_or_truncated_part_as_damaged(
    run: RunDir, damage: Callable[[RunDir], None], state: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    damage(run)
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
        ("{}\n", "run.yaml: damaged (expected `config` and `fingerprint`"),
        ("run: {dir: elsewhere}\n", "a plain config is not a run directory"),
        (f"format: {FORMAT}\nconfig: {{run: {{}}}}\nfingerprint: f\n", "problems:\n  run.dir: missing"),
    ],
)
def test_a_damaged_run_file_is_named(
    run: RunDir, command: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (run.root / "run.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["plad", command, run.storage.url])
    with pytest.raises(SystemExit) as exited:
        main()
    printed = capsys.readouterr().err
    assert exited.value.code in (1, 2)
    assert message in printed
    assert "run.dir:" not in printed.replace("run.dir: missing", "")
    assert "byte string" not in printed, "the wording of the YAML parser"


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_run_of_an_older_format_is_refused_with_its_format(
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


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_run_file_is_damaged(run: RunDir, share: float) -> None:
    path = run.root / "run.yaml"
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(RunFailed, match="damaged"):
        load_run(run.storage.url)


def test_status_says_who_writes_the_rejected_responses_and_verify_knows_their_rows(
    tmp_path: Path,
) -> None:
    write_prompts(tmp_path, 300)
    raw = tiny_config(tmp_path)
    raw["sampling"]["rejected"] = {"phase": "student-init"}
    raw["rounds"] = {"most": 2, "stop": "never"}
    config = parse_config(raw, "test")
    prepare(config, open_run(config).storage)
    run = RunDir.of(config)
    write_samples(run.samples("student"), train_prompts(run.storage), 1)
    columns = [list(column.cells) for column in status_table(run.storage.url).columns]
    notes = {str(path): str(note) for path, note in zip(columns[0], columns[2], strict=True)}
    assert notes["samples/student/round-0"].endswith("parts, by the student before its training")
    assert notes["eval/round-0/pair-samples/student"] == "by the student before its training"
    assert "samples/student/round-1" not in notes
    assert problems_of(run) == []
    write_samples(run.heldout_samples("student"), heldout_prompts(run.storage), 2)
    assert any("not exactly one sample" in problem for problem in problems_of(run))
