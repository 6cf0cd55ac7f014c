"""Two rounds with a teacher as judge, on real engines. A finished run redoes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tests.conftest import plad, tiny_config, write_config, write_prompts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("part-*.arrow")))


def modification_times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("part-*.arrow")}


def test_another_round_starts_from_the_previous_student_and_reuses_the_teachers_samples(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    raw, root = tiny_config(tmp_path), tmp_path / "run"
    raw["evaluation"]["judges"] = {"teacher": {"type": "teacher_likelihood"}}
    config = write_config(tmp_path, raw)
    completed = plad("run", str(config), timeout=1200)
    assert completed.returncode == 0, completed.stderr[-4000:]
    metrics = json.loads((root / "eval/round-0/metrics.json").read_text())
    by_teacher = {row["b"]: row for row in metrics["judges"]["teacher"]["comparisons"]}
    assert set(by_teacher) == {"warmup", "seqkd", "teacher"}
    assert all(row["prompts"] == metrics["prompts"] for row in by_teacher.values())
    before = modification_times(root)
    completed = plad("run", str(config), "rounds.most=2", "rounds.stop=never", timeout=1200)
    assert completed.returncode == 0, completed.stderr[-4000:]
    assert {path: time for path, time in modification_times(root).items() if path in before} == before
    assert not (root / "samples/teacher/round-1").exists()
    assert set(read(root / "samples/student/round-1")["round"].to_pylist()) == {1}
    assert set(read(root / "samples/student/round-1")["model"].to_pylist()) == {str(root / "models/round-0")}
    assert set(read(root / "pairs/round-1")["round"].to_pylist()) == {1}
    metrics = json.loads((root / "eval/round-1/metrics.json").read_text())
    assert {row["system"] for row in metrics["systems"]} == {"teacher", "warmup", "seqkd", "round-0", "plad"}
    systems = set(metrics["calibration"]["systems"])
    assert (metrics["previous"], systems) == ("round-0", {"warmup", "seqkd", "round-0", "plad"})
    assert "This round" in " ".join(metrics["verdict"])
    assert str(root / "eval/round-1/report.html") in completed.stdout
    compared = plad("compare", str(root), "--json")
    assert {row["label"] for row in json.loads(compared.stdout)["systems"]} >= {"run", "teacher", "warmup", "seqkd"}
    verified = plad("verify", str(root))
    assert verified.returncode == 0, verified.stdout + verified.stderr
