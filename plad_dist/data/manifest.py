"""The manifest of a dataset: the list of its parts. Written last, it completes the dataset.

A manifest of another version is refused by its number. It is not damage, so that nothing sets it
aside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import xxhash

from plad_dist.data.parts import Part, part_block
from plad_dist.data.sealed import CHECKSUM_FIELD, parse_object, seal_problem, sealed_json
from plad_dist.errors import RunFailed

MANIFEST = "manifest.json"
_VERSION = 3
_FIELDS = {"version", "rows", "fingerprint", "facts", "parts", CHECKSUM_FIELD}


class DamagedManifest(RunFailed):
    """The manifest cannot be parsed. A storage error is not damage but a :class:`RunFailed`."""


@dataclass(frozen=True)
class Manifest:
    """Content of a complete dataset.

    Attributes:
        fingerprint: hash of everything that decides the rows.
        parts: the parts in the order of their blocks.
        facts: counts and times of the stage that wrote the dataset.
    """

    fingerprint: str
    parts: list[Part]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def contents(self) -> str:
        """Hash of the parts' checksums.

        It can differ between datasets with the same fingerprint, because engines round differently.
        """
        return xxhash.xxh3_128_hexdigest("".join(part.xxh3_128 for part in self.parts).encode())

    def count(self, name: str) -> int:
        """Return the sum of one count over all parts."""
        return sum(part.counts.get(name, 0) for part in self.parts)

    def to_json(self) -> bytes:
        """Return the JSON document.

        It has one line per part and is encoded part by part, which is fast enough for hundreds of
        thousands of parts.
        """
        head = {"version": _VERSION, "rows": self.rows, "fingerprint": self.fingerprint, "facts": self.facts}
        lines = [json.dumps({name: getattr(part, name) for name in Part.__slots__}) for part in self.parts]
        return sealed_json(json.dumps(head)[:-1] + ', "parts": [\n' + ",\n".join(lines) + "\n]}")

    @classmethod
    def from_json(cls, data: bytes, url: str) -> Manifest:
        """Parse a manifest.

        Args:
            url: path or URI of the manifest, for messages.

        Raises:
            DamagedManifest: the bytes are not a manifest, or do not have their checksum.
            RunFailed: the manifest has another version.
        """
        try:
            document = parse_object(data)
            version = document.get("version")
            if type(version) is int and version != _VERSION:
                raise RunFailed(
                    f"{url}: has version {version}, this plad-dist reads version {_VERSION}. Nothing was changed. Use "
                    "the plad-dist that wrote it, or restore it from a copy if it is damaged"
                )
            if (seal := seal_problem(data)) is not None:
                raise ValueError(seal)
            if unknown := document.keys() - _FIELDS:
                raise ValueError(f"unknown field {min(unknown)!r}")
            parts = [_parse_part(raw_part) for raw_part in document["parts"]]
            return cls(str(document["fingerprint"]), parts, dict(document["facts"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, json.JSONDecodeError):
                problem = error.msg
            else:
                problem = str(error) if type(error) is ValueError else "not a manifest of this version"
            raise DamagedManifest(
                f"{url}: damaged: {problem}; the checksums of the parts are lost with it, so restore it from a copy if "
                "you have one"
            ) from None


def _parse_part(raw_part: Any) -> Part:
    """Return a part as a manifest lists it. Raise :class:`TypeError` if it is malformed."""
    part = Part(**raw_part)
    if not (
        isinstance(part.name, str) and part_block(part.name) is not None and isinstance(part.rows, int)
        and isinstance(part.bytes, int) and isinstance(part.xxh3_128, str) and isinstance(part.counts, dict)
    ):  # fmt: skip
        raise TypeError(part.name)
    return part
