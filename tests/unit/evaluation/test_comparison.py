"""Comparison of runs: which systems appear, and where the files may be written."""

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
from tests.unit.evaluation.comparisons import compare_shares

COMPARISON = json.dumps({"against": "a", "prompts_of_each": {}, "systems": []})


def test_a_comparison_may_replace_an_earlier_one(tmp_path: Path) -> None:
    check_output(str(tmp_path / "compare.html"))
    (tmp_path / "compare.json").write_text(COMPARISON)
    (tmp_path / "compare.html").write_text("<html>")
    check_output(str(tmp_path / "compare.html"))
    files = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert files == {"compare.json": COMPARISON, "compare.html": "<html>"}, "the check writes nothing"


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("", "expected the name of a page"),
        ("figures.json", "expected the name of a page"),
        ("run/eval/round-0/report.html", "inside the run directory"),
        ("other.html", "other.json exists and is not a comparison"),
        ("page.html", "page.html exists and is not a comparison"),
    ],
)
def test_files_of_another_kind_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    (tmp_path / "other.json").write_text('{"systems": []}')
    (tmp_path / "page.html").write_text("another page")
    with pytest.raises(UserError, match=problem):
        check_output(output)


def test_a_student_whose_responses_equal_those_of_another_system_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy responses may be identical if training has changed little."""
    raw = tiny_config(tmp_path)
    config = parse_config(raw, "test")
    texts = {"teacher": ["a b", "c d"], "warmup": ["a", "d"], "seqkd": ["a", "c d"], "plad": ["a", "d"]}
    metrics = compare_shares({("plad", "sampled"): 0.5})
    runs = {
        name: comparison._ComparedRun(
            name, config, RunDir.at(str(tmp_path / name)), metrics, ["p", "q"], ["a b", "c d"]
        )
        for name in ("one", "two")
    }
    monkeypatch.setattr(comparison, "_open_run", lambda path, name: runs[name])
    monkeypatch.setattr(
        comparison,
        "outputs_of",
        lambda run, system, decoding: [Output(text, 1, finished=True) for text in texts[str(system)]],
    )
    compared = comparison.compare_runs([str(tmp_path / "one"), str(tmp_path / "two")], "greedy")
    assert [row.label for row in compared.systems] == ["teacher", "warmup", "seqkd", "one"]
    assert compared.against == "one"
    assert compared.to_json()["systems"][-1]["win_rate_vs_warmup"]["value"] == 0.5
