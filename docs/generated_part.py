"""Generated part of a page, between two marks."""

from __future__ import annotations

import sys
from pathlib import Path


def write_part(target: Path, start: str, end: str, body: str) -> None:
    """Write the part of a page between two marks, or only compare it if `--check` was given.

    Args:
        start: beginning of the line before the part.
        end: line after the part.
    """
    page = target.read_text(encoding="utf-8")
    before, has_start, rest = page.partition(start)
    comment, newline, rest = rest.partition("\n")
    _, has_end, after = rest.partition(end)
    if not (has_start and has_end):
        sys.exit(f"{target}: has no lines {start!r} and {end!r} around the generated part")
    wanted = f"{before}{start}{comment}{newline}\n{body}\n\n{end}{after}"
    if "--check" in sys.argv[1:]:
        if wanted != page:
            sys.exit(f"{target}: differs from what is generated; run `python {sys.argv[0]}`")
        return
    target.write_text(wanted, encoding="utf-8")
