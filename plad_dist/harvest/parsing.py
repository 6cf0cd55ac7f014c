"""Parser of Python files: functions and the first sentences of their docstrings. No code is run."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plad_dist.harvest.descriptions import describe, function_name

MAX_FILE_BYTES = 1_000_000
_INDENTED_DOCSTRING = re.compile(rb'^[ \t]+[rRuU]?"""', re.MULTILINE)

DescribedName = tuple[str, str]  # description and name of a function


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """One row of the harvest.

    Attributes:
        description: first sentence of the docstring, as lower-case words.
        name: name of the function, as lower-case words.
        package: top-level package.
    """

    description: str
    name: str
    package: str


def parse_files(paths: list[Path]) -> tuple[list[DescribedName], int]:
    """Return descriptions and names of functions in files, and the number of unreadable files."""
    functions: list[DescribedName] = []
    unreadable = 0
    for path in paths:
        try:
            functions += _parse_file(path)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            unreadable += 1
    return functions, unreadable


def _parse_file(path: Path) -> list[DescribedName]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError("too large")
    code = path.read_bytes()
    if b"def " not in code or not _INDENTED_DOCSTRING.search(code):
        return []
    functions = []
    for function in _function_definitions(ast.parse(code)):
        name = function_name(function.name)
        description = describe(ast.get_docstring(function, clean=False) or "") if name else None
        if name and description and description.replace(" ", "") != name.replace(" ", ""):
            functions.append((description, name))
    return functions


def _function_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a module, in the order of the text."""
    statements: list[ast.AST] = [tree]
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        for field in ("finalbody", "orelse", "cases", "handlers", "body"):
            statements.extend(reversed(getattr(statement, field, [])))


def digest(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text, such as a file name with undecodable bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
