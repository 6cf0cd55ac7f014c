"""Checks of the documentation against the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_configuration_reference_is_current() -> None:
    check = [sys.executable, str(ROOT / "docs" / "generate_configuration.py"), "--check"]
    process = subprocess.run(check, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_the_map_of_the_files_is_current() -> None:
    check = [sys.executable, str(ROOT / "docs" / "generate_map.py"), "--check"]
    process = subprocess.run(check, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_inside_the_documentation_have_targets(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page}: {target}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text())) <= targets
