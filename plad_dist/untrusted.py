"""Text and JSON from servers, files and other users, made safe to show and to parse."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from rich.text import Text

MAX_DEPTH = 64  # levels of nesting that a document may have; documents of real servers have about ten

# Sequences that a terminal obeys: control sequences, strings such as a window title or the
# clipboard, and two-character escapes. A string without an end reaches at most this far.
_ESCAPES = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]?"
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]{0,4096}(?:\x07|\x1b\\\\|\x9c)?"
    "|\x1b[ -/]*[0-~]?"
)
# Control characters except tab and newline, and the characters that reorder or break lines unseen.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTAINERS = (list, tuple, set, frozenset, Mapping)


def harmless(text: str) -> str:
    """Return a text without what a terminal obeys: escape sequences, control characters except tab
    and newline, and marks that reorder text."""
    if text.isascii() and text.isprintable():
        return text
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n"))))


def harmless_line(text: object, length: int = 200) -> str:
    """Return the text of a value on one line, harmless and cut to a length."""
    whole = text if isinstance(text, str) else repr(text)
    line = " ".join(harmless(whole[: 16 * length]).split())
    return line if len(line) <= length and len(whole) <= 16 * length else f"{line[:length]}..."


def cell(value: object, length: int = 500) -> Text:
    """Return a cell of a table: rich would take a string for markup, such as a link."""
    return Text(harmless_line(value, length))


def parse_json(raw: bytes | str) -> Any:
    """Return a JSON document; NaN, Infinity and numbers too large for a float are null.

    Raises:
        ValueError: it is not JSON, has an integer of thousands of digits, or is nested too deeply.
    """
    text = raw if isinstance(raw, str) else raw.decode(json.detect_encoding(raw), "surrogatepass")
    try:
        document = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_depth(document)
    return document


def strict_json(document: Any) -> str:
    """Return a document as JSON that every reader takes: NaN and infinite numbers become null."""
    return json.dumps(parse_json(json.dumps(document)), indent=1, allow_nan=False)


def check_depth(document: Any, limit: int = MAX_DEPTH) -> None:
    """Raise :class:`ValueError` if lists, sets and mappings are nested deeper than the limit."""
    level = [document] if isinstance(document, _CONTAINERS) else []
    for _ in range(limit + 1):
        if not level:
            return
        items = (container.values() if isinstance(container, Mapping) else container for container in level)
        level = [item for members in items for item in members if isinstance(item, _CONTAINERS)]
    raise ValueError(f"nested more than {limit} levels deep")


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite)
