"""The libraries' chat templates and parsers of thoughts are found where this package looks."""

from __future__ import annotations

from datetime import date

import pytest

from plad_dist.compat.transformers import render_chat_template
from plad_dist.compat.vllm import reasoning_parser_names
from plad_dist.errors import UserError
from plad_dist.preflight import _check_reasoning_parser


def test_a_template_gets_the_date_that_it_is_given_each_time() -> None:
    text = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    for day in (date(2026, 1, 31), date(2027, 2, 1)):
        rendered = render_chat_template(
            text, [{"role": "user", "content": "hi"}], None, add_generation_prompt=True, variables={}, today=day
        )
        assert rendered == f"{day} hi"


def test_a_reasoning_parser_that_vllm_lacks_is_refused_with_those_that_it_has() -> None:
    assert {"deepseek_r1", "qwen3"} <= reasoning_parser_names()
    _check_reasoning_parser("qwen3")
    with pytest.raises(UserError, match=r"'qwen4': vLLM has no such parser; it has .*deepseek_r1.*qwen3"):
        _check_reasoning_parser("qwen4")
