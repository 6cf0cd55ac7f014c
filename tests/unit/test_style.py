"""House rules of CONTRIBUTING.md that no linter checks: lengths, docstrings, type names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 60
BEGINNINGS = re.compile(r"(What|Whether|Of|Those|The same|That which)\b")
WORDS = re.compile(r"\b(anew|alike)\b", re.IGNORECASE)

PRODUCT = [
    file for folder in ("plad_dist", "ray_jobs", "benchmarks", "docs") for file in sorted((ROOT / folder).rglob("*.py"))
]
SOURCES = [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py"))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "k8s" / "README.md"]

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(text: str) -> Iterator[Definition]:
    """Yield a module and all classes and functions in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Definition):
            yield node


def docstring_problems(text: str) -> list[str]:
    """Return the docstrings of a source that break the rules, each with its line."""
    problems = []
    for node in definitions(text):
        docstring = (ast.get_docstring(node) or "").strip()
        if BEGINNINGS.match(docstring) or WORDS.search(docstring):
            problems.append(f"line {getattr(node, 'lineno', 1)}: {docstring[:60]!r}")
    return problems


def long_functions(text: str) -> list[str]:
    """Return the functions of a source that are too long."""
    functions = (node for node in definitions(text) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION]


def problems_by_file(files: list[Path], check: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """Return what a check finds, for the files in which it finds anything."""
    problems = {str(file.relative_to(ROOT)): check(file.read_text(encoding="utf-8")) for file in files}
    return {name: lines for name, lines in problems.items() if lines}


def word_problems(text: str) -> list[str]:
    """Return the lines of a page that use words that the house rules exclude."""
    return [f"line {number}: {line}" for number, line in enumerate(text.splitlines(), 1) if WORDS.search(line)]


def length_problems(text: str) -> list[str]:
    """Return the length of a file that is too long."""
    count = len(text.splitlines())
    return [f"{count} lines"] if count > MOST_LINES_OF_A_FILE else []


def test_docstrings_begin_with_a_verb_or_the_thing() -> None:
    assert problems_by_file(SOURCES, docstring_problems) == {}


def test_pages_use_the_words_of_the_field() -> None:
    assert problems_by_file(PAGES, word_problems) == {}


def test_files_are_short() -> None:
    assert problems_by_file(SOURCES, length_problems) == {}


def test_functions_fit_on_a_screen() -> None:
    assert problems_by_file(PRODUCT, long_functions) == {}


def test_no_two_types_share_a_name() -> None:
    places = defaultdict(list)
    for file in PRODUCT:
        for node in definitions(file.read_text(encoding="utf-8")):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize(
    "source",
    [
        '"""What a module holds."""',
        'def run():\n    """Whether it runs."""',
        'class Run:\n    """The same for a run."""',
        'async def run():\n    """Start the run anew."""',
    ],
)
def test_a_docstring_that_breaks_the_rules_is_reported(source: str) -> None:
    assert docstring_problems(source)


def test_a_function_that_does_not_fit_is_reported() -> None:
    body = "".join(f"    x{number} = {number}\n" for number in range(MOST_LINES_OF_A_FUNCTION))
    assert long_functions(f"def run():\n{body}")
