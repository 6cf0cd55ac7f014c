"""Functions of a Python file with the first sentence of their docstrings; nothing is imported or run."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plad_dist.harvest.descriptions import describe, function_name

INDENTED_DOCSTRING = re.compile(rb'^[ \t]+[rRuU]?"""', re.MULTILINE)


MAX_FILE_BYTES = 1_000_000


Pair = tuple[str, str]  # description, name


def read_files(paths: list[Path]) -> tuple[list[Pair], int]:
    """(pairs of description and name in the files, files that could not be read)."""
    pairs: list[Pair] = []
    skipped = 0
    for path in paths:
        try:
            pairs += _read_file(path)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            skipped += 1
    return pairs, skipped


def _read_file(path: Path) -> list[Pair]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError("too large")
    code = path.read_bytes()
    if b"def " not in code or not INDENTED_DOCSTRING.search(code):
        return []
    pairs = []
    for function in _functions(ast.parse(code)):
        name = function_name(function.name)
        description = describe(ast.get_docstring(function, clean=False) or "") if name else None
        if name and description and description.replace(" ", "") != name.replace(" ", ""):
            pairs.append((description, name))
    return pairs


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, in the order of the text."""
    statements: list[ast.AST] = [tree]
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        for part in ("finalbody", "orelse", "cases", "handlers", "body"):
            statements.extend(reversed(getattr(statement, part, [])))


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """One function: what it does, and what its author called it."""

    description: str  # lower-cased words
    name: str  # lower-cased words
    package: str  # top-level package


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
