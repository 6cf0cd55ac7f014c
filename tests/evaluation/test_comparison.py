"""Where a comparison may be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plad_dist.errors import UserError
from plad_dist.evaluation.comparison import check_output

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
