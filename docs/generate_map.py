"""Write the map of source files in docs/design.md: `python docs/generate_map.py [--check]`.

Each file has a line, the first paragraph of its docstring. `--check` writes nothing, and fails if
the map differs.
"""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

from generated_part import write_part

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "design.md"
START, END = "<!-- map: ", "<!-- map ends -->"
FOLDERS = ("plad_dist", "ray_jobs", "benchmarks")


def render() -> str:
    """Return the lines of the map, a table for each package."""
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if _text(file))
    tables = []
    for folder, members in groupby(
        sorted(files, key=lambda file: (file.parent, file.name)), key=lambda file: file.parent
    ):
        rows = [f"| [{file.name}](../{file.relative_to(ROOT)}) | {_text(file)} |" for file in members]
        tables.append(
            "\n".join([f"### {folder.relative_to(ROOT)}/", "", "| file | what it holds |", "| --- | --- |", *rows])
        )
    return "\n\n".join(tables)


def _text(file: Path) -> str:
    """Return the first paragraph of a module's docstring on one line, or an empty text."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    write_part(TARGET, START, END, render())
