"""Write the map of source files in docs/design.md: `python docs/generate_map.py [--check]`.

Each file has a line, the first paragraph of its docstring. `--check` writes nothing, and fails if
the map differs.
"""

from __future__ import annotations

import ast
import sys
from itertools import groupby
from pathlib import Path

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


def main() -> None:
    """Write the map into the page, or compare it."""
    page = TARGET.read_text(encoding="utf-8")
    before, start, rest = page.partition(START)
    comment, newline, rest = rest.partition("\n")
    _, end, after = rest.partition(END)
    if not (start and end):
        sys.exit(f"{TARGET}: has no lines {START!r} and {END!r} around the map")
    wanted = f"{before}{start}{comment}{newline}\n{render()}\n\n{end}{after}"
    if "--check" in sys.argv[1:]:
        if wanted != page:
            sys.exit(f"{TARGET}: the map differs from the modules' docstrings; run `python docs/generate_map.py`")
        return
    TARGET.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
