"""Control groups from files like the kernel's, and the redirected output of real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from plad_dist.compat.linux import cgroup_limits, oom_kills

GIB = 1 << 30
ROOT = Path(__file__).parents[3]


def test_the_smallest_limit_on_the_path_to_the_root_counts(tmp_path: Path) -> None:
    container = tmp_path / "pod" / "container"
    container.mkdir(parents=True)
    (tmp_path / "pod" / "memory.max").write_text(f"{4 * GIB}\n")
    (container / "memory.max").write_text("max\n")
    (container / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "own").write_text("0::/pod/container\n")
    assert cgroup_limits(tmp_path, tmp_path / "own") == (4 * GIB, 1.5)


def test_without_files_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path / "own") == (float("inf"), float("inf"))


def test_the_kernel_of_this_machine_reports_limits_that_leave_something() -> None:
    memory, cpus = cgroup_limits()
    assert memory > 1 << 20
    assert cpus > 0


def test_the_kills_of_the_kernel_for_lack_of_memory_are_counted(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 3\nnr_oom_kill 9\n")
    assert oom_kills(tmp_path / "vmstat") == 3
    assert oom_kills(tmp_path / "none") == 0
    assert oom_kills() >= 0


def test_the_output_of_a_process_is_read_back_from_the_file_that_it_goes_to(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "from plad_dist.compat.linux import redirected_output\n"
        "subprocess.run([sys.executable, '-c', 'import sys; print(\"x\" * 100 + \"last words\", file=sys.stderr)'])\n"
        "print(redirected_output(2, 11), end='')\n"
    )
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True, check=True, cwd=ROOT
        )
    assert process.stdout == "last words\n"


def test_output_that_goes_to_no_file_cannot_be_read_back() -> None:
    code = "from plad_dist.compat.linux import redirected_output; print(redirected_output(1))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert process.stdout == "None\n"
