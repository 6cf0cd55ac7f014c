"""A whole run on a file system of a few MB that fills up in every stage, and is then given room."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.conftest import plad, tiny_config, write_config, write_prompts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

# For each step, a file that it commits before its end; None: the disk is full when the step begins.
STEPS = {
    "prepare": None,
    "train teacher, warmup": "checkpoints/teacher/step-*/state.json",
    "sample": "samples/teacher/round-0/part-*.arrow",
    "pair": "pairs/round-0/part-*.arrow",
    "train round-0, seqkd": "checkpoints/round-0/step-*/state.json",
    "evaluate": "eval/round-0/samples/plad/*/part-*.arrow",
    "report": None,
}
DATASETS = ("prompts", "samples/teacher/round-0", "samples/student/round-0", "pairs/round-0")
PHASES = ("teacher", "warmup", "round-0", "seqkd")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Take all remaining space."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"0" * size) == size:
                    pass
            except OSError:
                continue


def run_until(config: Path, run: Path, step: str | None = None, file: str | None = None) -> tuple[int, str]:
    """Run the pipeline on a disk that is full once a step begins, or has written a file.

    Returns:
        The exit code and the log.
    """
    command = [sys.executable, "-c", "from plad_dist.cli import main; main()", "run", str(config), f"run.dir={run}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.rstrip().endswith(f" {step}: begins"):
                while file is not None and process.poll() is None and not any(run.glob(file)):
                    time.sleep(0.005)
                fill(run.parent)
    return process.returncode, "".join(lines)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a dataset without the paths of the models, which differ."""
    tables = [pa.ipc.open_file(part).read_all() for part in sorted(folder.glob("part-*.arrow"))]
    return [{name: row[name] for name in row if name != "model"} for table in tables for row in table.to_pylist()]


def test_a_run_whose_disk_fills_up_in_every_stage_finishes_with_the_same_bytes_once_it_has_room(
    tmp_path: Path, small_disk: Path
) -> None:
    write_prompts(tmp_path)
    raw = tiny_config(tmp_path)
    raw["training"]["max_failures"] = 1  # the default waits longer for room
    config = write_config(tmp_path, raw)
    disturbed, undisturbed = small_disk / "run", tmp_path / "undisturbed"
    for step, file in STEPS.items():
        code, log = run_until(config, disturbed, step, file)
        print(log)
        assert code == 1, step
        message = log.rpartition("plad: failed: ")[2]
        assert re.search(r"/run/\S+: cannot be written: .*No space left on device.* is kept", message), step
        assert "Traceback" not in log, step
        (small_disk / "ballast").unlink()
    for run in (disturbed, undisturbed):
        code, log = run_until(config, run)
        assert code == 0, log
        verified = plad("verify", str(run))
        assert verified.returncode == 0, verified.stdout
    for dataset in DATASETS:
        assert rows_of(disturbed / dataset) == rows_of(undisturbed / dataset), dataset
    for phase in PHASES:
        weights = [run / "models" / phase / "model.safetensors" for run in (disturbed, undisturbed)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), phase
