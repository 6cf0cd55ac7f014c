"""Parser of config files: strict YAML, overrides, and errors with key and expected value."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from plad_dist.config import Config, Section, optional_sections, path_keys, schema_fields
from plad_dist.config_yaml import MAX_LENGTH, Location, Scalar, load_yaml, plain
from plad_dist.errors import UserError

SectionType = TypeVar("SectionType", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config in a YAML file. Raise :class:`UserError` for any problem with it."""
    raw = read_yaml(Path(path))
    # The `run.yaml` of a run directory also holds a fingerprint.
    if {"config", "fingerprint"} <= raw.keys() and isinstance(raw["config"], dict):
        raw = raw["config"]
    return parse_config(override(raw, {}, overrides), str(path))


def override(raw: dict[str, Any], keys: Mapping[str, Any], arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Return a copy of a mapping with dotted keys set, and then `key=value` arguments applied.

    Raises:
        UserError: a key or an argument cannot be applied.
    """
    raw = _unaliased(raw)
    for key, value in keys.items():
        _set_key(raw, key, value, f"{key}={_shown(plain(value)[0])}")
    for argument in arguments:
        _apply_override(raw, argument)
    return raw


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """Return the config in a mapping. Raise :class:`UserError` if it does not match the schema.

    Args:
        origin: name of the mapping in messages.
    """
    return parse_section(Config, raw, origin)


def parse_section(section: type[SectionType], raw: Mapping[str, Any], origin: str) -> SectionType:
    """Return a section from a mapping, as :func:`read_yaml` returns it or without scalars of YAML.

    Raises:
        UserError: the mapping does not match the schema; the message has a line for each problem.

    Args:
        origin: name of the mapping in messages.
    """
    values, scalars = plain(_with_date_as_text(raw))
    unusable = {location: problem for location, scalar in scalars.items() if (problem := _problem(location, scalar))}
    lines = [
        ": ".join(filter(None, [".".join(location), scalars[location].text, problem]))
        for location, problem in unusable.items()
    ]
    try:
        parsed = section.model_validate(values)
    except ValidationError as error:
        lines += [
            line for item in error.errors() if not _is_about(item, unusable) for line in _problem_lines(item, scalars)
        ]
    else:
        if not lines:
            return parsed
    lines = list(dict.fromkeys(lines))
    raise UserError(f"{origin}: {len(lines)} problem{'s' * (len(lines) > 1)}:\n  " + "\n  ".join(lines))


def _problem(location: Location, scalar: Scalar) -> str | None:
    """Return why a scalar cannot be used at a place, or None if the schema decides."""
    is_path = any(_matches(path.split("."), list(location)) for path in path_keys())
    if scalar.text == "~" and is_path:
        return 'YAML reads it as null; quote it ("~") if it is the home folder, or write null'
    if scalar.text == "" and scalar.kind == "null":
        for path, has_defaults in optional_sections().items():
            if _matches(path.split("."), list(location)):
                remedy = "`{}` for its defaults" if has_defaults else "its keys"
                return f"a section without keys, which YAML reads as null; write {remedy}, or null for no section"
    return scalar.problem


def _with_date_as_text(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a mapping in which `run.date`, the only key that holds a date, needs no quotes."""
    run = raw.get("run")
    if not isinstance(run, dict) or not isinstance(date := run.get("date"), Scalar) or date.kind != "a date":
        return raw
    return {**raw, "run": {**run, "date": date.text}}


def read_yaml(path: Path, expected: str = "run, prompts, teacher, student, ...") -> dict[str, Any]:
    """Return the mapping in a YAML file, with a :class:`Scalar` for every plain number, boolean and
    null.

    Args:
        expected: sections that the mapping should have, for messages.

    Raises:
        UserError: the file is missing, not valid YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LENGTH + 1)
        if len(data) > MAX_LENGTH:
            raise UserError(
                f"{path}: larger than {MAX_LENGTH >> 10} KiB, which no config is; name the file of a config"
            )
        text = data.decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; see examples/ for configs to start from") from None
    except IsADirectoryError:
        has_config = (path / "run.yaml").is_file()
        advice = f"the config of this run is {path / 'run.yaml'}" if has_config else "name the file of a config"
        raise UserError(f"{path}: is a folder; {advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        raw = _unaliased(load_yaml(text))
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply, or an alias contains itself") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {yaml_reason(error)}") from None
    if not isinstance(raw, dict):
        value = plain(raw)[0]
        content = "an empty file" if value is None else _shown(value)
        raise UserError(f"{path}: expected a mapping of sections ({expected}), got {content}")
    return raw


def _unaliased(value: Any) -> Any:
    """Return a copy without shared sections.

    YAML aliases share their section, so an override of one would change all of them.
    """
    if isinstance(value, dict):
        return {key: _unaliased(item) for key, item in value.items()}
    return [_unaliased(item) for item in value] if isinstance(value, list) else value


def yaml_reason(error: Exception) -> str:
    """Return the reason of a YAML error and its position, on one line."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + (getattr(error, "problem", None) or " ".join(str(error).split()))


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, such as run.seed=3")
    try:
        value = load_yaml(text) if text.strip() else Scalar("", None, "null")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if "{{" in text:  # a Jinja template, to be taken as a string
            return _set_key(raw, key, text, override)
        raise UserError(f"override {override!r}: the value is not valid YAML: {yaml_reason(error)}") from None
    return _set_key(raw, key, value, override)


def _set_key(raw: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, leaf = key.split(".")
    section = raw
    for depth, name in enumerate(parents):
        if plain(section.get(name))[0] is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    section[leaf] = _unaliased(value)


# Names that pydantic adds to the location of an error for the member of a union. They are not keys.
_SOURCE_TYPES = ("files", "dataset", "python_functions")
_JUDGE_TYPES = ("reward_model", "teacher_likelihood", "llm")
_VALUE_TYPES = re.compile(r"int|float|str|bool|constrained-\w+|(literal|list|tuple|dict)\[.*")
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a string", type(None): "null"}
_EXPECTED = {
    "model_type": "a section (a mapping of keys)", "model_attributes_type": "a section (a mapping of keys)",
    "dict_type": "a section (a mapping of keys)", "list_type": "a list", "string_type": "a string",
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "string_too_short": "a non-empty string", "too_short": "at least one item",
    "string_pattern_mismatch": "a name of letters, digits and '_'",
}  # fmt: skip


def _location(item: Any) -> tuple[list[str], bool]:
    """Return the key of a validation error, and whether its value may be of several types."""
    keys: list[str] = []
    has_several_types = False
    parts = [str(part) for part in item["loc"]]
    for index, part in enumerate(parts):
        parent = keys[-1:]
        is_key = index == len(parts) - 1 and item["type"] in ("extra_forbidden", "missing")
        if part in _SOURCE_TYPES and parent in (["source"], ["heldout"]) and not is_key:
            continue
        if part in _JUDGE_TYPES and keys[-2:-1] == ["judges"] and not is_key:
            continue
        if _VALUE_TYPES.fullmatch(part) and parent != ["teachers"] and not is_key:
            has_several_types = True
            continue
        keys.append(part)
    return keys, has_several_types


def _is_about(item: Any, unusable: Collection[Location]) -> bool:
    """Return True if a validation error is about an unusable scalar, or a list with one."""
    keys = tuple(_location(item)[0])
    is_key = item["type"] in ("extra_forbidden", "missing")
    return not is_key and any(location[: len(keys)] == keys for location in unusable)


def _problem_lines(item: Any, scalars: Mapping[Location, Scalar]) -> list[str]:
    """Return the lines for one validation error: key, expected value and given value.

    Args:
        scalars: scalars as they were written, by location.
    """
    location, has_several_types = _location(item)
    key, scalar = ".".join(location), scalars.get(tuple(location))
    match item["type"]:
        case "extra_forbidden":
            return [f"{key}: unknown key{_suggestion(location)}"]
        case "missing":
            return [f"{key}: missing; it has no default"]
        case "value_error":
            message = item["msg"].removeprefix("Value error, ")
            if scalar is not None:
                message = message.replace(f"got {scalar.value!r}", f"got {scalar.text}")
            # The lines of an error of the whole config begin with their keys.
            return [f"{key}: {message}"] if key else message.splitlines()
        case "union_tag_invalid":
            got, tags = item["ctx"]["tag"], item["ctx"]["expected_tags"].replace("'", "")
            return [f"{key}.type: {got!r}: expected one of {tags}"]
        case "union_tag_not_found":
            return [f"{key}.type: missing; it has no default"]
    is_short_text = item["type"] == "too_short" and isinstance(item["input"], str)  # of a path, after its expansion
    expected = _EXPECTED["string_too_short" if is_short_text else item["type"]] if item["type"] in _EXPECTED else None
    if has_several_types and (names := _type_names(location)):  # one line for all members of the union
        expected = " or ".join(names)
    message = item["msg"].replace("Input should be", "expected")
    message = f"expected {expected}" if expected else re.sub("expected (greater|less)", r"expected a value \1", message)
    got = _shown(item["input"]) if scalar is None else scalar.text or "null"
    if scalar is not None and scalar.text not in ("", "null") and item["type"] == "string_type":
        got += f', which is {scalar.kind} in YAML; if it is a text, quote it ("{scalar.text}")'
    return [f"{key}: {message[0].lower() + message[1:]}; got {got}"]


def _type_names(location: list[str]) -> list[str]:
    """Return the names of the types that a key accepts; none if the key is not in the schema."""
    field = next((field for path, field in schema_fields() if _matches(path.split("."), location)), None)
    return [name for member in typing.get_args(field.annotation) for name in _names_of(member)] if field else []


def _names_of(member: Any) -> list[str]:
    """Return the names of one member of a union: its type, or its values if it is a literal."""
    if typing.get_origin(member) is typing.Literal:
        return [f"`{value}`" for value in typing.get_args(member)]
    return ["a list"] if typing.get_origin(member) in (list, tuple) else [_TYPE_NAMES.get(member, str(member))]


def _matches(path: list[str], key: list[str]) -> bool:
    """Return True if a key is at a path of the schema, where `*` stands for any name."""
    return len(path) == len(key) and all(a in (b, "*") for a, b in zip(path, key, strict=True))


def _suggestion(location: list[str]) -> str:
    """Return the end of the message for an unknown key: a similar key, or the known ones."""
    parent, name = location[:-1], location[-1]
    paths = [path.split(".") for path, _ in schema_fields()]
    known_keys = sorted({path[-1] for path in paths if _is_below(path, parent)} - {name, "*"})
    close = difflib.get_close_matches(name, known_keys, n=1, cutoff=0.75)
    if close:
        return f"; did you mean `{close[0]}`?"
    # The same name in another section, at best below the section it was written in.
    elsewhere = [path for path in paths if path[-1] == name and "*" not in path]
    if elsewhere:
        below = [path for path in elsewhere if path[: len(parent)] == parent]
        names = [f"`{'.'.join(path)}`" for path in (below or elsewhere)[:3]]
        return f"; did you mean {' or '.join(names)}?"
    close = difflib.get_close_matches(name, known_keys, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known keys: {', '.join(known_keys)}" if known_keys else ""


def _is_below(path: list[str], parent: list[str]) -> bool:
    """Return True if a path of the schema is directly in a section."""
    return _matches(path[:-1], parent)


def _shown(value: Any) -> str:
    """Return a value as JSON for a message, in at most 60 characters."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
