"""Write docs/configuration.md from the schema: `python docs/generate_configuration.py [--check]`.

`--check` writes nothing, and fails if the page differs from the schema.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from plad_dist.config import is_operational, schema_fields

TARGET = Path(__file__).with_name("configuration.md")

HEADER = """# Configuration reference

A run is one YAML file with the keys below. `key.sub=value` arguments on the command line override them.
This page is generated from `plad_dist/config/` by `python docs/generate_configuration.py`; do not edit it.

A key marked ● decides what the run produces. Once a stage that depends on it has started, the run directory
refuses another value. The other keys control how the work is carried out, and may change between resumes.
`*` stands for a name of your choice.

Numbers are decimal: `010`, `0x10`, `1:30`, `1_000`, `yes` and `.nan` are refused where a number is wanted. `.inf` is
accepted where the meaning of a key names it, and means no bound. A text that YAML would read as another value is
quoted: `revision: "0123456"`.

In every path or URI, `~` stands for the home folder, and `$NAME` and `${NAME}` for an environment variable, which must
be set. `$$` stands for a dollar sign. Paths are expanded when the config is read, by `plad submit` where it is called,
and `run.yaml` holds the expanded ones.

| key | default | meaning |
| --- | --- | --- |
"""


def render() -> str:
    """Return the text of the page."""
    fields: dict[str, list[FieldInfo]] = {}
    defaults: dict[str, Any] = {}  # values that the default of a section gives to its keys
    for path, field in schema_fields():
        fields.setdefault(path, []).append(field)
        if isinstance(field.default, BaseModel):
            defaults |= {f"{path}.{name}": getattr(field.default, name) for name in field.default.model_fields_set}
    return HEADER + "".join(_row(path, alternatives, defaults) for path, alternatives in fields.items())


def _row(path: str, alternatives: list[FieldInfo], defaults: dict[str, Any]) -> str:
    """Return the line of a key, or nothing for a section without a description.

    Args:
        alternatives: fields of the key in the members of a union, which share a line.
    """
    field = alternatives[0]
    if isinstance(field.default, BaseModel) or (_is_section(field) and not field.description):
        return ""
    values = list(dict.fromkeys(value for item in alternatives for value in _values(item.annotation)))
    listed = f"One of {', '.join(values)}." if values else ""
    described = " ".join(dict.fromkeys(item.description for item in alternatives if item.description))
    meaning = " ".join(filter(None, [described, listed, _limits(field.metadata)]))
    mark = "" if is_operational(path) else " ●"
    return f"| `{path}`{mark} | {_default(defaults.get(path, field.default))} | {meaning} |\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return "unset" if value is None else f"`{json.dumps(value)}`"


def _values(annotation: Any) -> list[str]:
    """Return the values of a literal, which may be optional; none for other types."""
    members = [item for item in get_args(annotation) if item is not NoneType]
    if get_origin(annotation) in (Union, UnionType) and len(members) == 1:
        return _values(members[0])
    return [f"`{item}`" for item in members] if get_origin(annotation) is Literal else []


def _limits(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{signs[name]} {getattr(item, name)}" for item in metadata for name in signs if hasattr(item, name)]
    return f"({', '.join(bounds)})" if bounds else ""


if __name__ == "__main__":
    page = render()
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == page else f"{TARGET}: stale; run python {__file__}")
    TARGET.write_text(page, encoding="utf-8")
