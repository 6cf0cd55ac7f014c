"""The Dockerfile installs from the lock files and runs without root.

These tests read it and build no image.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import plad_dist
from tests.k8s.rendered import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
TARGETS = ["cpu", "gpu"]


def stages() -> dict[str, list[str]]:
    """Return the instructions of every stage by name, each on one line, without comments."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    instructions: dict[str, list[str]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.startswith("FROM "):
            name = line.split()[-1]
        if name and line.strip():
            instructions.setdefault(name, []).append(line)
    return instructions


def ancestry(target: str) -> list[str]:
    """Return the instructions of a stage, after those of the stages that it is built on."""
    (first, *instructions) = stages()[target]
    parent = first.split()[1]
    return [*(ancestry(parent) if parent in stages() else []), *instructions]


def test_the_linter_reports_nothing() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.exists():
        pytest.skip("needs hadolint, which the development lock provides for Linux on x86-64")
    result = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_kind_of_machine_has_a_target() -> None:
    assert set(TARGETS) < set(stages())


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_a_user_without_rights(target: str) -> None:
    users = [line for line in ancestry(target) if line.startswith("USER ")]
    assert users[-1] == "USER 1000:1000"
    assert any("useradd --uid 1000 " in line for line in ancestry(target))


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_is_installed_from_its_lock_like_the_makefile(target: str) -> None:
    steps = "\n".join(ancestry(f"build-{target}"))
    assert re.search(rf"COPY requirements/{target}\.txt .*requirements/", steps)
    assert re.search(rf"uv pip sync .*requirements/{target}\.txt", steps)
    assert f"COPY --from=build-{target} /opt/venv /opt/venv" in ancestry(target)
    assert f"COPY requirements/{target}.txt requirements/" in ancestry(target), "what `plad doctor` compares with"
    makefile = (ROOT / "Makefile").read_text()
    assert f"ARG UV_VERSION={re.search(r'UV_VERSION := (.*)', makefile)[1]}" in steps  # type: ignore[index]
    if target == "cpu":
        assert re.search(r"uv pip sync .*--torch-backend cpu .*requirements/cpu-torch\.txt", steps)
        assert "--torch-backend cpu" in makefile
    assert all(
        "--no-cache" in line for line in steps.splitlines() if re.search(r"\buv (pip|venv)\b|\bpip install\b", line)
    )


def test_versions_are_pinned_and_match_the_package() -> None:
    assert f'org.opencontainers.image.version="{plad_dist.__version__}"' in TEXT
    lock = (ROOT / "requirements" / "lock").read_text()
    python = re.search(r"ARG PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-slim-\w+\n", TEXT)
    assert python
    assert f"--python-version {python[1]} " in lock
    bases = set(re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE))
    assert bases - set(stages()) == {"${PYTHON_IMAGE}"}


def test_the_build_fetches_nothing_but_the_locks_and_holds_no_secret() -> None:
    for instructions in stages().values():
        for line in instructions:
            assert not line.startswith("ADD "), line
            assert not re.search(r"\b(curl|wget) +(-|http)", line), line
            assert not re.match(r"(ARG|ENV) .*(TOKEN|SECRET|PASSWORD|_KEY)", line), line


def ignored(path: str) -> bool:
    """Return True if .dockerignore keeps a path out of the build.

    The last pattern that matches decides.
    """
    is_ignored = False
    for pattern in (ROOT / ".dockerignore").read_text().split("\n"):
        bare = pattern.removeprefix("!")
        if pattern and not pattern.startswith("#") and (bare == "*" or path == bare or path.startswith(f"{bare}/")):
            is_ignored = not pattern.startswith("!")
    return is_ignored


def test_everything_that_is_copied_exists_and_reaches_the_build() -> None:
    copies = [
        line for steps in stages().values() for line in steps if line.startswith("COPY ") and "--from" not in line
    ]
    sources = {source for line in copies for source in line.split()[1:-1]}
    assert {"plad_dist", "ray_jobs", "ds_configs", "requirements/cpu.txt", "requirements/gpu.txt"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    assert all(ignored(path) for path in (".git", ".venv", "runs", "tests", "requirements/dev.txt"))


def test_the_files_that_the_packages_build_needs_are_in_the_image() -> None:
    """Hatchling reads the files that `force-include` and the metadata name."""
    project = (ROOT / "pyproject.toml").read_text()
    steps = "\n".join(ancestry("build-gpu"))
    for name in ("README.md", "LICENSE", "ds_configs"):
        assert f'"{name}"' in project
        assert name in steps
