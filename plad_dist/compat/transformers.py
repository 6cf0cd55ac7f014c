"""Chat templates as the library transformers compiles and renders them.

Written for transformers 5.23. Relies on `transformers/utils/chat_template_utils.py`:

- `render_jinja_template` renders conversations as `tokenizer.apply_chat_template` does;
- `ImmutableSandboxedEnvironment` of the module is the class in which templates are compiled; a
  subclass that bounds time and memory takes its place;
- `_compile_jinja_template` returns the cached template that this function renders, whose `globals`
  can be set. Templates read the clock by a global `strftime_now`, which has no other way in.

The names and parameters are checked when they are first used, because importing transformers takes
seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import cache
from typing import Any

import jinja2

from plad_dist.bounded_templates import BoundedEnvironment
from plad_dist.compat.assumptions import Assumptions

EXPECTED_VERSION = "5.23.0"


@cache
def _library() -> Any:
    """Return the module of the library, checked."""
    from transformers.utils import chat_template_utils

    assume = Assumptions("transformers", EXPECTED_VERSION)
    assume.parameters(assume.attribute(chat_template_utils, "_compile_jinja_template"), "chat_template")
    # The class of the environment in which the library compiles all templates.
    assume.attribute(chat_template_utils, "ImmutableSandboxedEnvironment")
    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
    render = assume.attribute(chat_template_utils, "render_jinja_template")
    assume.starts_with_parameters(render, "conversations", "tools", "documents", "chat_template")
    return chat_template_utils


def compile_chat_template(text: str) -> jinja2.Template:
    """Return the compiled template. Raise a `jinja2.TemplateError` if it is invalid."""
    template: jinja2.Template = _library()._compile_jinja_template(text)
    return template


def render_chat_template(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    today: date,
) -> str:
    """Return the text of a conversation, as `tokenizer.apply_chat_template` would.

    Args:
        variables: special tokens of the tokenizer, and further variables of the template.
        today: date that the template reads from the clock, at midnight.

    Raises:
        Exception: a `jinja2.TemplateError`, or whatever an expression of the template raises.
    """
    compile_chat_template(text).globals["strftime_now"] = datetime.combine(today, time()).strftime
    # As the library does: many templates take a field that is null for one that has a value.
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    rendered, _ = _library().render_jinja_template(
        [given],
        tools=None if tools is None else list(tools),
        chat_template=text,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return str(rendered[0])
