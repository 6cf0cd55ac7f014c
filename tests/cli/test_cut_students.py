"""A student that cannot be cut is refused by its key, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import in_this_process, write_config
from tests.tiny import make_random_model

_TEMPLATE = "{{ messages[-1].content }} ="


@pytest.mark.parametrize("subcommand", ["run", "validate", "plan"])
@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"from": {"path": "DEPTH-4", "layers": 5}}, "student.from.layers: 5: the model has only 4 layers"),
        ({"from": {"path": "DEPTH-4", "layers": [0, 4]}}, "student.from.layers: 4: the model has the layers 0 to 3"),
        ({"from": {"path": "x", "layers": 2}}, "student.from.layers: expected at least 3, the first two layers and"),
        ({"from": {"path": "x", "layers": [0, 2, 1]}}, "student.from.layers: expected increasing layer numbers"),
        ({"from": {"path": "x", "layers": [0, 0, 1]}}, "student.from.layers: expected increasing layer numbers"),
        ({"from": {"path": "x", "layers": []}}, "student.from.layers: expected increasing layer numbers"),
        ({"from": {"path": "x", "layers": "all"}}, 'student.from.layers: expected a whole number or a list; got "all"'),
        ({"from": {"path": "x"}}, "student.from.layers: missing"),
        ({"from": {"path": "x", "layers": 3}, "path": "x"}, "student: needs exactly one of `path`"),
        ({"from": {"path": "x", "layers": 3}, "revision": "x"}, "student: revision: is that of `path`; set from.rev"),
    ],
)
def test_bad_students_are_refused_and_nothing_is_written(
    tiny: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    subcommand: str,
    student: dict[str, Any],
    message: str,
) -> None:
    folder, raw = tiny
    if student["from"]["path"] == "DEPTH-4":
        path = str(make_random_model(folder / "model", num_hidden_layers=4))
        student = student | {"from": student["from"] | {"path": path}}
    raw["student"] = student | {"template": _TEMPLATE}
    code, _, error = in_this_process(monkeypatch, capsys, subcommand, str(write_config(folder, raw)))
    assert code == 2
    assert message in error
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["student.from.path=./nowhere"], "student.from.path: ./nowhere: no such model folder on this machine"),
        (["training.warmup=null"], "training.warmup: missing; student.from takes layers out of a model"),
        (["teacher.from.path=x"], "teacher.from: unknown key; did you mean `student.from`?"),
    ],
)
def test_bad_values_on_the_command_line_are_refused(
    tiny: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    folder, raw = tiny
    model = make_random_model(folder / "model", num_hidden_layers=4)
    raw["student"] = {"from": {"path": str(model), "layers": 3}, "template": _TEMPLATE}
    config = str(write_config(folder, raw))
    assert in_this_process(monkeypatch, capsys, "validate", config, "student.from.layers=4")[0] == 0
    code, _, error = in_this_process(monkeypatch, capsys, "validate", config, *changes)
    assert code == 2
    assert message in error
