"""What is compared, and where a comparison may be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plad_dist.config_file import parse_config
from plad_dist.errors import UserError
from plad_dist.evaluation import comparison
from plad_dist.evaluation.comparison import check_output
from plad_dist.rundir import RunDir
from plad_dist.text_metrics import Output
from tests.conftest import tiny_config

COMPARISON = json.dumps({"against": "a", "prompts_of_each": {}, "systems": []})


def test_a_comparison_may_be_written_anew(tmp_path: Path) -> None:
    check_output(str(tmp_path / "compare.html"))
    (tmp_path / "compare.json").write_text(COMPARISON)
    (tmp_path / "compare.html").write_text("<html>")
    check_output(str(tmp_path / "compare.html"))
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert kept == {"compare.json": COMPARISON, "compare.html": "<html>"}, "to ask is not to write"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "expected the name of a page"),
        ("figures.json", "expected the name of a page"),
        ("run/eval/round-0/report.html", "lies in the run directory"),
        ("other.html", "other.json is there and is no comparison"),
        ("page.html", "page.html is there and is no comparison"),
    ],
)
def test_files_of_other_kinds_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    (tmp_path / "other.json").write_text('{"systems": []}')
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match=said):
        check_output(output)


def test_a_student_that_says_what_another_system_does_is_compared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As greedy decoding may have it, where training has changed little."""
    raw = tiny_config(tmp_path)
    config = parse_config(raw, "test")
    said = {"teacher": ["a b", "c d"], "warmup": ["a", "d"], "seqkd": ["a", "c d"], "plad": ["a", "d"]}
    metrics = {"main_decoding": "sampled"}
    runs = {
        name: comparison._Run(name, config, RunDir.at(str(tmp_path / name)), metrics, ["p", "q"], ["a b", "c d"])
        for name in ("one", "two")
    }
    monkeypatch.setattr(comparison, "_opened", lambda path, name: runs[name])
    monkeypatch.setattr(
        comparison,
        "outputs_of",
        lambda run, system, decoding: [Output(text, 1, finished=True) for text in said[system]],
    )
    compared = comparison.compare_runs([str(tmp_path / "one"), str(tmp_path / "two")], "greedy")
    assert [row["label"] for row in compared["systems"]] == ["teacher", "warmup", "seqkd", "one"]
    assert compared["against"] == "one"
    assert compared["systems"][-1]["win_rate_vs_warmup"]["value"] == 0.5
