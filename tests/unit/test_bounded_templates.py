"""No template holds up or fills a machine, and templates of real models render as before."""

# ruff: noqa: E501 - templates

from __future__ import annotations

import contextlib
import resource
import time
from typing import Any

import jinja2
import jinja2.sandbox
import pytest

from plad_dist.bounded_templates import MAX_SIZE, BoundedEnvironment
from plad_dist.data.chat_templates import ChatTemplate
from plad_dist.data.conversation import Conversation
from plad_dist.errors import UserError

# Each of these needs minutes or gigabytes without bounds.
HOSTILE = [
    "{{ 'a' * 10**14 }}", "{{ 10**14 * 'a' }}", "{{ [0] * 10**12 }}", "{{ ('a' * 10**6) * 10**6 }}",
    "{{ 9**(9**7) }}", "{{ (9**(9**7))|string|length }}", "{{ 2**(2**40) }}", "{{ (10**4000) * (10**4000) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%.1000000000f' % 1.0 }}",
    "{{ '%1000000000d'|format(1)|length }}", "{{ '%*d'|format(10**9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}", "{{ '{x:>{w}}'.format(x=1, w=10**9) }}",
    "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "{{ 'a'|center(10**10) }}", "{{ 'a'.center(10**10) }}", "{{ 'a'.ljust(10**10) }}", "{{ 'a'.rjust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}", "{{ '\t'.expandtabs(10**10) }}", "{{ 'a'.encode().center(10**10) }}",
    "{{ 'a\na'|indent(10**10) }}", "{{ ('a\n' * 10**6)|indent(10**6) }}", "{{ ('a\n' * 10**6)|indent('x' * 10**6) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}", "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}", "{{ ('b' * 10**6).join('a' * 10**6) }}",
    "{{ ('a' * 10**6)|join('b' * 10**6) }}", "{{ range(99999)|map('center', 10**6)|join }}",
    "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}", "{{ (5).to_bytes(10**11, 'big') }}",
    "{{ ''.join(range(99999)|map('string')|map('center', 10**6)) }}", "{{ ('x' * 10**6).join(range(99999)|map('string')) }}",
    "{{ range(10**9)|list|length }}", "{{ range(10**12)|sum }}", "{{ lipsum(n=10**9) }}", "{{ [1]|slice(10**9)|list }}",
    "{{ 1.5|round(10**9, 'ceil') }}", "{{ range(99999)|map('string')|map('list')|sum(start=[]) }}",
    "{{ [1, 2]|tojson(indent=10**9) }}", "{{ ('a ' * 10**6)|wordwrap(1, wrapstring='b' * 10**6) }}",
    "{% for a in range(10**5) %}{% for b in range(10**5) %}{% for c in range(10**5) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(10**5) %}{% for b in range(10**5) %}x{% endfor %}{% endfor %}",
    "{% for a in range(10**5) %}{% for b in range(10**5) if b < 0 %}x{% endfor %}{% endfor %}",
    "{% for a in range(10**5) %}" + "x" * 10**5 + "{% endfor %}",
    "{% for a in range(10**5) %}{{ 'x' * 10**5 }}{% endfor %}",
    "{% for a in range(10**5) %}{% if a in range(10**5)|list %}{% endif %}{% endfor %}",
    "{% set x = 'x' * 10**6 %}{% for a in range(10**5) %}{% set y = x[1:] %}{% endfor %}",
    "{% set x = 'x' * 10**6 %}{% for a in range(10**5) %}{% if x == x ~ 'a' %}{% endif %}{% endfor %}",
    "{% set x = 'x' * 10**6 %}{% for a in range(10**5) %}{% if x.upper() %}{% endif %}{% endfor %}",
    "{% set x = 'x' * 10**6 %}{% for a in range(10**5) %}{% if x is lower %}{% endif %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x|string }}",
    "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=7) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ messages[0].content.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ ''|attr('__class__') }}", "{{ '{0.__class__}'.format(1) }}",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_template_that_needs_too_much_is_refused_at_once(text: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}" + text, "teacher.template")
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if "__" in text:  # what is not shown of an object is empty
        with contextlib.suppress(UserError):
            assert template.render(Conversation([{"role": "user", "content": "x"}])) == "x"
    else:
        with pytest.raises(UserError, match=r"template of teacher\.template: cannot render"):
            template.render(Conversation([{"role": "user", "content": "x"}]))
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


@pytest.mark.parametrize(
    "text", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if a %}" * 3000 + "{% endif %}" * 3000,
             "{% for a in [a] %}" * 30 + "{% endfor %}" * 30, "{{ " + "9" * 5000 + " }}", "{{ " + "-" * 5000 + "1 }}"],
)  # fmt: skip
def test_a_template_that_cannot_be_compiled_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="template of m"):
        ChatTemplate(text, "m").render(Conversation([{"role": "user", "content": "x"}]))


@pytest.mark.parametrize(
    "text", ["'a' * 10**14", "9**(9**7)", "range(10**9)|list", "meta.x.__class__", "'a'|center(10**10)"]
)
def test_expressions_of_filters_are_bounded(text: str) -> None:
    expression = BoundedEnvironment(undefined=jinja2.StrictUndefined).compile_expression(text, undefined_to_none=False)
    with pytest.raises((jinja2.TemplateError, OverflowError)):
        str(expression(meta={"x": 1}))


CHAT = """{%- set ns = namespace(first=true, system='') -%}
{%- macro show(tool, depth=0) -%}{{ '  ' * depth }}- {{ tool.name }}: {{ tool.parameters | tojson(indent=2) }}{%- endmacro -%}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m['content'] | trim %}{% endfor -%}
{{ bos_token }}{{ ns.system ~ '\\n' if ns.system }}
{%- if tools is defined and tools %}{% for t in tools %}{{ show(t, loop.index0) }}{% if not loop.last %}, {% endif %}{% endfor %}{% endif -%}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) and false %}{{ raise_exception('roles') }}{% endif %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') if m.content is string else m.content | map(attribute='text') | join('') %}
{{- '<|' + m.role + '|>' + content | replace('a', 'b') | indent(2) }} {{ '%s-%03d' % (m.role, loop.index) }}
{{- loop.length }}{{ loop.revindex }}{{ loop.previtem.role if loop.previtem is defined }}{{ messages[::-1][0].role }}
{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
{%- for key, value in m | dictsort %}{{ key }}{% endfor %}{% if loop.index > 50 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{{ [1, messages | length, {'a': bos_token}] }}{{ 2 ** 10 }}"""


def test_templates_render_as_in_the_plain_sandbox() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": " sys "},
        {"role": "user", "content": "a\n<b> ü"},
        {"role": "assistant", "content": "x</think>\nay", "tool_calls": [{"name": "f", "arguments": {"a": [1, None]}}]},
        {"role": "user", "content": [{"type": "text", "text": "part"}]},
    ]
    variables = {
        "tools": [{"name": "f", "parameters": {"p": 1.5}}] * 3,
        "bos_token": "<s>",
        "add_generation_prompt": True,
    }
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    texts = [
        environment(**options).from_string(CHAT).render(messages=messages, **variables)
        for environment in (jinja2.sandbox.ImmutableSandboxedEnvironment, BoundedEnvironment)
    ]
    assert texts[0] == texts[1]
    assert "<|assistant|>" in texts[1]


def test_long_conversations_are_rendered() -> None:
    environment = BoundedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    messages = [{"role": "user", "content": "word " * 1000}] * 1000
    text = environment.from_string(CHAT.replace("> 50", "> 5000")).render(messages=messages, bos_token="")
    assert 5_000_000 < len(text) < MAX_SIZE


def test_a_result_has_a_largest_size() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].content }}", "m")
    with pytest.raises(UserError, match=r"too large: 1.04e\+07, the limit is 8,388,608"):
        template.render(Conversation([{"role": "user", "content": "x" * 5_200_000}]))


def test_a_template_may_build_the_text_of_a_long_conversation_piece_by_piece() -> None:
    template = BoundedEnvironment(extensions=["jinja2.ext.loopcontrols"]).from_string(
        "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + m.content %}"
        "{% if m in messages %}{% endif %}{% endfor %}{{ ns.text }}"
    )
    messages = [{"role": "user", "content": "x" * 2000} for _ in range(300)]
    assert len(template.render(messages=messages)) == 600_000
