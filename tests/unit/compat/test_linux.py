"""Limits of control groups, read from files laid out like the kernel's."""

from __future__ import annotations

from pathlib import Path

from plad_dist.compat.linux import cgroup_limits

GIB = 1 << 30


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
