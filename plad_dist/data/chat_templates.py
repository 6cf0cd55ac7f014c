"""Jinja templates that render a conversation to the text of a prompt, as transformers does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import jinja2
from jinja2 import nodes

from plad_dist.compat.transformers import compile_chat_template, render_chat_template
from plad_dist.config import Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.sources import JINJA_ERRORS
from plad_dist.errors import UserError

_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", *_SPECIAL_TOKENS)
_OF_JINJA = {"loop", "caller", "varargs", "kwargs", "self"}
# Fields that some messages have and others lack.
_OPTIONAL_FIELDS = {"name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}
_RESEMBLES = 0.8  # ratio of difflib from which a name is taken for a misspelt one


@dataclass(frozen=True)
class ChatTemplate:
    """A template with everything that it reads besides a conversation.

    Attributes:
        text: Jinja source.
        name: model or config key, for messages.
        variables: special tokens of the tokenizer, and `template_kwargs` of the config.
        today: date that the template reads from the clock.
    """

    text: str
    name: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)

    def render(self, prompt: Conversation, *, add_generation_prompt: bool = True) -> str:
        """Return the text of a prompt.

        Args:
            add_generation_prompt: end with what precedes a response.

        Raises:
            UserError: the template cannot render the prompt.
        """
        try:
            return render_chat_template(
                self.text,
                prompt.messages,
                prompt.tools,
                add_generation_prompt=add_generation_prompt,
                variables=self.variables,
                today=self.today,
            )
        except JINJA_ERRORS as error:
            raise UserError(f"template of {self.name}: cannot render {prompt.messages!r:.80}: {error}") from None

    @property
    def reads_clock(self) -> bool:
        """True if the text may depend on the date."""
        return reads_clock(self.text)

    @property
    def has_generation_prompt(self) -> bool:
        """True if the template tells a prompt from a finished conversation."""
        return "add_generation_prompt" in self.text

    def unused(self, names: Mapping[str, Any]) -> list[str]:
        """Return the names of variables that the template never mentions."""
        return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", self.text)]


def reads_clock(text: str) -> bool:
    """Return True if the text of a template asks for the date."""
    return "strftime_now" in text


def config_template(settings: Model, name: str, variables: Mapping[str, Any] | None = None) -> ChatTemplate:
    """Return the template that a config gives a model, checked.

    Args:
        settings: section of the model, which has a template.
        name: model or config key, for messages.
        variables: special tokens of the tokenizer; None if it is not known.

    Raises:
        UserError: the template is invalid, uses a variable that nothing sets, or prints a field
            that no message has.
    """
    assert settings.template is not None
    variables = {**(variables or {}), **settings.template_kwargs}
    check_template(settings.template, name, tuple(settings.template_kwargs))
    return ChatTemplate(settings.template, name, variables, settings.today)


def check_template(text: str, name: str, more: tuple[str, ...] = ()) -> None:
    """Check a template of the config.

    transformers takes a name that nothing sets for an empty text. Here such a name is refused, so
    that a misspelt one does not silently empty all prompts. A name counts as optional, as in many
    chat templates, if the template tests whether it is defined, gives it a default, or uses it as a
    condition.

    Args:
        more: variables that the config adds.

    Raises:
        UserError: the template is invalid, uses a variable that nothing sets, or prints a field
            that no message has.
    """
    try:
        environment = compile_chat_template(text).environment
        tree = environment.parse(text)
    except jinja2.TemplateError as error:
        raise UserError(f"template of {name}: not a valid Jinja template: {error}") from None
    known = (*_VARIABLES, *more)
    if unknown := sorted(_unknown_names(tree, {*known, *environment.globals})):
        similar = difflib.get_close_matches(unknown[0], known, 1, _RESEMBLES)
        hint = f"; meant {similar[0]}?" if similar else ""
        raise UserError(
            f"template of {name}: unknown variable {', '.join(unknown)}; the variables are `messages`, `tools`, "
            f"`add_generation_prompt`, special tokens such as `bos_token`, and the names in `template_kwargs`{hint}"
        )
    if missing := _missing_fields(environment, text):
        raise UserError(
            f"template of {name}: prints {', '.join(f'`{name}`' for name in missing)} of a message, which has `role` "
            "and `content`; correct the name"
        )


def _unknown_names(tree: nodes.Template, known: set[str]) -> set[str]:
    """Return the names that a template reads although nothing sets them."""
    names = list(tree.find_all(nodes.Name))
    set_here = {node.name for node in names if node.ctx != "load"} | {node.name for node in tree.find_all(nodes.Macro)}
    unset = {node.name for node in names if node.ctx == "load"} - set_here - known - _OF_JINJA
    tested = {node.node.name for node in tree.find_all(nodes.Test) if isinstance(node.node, nodes.Name)}
    defaults = {
        node.node.name
        for node in tree.find_all(nodes.Filter)
        if node.name in ("default", "d") and isinstance(node.node, nodes.Name)
    }
    tests = [node.test for node in tree.find_all(nodes.If)] + [node.test for node in tree.find_all(nodes.CondExpr)]
    conditions = {
        name
        for test in tests
        for name in _bare_names(test)
        if not difflib.get_close_matches(name, known, 1, _RESEMBLES)
    }
    return unset - tested - defaults - conditions


def _bare_names(condition: nodes.Node) -> Iterator[str]:
    """Yield the names that are operands of a condition as they are."""
    match condition:
        case nodes.Name():
            yield condition.name
        case nodes.Not():
            yield from _bare_names(condition.node)
        case nodes.And() | nodes.Or():
            yield from _bare_names(condition.left)
            yield from _bare_names(condition.right)


def _missing_fields(environment: jinja2.Environment, text: str) -> list[str]:
    """Return the fields that a template prints of a plain message although it lacks them."""
    missing: dict[str, None] = {}

    class Recorder(jinja2.Undefined):
        def __str__(self) -> str:
            owner, name = self._undefined_obj, self._undefined_name
            if isinstance(owner, dict) and "role" in owner and name not in _OPTIONAL_FIELDS:
                missing[str(name)] = None
            return ""

    template = environment.overlay(undefined=Recorder).from_string(text)
    try:
        template.render(
            messages=[{"role": "user", "content": "probe"}],
            tools=None,
            add_generation_prompt=True,
            strftime_now=lambda form: form,
        )
    except JINJA_ERRORS:
        return []  # it needs another conversation; the prompts will show
    return list(missing)
