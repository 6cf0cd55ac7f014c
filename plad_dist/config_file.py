"""Reading a run's YAML: overrides, strict keys, and errors that say what was expected."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from plad_dist.config import Config, schema_fields
from plad_dist.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a run's YAML. Raises :class:`UserError` for anything wrong with it."""
    raw = read_yaml(Path(path))
    # A run directory keeps its config beside its fingerprint.
    if {"config", "fingerprint"} <= raw.keys() and isinstance(raw["config"], dict):
        raw = raw["config"]
    return parse_config(override(raw, {}, overrides), str(path))


def override(raw: dict[str, Any], keys: Mapping[str, Any], arguments: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping with dotted keys set to values, then by `key=value` arguments. Raises :class:`UserError` for a wrong one."""
    raw = _apart(raw)
    for key, value in keys.items():
        _set(raw, key, value, f"{key}={value}")
    for argument in arguments:
        _apply_override(raw, argument)
    return raw


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """Check a mapping against the schema; `origin` names it in messages."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, origin)) from None


def explain(error: ValidationError, origin: str) -> str:
    """All that is wrong with a mapping, a line each; `origin` names it."""
    lines = list(dict.fromkeys(line for item in error.errors() for line in _explain(item)))
    return f"{origin}: {len(lines)} problem{'s' * (len(lines) > 1)}:\n  " + "\n  ".join(lines)


def read_yaml(path: Path, expected: str = "run, prompts, teacher, student, ...") -> dict[str, Any]:
    """The mapping in a file. Raises :class:`UserError` where there is none; `expected` says what should be in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file. Examples lie in examples/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file: {error}") from None
    try:
        raw = _apart(yaml.load(text, Loader=_StrictLoader))  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: it is nested too deeply, or within itself") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {yaml_reason(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections ({expected}), got {_kind(raw)}.")
    return raw


def _apart(value: Any) -> Any:
    """The same with every section by itself: YAML's aliases share theirs, and an override of one would set all."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


def yaml_reason(error: Exception) -> str:
    """What is wrong with a YAML text, and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + (getattr(error, "problem", None) or " ".join(str(error).split()))


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-5 as a string; a number is meant.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, such as run.seed=3")
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if "{{" in text:  # a template, which only looks like YAML
            return _set(raw, key, text, override)
        raise UserError(f"override {override!r}: the value is not valid YAML: {yaml_reason(error)}") from None
    return _set(raw, key, value, override)


def _set(raw: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, leaf = key.split(".")
    section = raw
    for depth, name in enumerate(parents):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    section[leaf] = _apart(value)


# What pydantic calls the alternatives of a union, which are no keys.
_TAGS = ("files", "dataset", "python_functions")
_JUDGE_TAGS = ("reward_model", "teacher_likelihood", "llm")
_KINDS = re.compile(r"int|float|str|bool|constrained-\w+|(literal|list|tuple|dict)\[.*")
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}
_EXPECTED = {
    "model_type": "a section with keys of its own", "model_attributes_type": "a section with keys of its own",
    "dict_type": "a section with keys of its own", "list_type": "a list", "string_type": "a text",
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "bool_type": "true or false", "bool_parsing": "true or false",
    "string_too_short": "a text that is not empty", "too_short": "at least one item",
    "string_pattern_mismatch": "a name of letters, digits and '_'",
}  # fmt: skip


def _location(item: Any) -> tuple[list[str], bool]:
    """The key of a validation error, and whether its values may be of several kinds."""
    found: list[str] = []
    alternatives = False
    parts = [str(part) for part in item["loc"]]
    for index, part in enumerate(parts):
        above = found[-1:]
        is_key = index == len(parts) - 1 and item["type"] in ("extra_forbidden", "missing")
        if part in _TAGS and above in (["source"], ["heldout"]) and not is_key:
            continue
        if part in _JUDGE_TAGS and found[-2:-1] == ["judges"] and not is_key:
            continue
        if _KINDS.fullmatch(part) and above != ["teachers"] and not is_key:
            alternatives = True
            continue
        found.append(part)
    return found, alternatives


def _explain(item: Any) -> list[str]:
    """Lines for one validation error: the key, what was expected, what was got."""
    location, alternatives = _location(item)
    key = ".".join(location)
    match item["type"]:
        case "extra_forbidden":
            return [f"{key}: unknown key{_nearest(location)}"]
        case "missing":
            return [f"{key}: missing; it has no default"]
        case "value_error":
            message = item["msg"].removeprefix("Value error, ")
            return [f"{key}: {message}"] if key else message.splitlines()  # those of the whole name their keys
        case "union_tag_invalid":
            got, tags = item["ctx"]["tag"], item["ctx"]["expected_tags"].replace("'", "")
            return [f"{key}.type: {got!r}: expected one of {tags}"]
        case "union_tag_not_found":
            return [f"{key}.type: missing; it has no default"]
    wanted = _EXPECTED.get(item["type"])
    if alternatives and (kinds := _kinds(location)):  # one line for all alternatives
        wanted = " or ".join(kinds)
    message = item["msg"].replace("Input should be", "expected")
    message = f"expected {wanted}" if wanted else re.sub("expected (greater|less)", r"expected a value \1", message)
    return [f"{key}: {message[0].lower() + message[1:]}; got {_kind(item['input'])}"]


def _kinds(location: list[str]) -> list[str]:
    """The alternatives of a key whose values are of several kinds, in words; none where the key is not in the schema."""
    field = next((field for path, field in schema_fields() if _matches(path.split("."), location)), None)
    return [word for kind in typing.get_args(field.annotation) for word in _words(kind)] if field else []


def _words(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [f"`{value}`" for value in typing.get_args(kind)]
    return ["a list"] if typing.get_origin(kind) in (list, tuple) else [_WORDS.get(kind, str(kind))]


def _matches(path: list[str], key: list[str]) -> bool:
    """Whether a key is the one of a path of the schema; `*` stands for any name."""
    return len(path) == len(key) and all(a in (b, "*") for a, b in zip(path, key, strict=True))


def _nearest(location: list[str]) -> str:
    parent, name = location[:-1], location[-1]
    paths = [path.split(".") for path, _ in schema_fields()]
    known = sorted({path[-1] for path in paths if _is_below(path, parent)} - {name, "*"})
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if close:
        return f"; did you mean `{close[0]}`?"
    # The same word elsewhere: the nearer to where it was written, the better.
    elsewhere = [path for path in paths if path[-1] == name and "*" not in path]
    if elsewhere:
        below = [path for path in elsewhere if path[: len(parent)] == parent]
        names = [f"`{'.'.join(path)}`" for path in (below or elsewhere)[:3]]
        return f"; did you mean {' or '.join(names)}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known here: {', '.join(known)}" if known else ""


def _is_below(path: list[str], parent: list[str]) -> bool:
    """Whether a key of the schema lies directly in a section."""
    return _matches(path[:-1], parent)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
