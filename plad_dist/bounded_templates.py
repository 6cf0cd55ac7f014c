"""Jinja in a sandbox that also bounds time and memory: no template can hold up or fill a machine.

A chat template comes with a model, and a config from anywhere, so what they render is bounded:

- a value, such as a text or a list with its contents, has at most `MAX_SIZE` characters or items'
  worth of them, and a whole number at most `_MAX_BITS` bits;
- a rendering has a budget of work: each pass of a loop, each call and each character costs some.

Operators, calls, filters and tests are checked where the sandbox of Jinja lets them be. The rest
(loops, `~`, lists, comparisons, slices) is wrapped in filters when a template is compiled. What
could be large is checked before it is made.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from plad_dist.untrusted import check_depth

MAX_SIZE = 8 << 20  # characters; the longest contexts of models have fewer
_MAX_BITS = 4096
_WORK, _WORK_PER_CHARACTER = 128 << 20, 1024
_STEP = 128  # work of a call or of a pass of a loop
_ITEM = 16  # size of an item of a list beside its contents
_SLOW = {"pprint": 32, "striptags": 32, "truncate": 2, "urlize": 64, "wordwrap": 64, "xmlattr": 8}
_MOST_ROWS, _MOST_DIGITS = 100_000, 100
# Filters and methods that look at no more than the beginning or the length of what they get.
_SHALLOW = {"length", "count", "first", "last", "default", "d", "items", "map", "select", "reject", "selectattr"}
_CONTAINERS = (list, tuple, set, frozenset)


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template needs more time or memory than any text for a model does."""


class _Budget(threading.local):
    """Work that is left to the rendering of this thread, None outside of one."""

    left: int | None = None


_BUDGET = _Budget()


@contextmanager
def _rendering(variables: Mapping[str, Any]) -> Iterator[None]:
    """Give the template that is rendered its budget of work, which grows with what it renders."""
    before, _BUDGET.left = _BUDGET.left, _WORK + _WORK_PER_CHARACTER * _size(variables)
    try:
        yield
    except RecursionError:
        raise TemplateLimitError("the template calls itself too often") from None
    except MemoryError:
        raise TemplateLimitError("the template needs too much memory") from None
    finally:
        _BUDGET.left = before


def _spend(work: int) -> None:
    if _BUDGET.left is not None:
        _BUDGET.left -= abs(work)
        if _BUDGET.left < 0:
            raise TemplateLimitError("the template does more work than a text for a model needs; simplify it")


def _require(size: int, limit: int = MAX_SIZE) -> int:
    """Return a size that is within a limit, which is also an amount of work."""
    if size > limit:
        raise TemplateLimitError(f"the template makes a value that is too large: {size:.3g}, the limit is {limit:,}")
    return size


def _size(value: Any) -> int:
    """Return the size of a value with all its contents."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, range):
            total += _ITEM * len(item)
        elif isinstance(item, int):
            total += 1 + (item.bit_length() >> 3)
        elif isinstance(item, Mapping):
            total += _ITEM * (1 + len(item))
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, _CONTAINERS):
            total += _ITEM * (1 + len(item))
            pending += item
        elif isinstance(item, Namespace):
            total += _ITEM
            pending.append(object.__getattribute__(item, "_Namespace__attrs"))
        else:
            total += _ITEM
        _require(total)
    return total


def _length(value: Any) -> int:
    """Return the size of a value without the contents of its items."""
    if isinstance(value, str | bytes):
        return len(value)
    return _ITEM * len(value) if isinstance(value, (*_CONTAINERS, Mapping, range)) else _ITEM


def _checked(value: Any) -> Any:
    """Return a new value that is not too large, and spend the work of making it."""
    if isinstance(value, int) and not isinstance(value, bool):
        _require(value.bit_length(), _MAX_BITS)
    elif isinstance(value, str | bytes):
        _spend(_require(len(value)))
    elif isinstance(value, (*_CONTAINERS, Mapping, Namespace)):
        _spend(_size(value))
    return value


def _whole_numbers(values: Iterable[Any]) -> int:
    """Return the sum of the whole numbers among values, also in lists and mappings."""
    total = 0
    for value in values:
        if isinstance(value, int):
            total += abs(value)
        elif isinstance(value, (*_CONTAINERS, Mapping)):
            total += _whole_numbers(value.values() if isinstance(value, Mapping) else value)
    return total


def _widths(form: Any) -> int:
    """Return the sum of the numbers in a format, each of which may be a width."""
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    digits = re.findall(r"\d+", text) if isinstance(text, str) else []
    return sum(int(number) if len(number) < 12 else 10**12 for number in digits)


# -- operators


def _operator(symbol: str, left: Any, right: Any) -> None:
    """Check an operation before it is carried out."""
    if isinstance(left, int) and isinstance(right, int):
        if symbol == "*":
            _require(left.bit_length() + right.bit_length(), _MAX_BITS)
        elif symbol == "**":
            _require(left.bit_length() * abs(right), _MAX_BITS)
        return
    match symbol:
        case "*":
            sequence, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(count, int):
                _spend(_require(_size(sequence) * max(0, count)))
        case "%" if isinstance(left, str | bytes):
            has_stars = b"*" in left if isinstance(left, bytes) else "*" in left
            numbers = _whole_numbers([right]) if has_stars else 0
            _spend(_require(len(left) + _widths(left) + numbers + _size(right)))
        case _:
            _spend(_require(_length(left) + _length(right)))


# -- calls of methods and functions


def _check_call(function: Any, arguments: list[Any]) -> list[Any]:
    """Check a call before it is carried out, and return the arguments to use."""
    _spend(_STEP)
    if isinstance(function, Macro):
        return arguments
    _spend(sum(map(_size, arguments)))
    method = getattr(function, "__wrapped__", function) if callable(function) else function  # of `format`
    if not isinstance(method, BuiltinMethodType | MethodType):
        return arguments
    owner, name = method.__self__, method.__name__
    _spend(_length(owner))
    if isinstance(owner, str | bytes):
        return _check_text_method(name, owner, arguments)
    if isinstance(owner, int):
        _require(_whole_numbers(arguments))  # of bytes to convert it to
    return arguments


def _check_text_method(name: str, text: Any, arguments: list[Any]) -> list[Any]:
    """Check a method of a text, as :func:`_check_call`."""
    numbers = _whole_numbers(arguments)
    made = len(text)
    match name, arguments:
        case ("replace", [old, new, *_]) if isinstance(old, type(text)) and isinstance(new, type(text)):
            made += text.count(old) * len(new)
        case "join", [items, *_]:
            arguments = [items := _listed(items), *arguments[1:]]
            made = made * len(items) + _size(items) if hasattr(items, "__len__") else 0
        case "expandtabs", _:
            made += text.count(b"\t" if isinstance(text, bytes) else "\t") * max(8, numbers)
        case "translate", [table, *_] if isinstance(table, Mapping):
            made *= max((_length(value) for value in table.values()), default=1)
        case "format" | "format_map", _:
            has_nested = re.search(r":[^{}]*\{", str(text)) is not None
            made += _widths(text) + numbers * has_nested + _size(arguments)
        case _:
            made += numbers
    _spend(_require(made))
    return arguments


def _listed(items: Any) -> Any:
    """Return the items of a generator as a list: the pieces are made and paid for one by one."""
    return list(items) if isinstance(items, Iterator) else items


# -- filters and tests


def _check_filter(name: str, arguments: list[Any]) -> list[Any]:
    """Check a filter before it is applied, and return the arguments to use, the value first."""
    value: Any = arguments[0] if arguments else None
    rest = arguments[1:]
    numbers = _whole_numbers(rest)
    if name == "join":
        value = _listed(value)
        arguments = [value, *rest]
    size = _length(value) if name in _SHALLOW else _size(value)
    _spend(_STEP + size * _SLOW.get(name, 1) + sum(map(_length, rest)))
    text = value if isinstance(value, str) else ""
    pieces = [piece for piece in rest if isinstance(piece, str)]
    longest = max(map(len, pieces), default=0)
    match name:
        case "center":
            _spend(_require(size + numbers))
        case "indent":
            _spend(_require(size + (text.count("\n") + 1) * max(numbers, longest)))
        case "replace" if len(pieces) == 2:
            _spend(_require(size + str(value).count(pieces[0]) * len(pieces[1])))
        case "join" if hasattr(value, "__len__"):
            _spend(_require(size + len(value) * longest))
        case "format":
            _spend(_require(size + _widths(text) + numbers * text.count("*") + _size(rest)))
        case "wordwrap" | "urlize":
            _spend(_require(size + len(text.split()) * longest + len(text) * longest * (name == "wordwrap")))
        case "tojson" | "pprint" | "string":
            _check_depth(value)
            _spend(_require(size * max(1, numbers), 4 * MAX_SIZE))
        case "slice" | "batch":
            _require(numbers, _MOST_ROWS)
        case "round":
            _require(numbers, _MOST_DIGITS)
        case "sum" if any(not isinstance(start, int | float | str | None) for start in rest):
            raise TemplateLimitError("the filter `sum` adds numbers only")
    return arguments


def _check_depth(value: Any) -> None:
    """Refuse to show a list or mapping that is nested too deeply."""
    try:
        check_depth(value)
    except ValueError as error:
        raise TemplateLimitError(f"the template shows a value that is {error}") from None


def _bounded(name: str, function: Callable[..., Any], check: Callable[[str, list[Any]], list[Any]]) -> Any:
    """Return a filter or a test with its checks."""
    skipped = int(hasattr(function, "jinja_pass_arg"))  # the context or environment that it gets first

    @wraps(function)
    def bounded(*arguments: Any, **options: Any) -> Any:
        values = check(name, [*arguments[skipped:], *options.values()])
        given = len(arguments) - skipped
        result = function(*arguments[:skipped], *values[:given], **options)
        return _checked(result)

    bounded.is_bounded = True  # type: ignore[attr-defined]
    return bounded


def _check_test(name: str, arguments: list[Any]) -> list[Any]:
    _spend(_STEP + sum(map(_length if name != "in" else _size, arguments)))
    return arguments


# -- what the compiler writes

_TICK, _NEW, _READ, _WALK = (
    "bounds tick",
    "bounds new",
    "bounds read",
    "bounds walk",
)  # a template cannot write these names


@jinja2.pass_context
def _tick(context: Any, work: int) -> str:
    _spend(_STEP + work)
    return ""


def _read(value: Any) -> Any:
    """Return a value that an operation reads as a whole."""
    _spend(_ITEM + (0 if isinstance(value, Undefined) else _size(value)))
    return value


def _walk(value: Any) -> Any:
    """Return a value whose items an operation visits or copies."""
    _spend(_length(value))
    return value


def _new(value: Any) -> Any:
    """Return a value that an expression has made."""
    return _checked(value)


_OURS = {_TICK: _tick, _NEW: _new, _READ: _read, _WALK: _walk}


class _Bounds(NodeTransformer):
    """Adds filters that check what the sandbox of Jinja does not let be checked."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._visit_body(node)

    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def _visit_body(self, node: Any) -> nodes.Node:
        data = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        self.generic_visit(node)
        if isinstance(node, nodes.For):
            node.iter = _filtered(node.iter, _WALK)
        tick = nodes.Output([_filtered(nodes.Const(data), _TICK)], lineno=node.lineno)
        node.body = [tick, *node.body]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        return _filtered(self.generic_visit(node), _NEW)

    def visit_List(self, node: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        is_plain = getattr(node, "ctx", "load") != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if is_plain else _filtered(node, _NEW)

    visit_Tuple = visit_Dict = visit_List

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        operands: list[Any] = [node, *node.ops]
        for operand in operands:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _filtered(operand.expr, _READ)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, _WALK)
        return node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _BoundedTemplate(jinja2.Template):
    """Template whose renderings have a budget."""

    def render(self, *arguments: Any, **variables: Any) -> str:
        with _rendering(dict(*arguments, **variables)):
            text = super().render(*arguments, **variables)
            _require(len(text))
        return text


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Sandbox whose templates are bounded in time and memory.

    A template that exceeds a bound raises :class:`TemplateLimitError`, a `jinja2.TemplateError`.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    template_class = _BoundedTemplate

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.filters |= _OURS
        self.globals.pop("lipsum", None)  # text at random, of any length
        self.finalize = _shown

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _operator(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        values = _check_call(__obj, [*args, *kwargs.values()])
        return _checked(super().call(__context, __obj, *values[: len(args)], **kwargs))

    def compile_expression(self, source: str, undefined_to_none: bool = True) -> Any:
        expression = super().compile_expression(source, undefined_to_none)

        def bounded(*arguments: Any, **variables: Any) -> Any:
            with _rendering(dict(*arguments, **variables)):
                return expression(*arguments, **variables)

        return bounded

    def compile(self, *arguments: Any, **options: Any) -> Any:
        with _compiling():
            return super().compile(*arguments, **options)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        with _compiling():
            return super()._parse(source, name, filename)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        for functions, check in ((self.filters, _check_filter), (self.tests, _check_test)):
            for name, function in list(functions.items()):
                if name not in _OURS and not hasattr(function, "is_bounded"):
                    functions[name] = _bounded(name, function, check)
        tree = _Bounds().visit(source)
        tree.set_environment(self)
        return super()._generate(tree, *arguments, **options)


def _shown(value: Any) -> Any:
    """Return a value that becomes a part of the text."""
    if not isinstance(value, Undefined):
        if not isinstance(value, str):
            _check_depth(value)
        _spend(_STEP + _size(value))
    return value


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except (RecursionError, MemoryError, SyntaxError):  # of the Python code that Jinja writes
        raise jinja2.TemplateError("the template is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise jinja2.TemplateError(str(error)) from None
