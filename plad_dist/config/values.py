"""Types of values that several config sections share: bounds, paths, free mappings, templates."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from plad_dist.config.secrets import ADVICE, secret_location

# -- bounds and pairs of numbers


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("expected a number, or .inf for no bound; got .nan")
    return value


def _unset_if_infinite(value: Any) -> Any:
    return None if value == math.inf else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# A bound, which may be infinite: no bound.
Bound = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_not_nan)]
# A bound that may be unset: `.inf` unsets it.
OptionalBound = Annotated[float | None, BeforeValidator(_unset_if_infinite)]
# A limit on a count, with the same rule.
OptionalCount = Annotated[int | None, BeforeValidator(_unset_if_infinite)]
# For tuples, which YAML writes as lists.
FromList = BeforeValidator(_as_tuple)


# -- paths

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\}|)", re.ASCII)


def expand_path(text: str) -> str:
    """Return a path or URI with `~` and environment variables expanded.

    `$$` stands for a dollar sign.

    Raises:
        ValueError: a variable is not set, or there is no such user.
    """
    path = _VARIABLE.sub(_value_of_variable, text)
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111 - keeps `./` and a final `/`
    if expanded == path:
        raise ValueError(f"{text}: no home folder is known for {path.partition('/')[0]}; write the path")
    return expanded


def escape_path(path: str) -> str:
    """Return an expanded path in the form that :func:`expand_path` reads."""
    return path.replace("$", "$$")


def _value_of_variable(match: re.Match[str]) -> str:
    if match["dollar"]:
        return "$"
    name = match["name"] or match["braced"]
    if name is None:
        raise ValueError(f"{match.string}: expected $NAME or ${{NAME}} after `$`; write $$ for a dollar sign")
    value = os.environ.get(name)
    if not value or "$" in value:
        state = "not set" if value is None else f"{value!r}, which is not a path" if value else "empty"
        raise ValueError(f"{match.string}: the environment variable {name} is {state}; set it, or write the value")
    return value


# A path or URI. Every key that names a file or folder has this type.
PathText = Annotated[str, AfterValidator(expand_path), PlainSerializer(escape_path)]


Named = TypeVar("Named", bound=Mapping[str, Any])


def refuse_clash(what: str, named: Named) -> Named:
    """Return a mapping whose names become names of folders, none of which differ in case alone.

    Raises:
        ValueError: two names are the same folder on some file systems.
    """
    names: dict[str, str] = {}
    for name in named:
        if (other := names.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{what}: {other!r} and {name!r} differ in case alone; some file systems hold one of them")
    return named


# -- mappings for other programs


_PATH_BEGINNINGS = ("~", "$", "/")


def _convert_paths(value: Any, convert: Callable[[str], str]) -> Any:
    """Return a value with its paths converted: texts that begin like one, since `$` may end a
    pattern."""
    if isinstance(value, dict):
        return {key: _convert_paths(item, convert) for key, item in value.items()}
    if isinstance(value, list):
        return [_convert_paths(item, convert) for item in value]
    return convert(value) if isinstance(value, str) and value.startswith(_PATH_BEGINNINGS) else value


def _check_json(mapping: dict[str, Any]) -> dict[str, Any]:
    def check(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                check(item, f"{key}.{name}" if key else str(name))
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                check(item, f"{key}.{index}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}: expected a finite number; got {value}")
        elif value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"{key}: expected a value that JSON can hold; got {value!r:.60}")

    check(mapping, "")
    return mapping


def _refuse_secrets(mapping: dict[str, Any]) -> dict[str, Any]:
    if location := secret_location(mapping, is_free=True):
        raise ValueError(f"{location}: looks like a secret; {ADVICE}")
    return mapping


# A mapping whose keys another program defines.
FreeMapping = Annotated[dict[str, Any], AfterValidator(_check_json), AfterValidator(_refuse_secrets)]
# A free mapping whose texts may be paths, also in sections of its own.
FreeMappingWithPaths = Annotated[
    FreeMapping,
    AfterValidator(lambda mapping: _convert_paths(mapping, expand_path)),
    PlainSerializer(lambda mapping: _convert_paths(mapping, escape_path)),
]


# -- templates

_PATH = re.compile(r"[/~.].*|[^\s/]+(/[^\s/]+)+|.*\.(jinja2?|j2|txt|tmpl)")
_USE_OF_MESSAGES = re.compile(r"\{[{%](?:(?!\}\}|%\}).)*\bmessages\b", re.DOTALL)


def _refuse_path(template: str) -> str:
    if "{" not in template and _PATH.fullmatch(template):
        raise ValueError(
            f"{template}: is a path, expected the text of a template: copy the text of the file here, with YAML's `|`"
        )
    return template


def _check_use_of_messages(template: str) -> str:
    if not _USE_OF_MESSAGES.search(template):
        raise ValueError(
            f"{template!r:.80} uses no messages, so every prompt would be the same text; expected a Jinja template "
            "such as '{{ messages[-1].content }}'"
        )
    return template


# Text of a Jinja template. No template is read from a file, except those of judges, which are long.
TemplateText = Annotated[str, AfterValidator(_refuse_path)]
# Text of a Jinja template over the messages of a conversation.
MessagesTemplate = Annotated[TemplateText, AfterValidator(_check_use_of_messages)]
