"""YAML as configs use it: numbers are decimal, and a plain scalar keeps the text that was written.

YAML reads some plain texts as another thing than they show: `010` is eight, `1:30` is ninety,
`2024-01-01` is a date, `None` is a text. Such a scalar is never used; a message says what to write.
Numbers, booleans and null are used, and remember their text, which a message shows if the key wants
something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_PYTHON_TAG = "!python-spelling"
_PYTHON_SPELLING = re.compile(r"None|[-+]?(?:nan|NaN|inf|Inf|Infinity)")
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+")  # YAML 1.1 reads 1e-5 as a string
_DECIMAL_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_DECIMAL_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_OTHER_NOTATIONS = (
    (re.compile(".*:.*"), "YAML reads it in base 60, as a time"),
    (re.compile("[-+]?0x.*", re.IGNORECASE), "YAML reads it as hexadecimal"),
    (re.compile("[-+]?0b.*", re.IGNORECASE), "YAML reads it as binary"),
    (re.compile("[-+]?0[0-9_]+"), "YAML reads a number with a leading zero as octal"),
    (re.compile(".*_.*"), "YAML leaves out the underscores"),
)  # fmt: skip
_KINDS = {"int": "a number", "float": "a number", "bool": "true or false", "null": "null"}

MAX_LENGTH = 512 << 10
_MAX_DEPTH, _MAX_NODES = 50, 50_000

_TOO_DEEP = "nested too deeply, or an alias contains itself"

Location = tuple[str, ...]  # keys and list indices


@dataclass(frozen=True)
class Scalar:
    """Plain scalar that YAML does not read as a string.

    Attributes:
        text: the text that was written.
        value: number, boolean or None.
        kind: what YAML reads the text as, for messages.
        problem: why the scalar cannot be used, and what to write; None if it can.
    """

    text: str
    value: Any
    kind: str
    problem: str | None = None


def load_yaml(text: str) -> Any:
    """Return the document in a text, with :class:`Scalar` for all scalars that are not strings.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text is not valid YAML, or a key is not a
            string or is repeated.
    """
    _check_length(text)
    return yaml.load(text, Loader=_ConfigLoader)  # noqa: S506 - a SafeLoader


def load_plain_yaml(text: str | bytes) -> Any:
    """Return the document in a text that plad-dist has written, bounded as by :func:`load_yaml`.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text is not valid YAML.
    """
    _check_length(text)
    return yaml.load(text, Loader=_BoundedLoader)  # noqa: S506 - a SafeLoader


def _check_length(text: str | bytes) -> None:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"larger than {MAX_LENGTH >> 10} KiB, which no config is")


def dump_yaml(document: Any) -> str:
    """Return a document as YAML that :func:`load_yaml` reads back unchanged."""
    return yaml.dump(document, Dumper=_ConfigDumper, sort_keys=False, allow_unicode=True)


def plain(value: Any) -> tuple[Any, dict[Location, Scalar]]:
    """Return a document without :class:`Scalar`, and its scalars by their location.

    A scalar that cannot be used stays in the document.
    """
    scalars: dict[Location, Scalar] = {}

    def convert(item: Any, location: Location) -> Any:
        if isinstance(item, Scalar):
            scalars[location] = item
            return item if item.problem else item.value
        if isinstance(item, dict):
            return {key: convert(member, (*location, str(key))) for key, member in item.items()}
        if isinstance(item, list):
            return [convert(member, (*location, str(index))) for index, member in enumerate(item)]
        return item

    return convert(value, ()), scalars


class _BoundedLoader(yaml.SafeLoader):
    """Safe YAML loader that bounds the depth and the size of a document, its aliases expanded."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # number of nodes in each node

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        mark, before = self.peek_event().start_mark, self._nodes
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, mark)
        self._nodes += self._sizes[id(node)] if is_alias else 1
        if self._nodes > _MAX_NODES:
            problem = f"more than {_MAX_NODES:,} values, those of aliases included"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        if not is_alias:
            self._sizes[id(node)] = self._nodes - before
        return node


class _ConfigLoader(_BoundedLoader):
    """Safe YAML loader that keeps the text of scalars.

    It refuses keys that repeat or are no strings.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _key_error(key, key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _ConfigDumper(yaml.SafeDumper):
    """Safe YAML dumper that quotes every string that the loader would not read as a string."""


def _key_error(key: Any, node: yaml.Node) -> yaml.constructor.ConstructorError:
    shown = f"key `{key.text}` is {key.kind} in YAML" if isinstance(key, Scalar) else "a key is not a string"
    advice = f'; keys are strings: quote it ("{key.text}")' if isinstance(key, Scalar) else "; keys are strings"
    return yaml.constructor.ConstructorError(None, None, shown + advice, node.start_mark)


def _construct_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Scalar:
    text, kind = str(node.value), node.tag.removeprefix(_TAG)
    quoted = f'quote it ("{text}")'
    match kind:
        case "timestamp":
            return Scalar(text, None, "a date", f"YAML reads it as a date; {quoted} if it is a text")
        case "null":
            return Scalar(text, None, _KINDS[kind])
        case "bool" if text.lower() in yaml.SafeLoader.bool_values:
            return Scalar(text, yaml.SafeLoader.bool_values[text.lower()], _KINDS[kind])
        case "bool":  # an explicit tag on another text
            return Scalar(text, None, _KINDS[kind], "expected true or false")
        case "int" if _DECIMAL_INT.fullmatch(text):
            return Scalar(text, int(text), _KINDS[kind])
        case "float" if _DECIMAL_FLOAT.fullmatch(text):
            return Scalar(text, float(text), _KINDS[kind])
        case "float" if text.lower().lstrip("+-") in (".inf", ".nan"):
            return Scalar(text, float(text.replace(".", "")), _KINDS[kind])
    reason = next((reason for pattern, reason in _OTHER_NOTATIONS if pattern.fullmatch(text)), "not a decimal number")
    problem = f"{reason}; write a decimal number such as 10 or 0.5, or {quoted} if it is a text"
    return Scalar(text, None, "a number", problem)


def _construct_python_spelling(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Scalar:
    text = str(node.value)
    if text == "None":
        advice = "write null"
    elif "nan" in text.lower():
        advice = "write a number"
    else:
        advice = "write a number, or .inf where the reference allows it for `no bound`"
    problem = f'this is how Python spells it; {advice}, or quote it ("{text}") if it is a text'
    return Scalar(text, None, "a text", problem)


for _kind in ("int", "float", "bool", "null", "timestamp"):
    _ConfigLoader.add_constructor(f"{_TAG}{_kind}", _construct_scalar)
_ConfigLoader.add_constructor(_PYTHON_TAG, _construct_python_spelling)
_ConfigLoader.add_constructor(f"{_TAG}value", lambda loader, node: str(node.value))  # a plain `=`
for _class in (_ConfigLoader, _ConfigDumper):
    _class.add_implicit_resolver(f"{_TAG}float", re.compile(f"^(?:{_EXPONENT.pattern})$"), list("-+0123456789"))
    _class.add_implicit_resolver(_PYTHON_TAG, re.compile(f"^(?:{_PYTHON_SPELLING.pattern})$"), list("-+NnIi"))
