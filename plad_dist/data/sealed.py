"""Text files that end with a checksum of themselves, so that a reader finds every altered bit.

The last field is `xxh3_128`. Its value is the XXH3 checksum of the whole file with the 32 digits of
the value replaced by zeros. Parts state their checksum by the same rule
(:mod:`plad_dist.data.parts`).
"""

from __future__ import annotations

import json
import re
from typing import Any

import xxhash

CHECKSUM_FIELD = "xxh3_128"
ZEROS = b"0" * 32
_LAST_FIELD = re.compile(rb"\bxxh3_128[\"']?: [\"']?([0-9a-f]{32})[\"'}\s]*\Z")
_TAIL_BYTES = 100  # more than the last field takes


def sealed_json(text: str) -> bytes:
    """Return the text of a JSON object with its checksum as the last field."""
    head = text[: text.rindex("}")].rstrip()
    return _sealed(f'{head}, "{CHECKSUM_FIELD}": "', '"}\n')


def sealed_yaml(text: str) -> bytes:
    """Return a YAML document with its checksum in a comment on the last line."""
    return _sealed(f"{text.rstrip()}\n# {CHECKSUM_FIELD}: ", "\n")


def _sealed(head: str, tail: str) -> bytes:
    before, after = head.encode(), tail.encode()
    digest = xxhash.xxh3_128_hexdigest(before + ZEROS + after)
    return before + digest.encode() + after


def seal_problem(data: bytes) -> str | None:
    """Return the problem of a file's own checksum, or None if it is right."""
    match = _LAST_FIELD.search(data, max(0, len(data) - _TAIL_BYTES))
    if match is None:
        return f"it does not end with its checksum ({CHECKSUM_FIELD})"
    start, end = match.span(1)
    if xxhash.xxh3_128_hexdigest(data[:start] + ZEROS + data[end:]).encode() != match[1]:
        return "its checksum is wrong"
    return None


def parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: the text is not one JSON object, or a key is given twice in an object.
    """
    try:
        document = json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected an object, got {type(document).__name__}")
    return document


def unsealed_json(data: bytes) -> dict[str, Any]:
    """Return a sealed JSON object without its checksum.

    Raises:
        ValueError: the checksum is missing or wrong, or the text is not one JSON object.
    """
    if (problem := seal_problem(data)) is not None:
        raise ValueError(problem)
    document = parse_object(data)
    del document[CHECKSUM_FIELD]
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is given twice")
    return document
