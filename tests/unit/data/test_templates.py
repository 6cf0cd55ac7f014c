"""Rendering of prompts and responses to tokens."""

from __future__ import annotations

import json
import re
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from plad_dist.config import Model
from plad_dist.data.chat_templates import ChatTemplate, check_template
from plad_dist.data.conversation import Conversation
from plad_dist.data.model_checks import template_warnings
from plad_dist.data.templates import PROBE, Renderer
from plad_dist.errors import UserError
from tests.tiny import TEMPLATE, make_random_model
from tests.tiny_generators import make_generator

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIPPED = {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
    for file in files("trl.chat_templates").iterdir()
    if file.name.endswith(".jinja")
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CONVERSATIONS = {
    "plain": Conversation([{"role": "user", "content": "what is <b>2</b>?"}]),
    "turns": Conversation(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1", "reasoning_content": "the first"},
            {"role": "user", "content": "two "},
        ]
    ),
    "tools": Conversation(
        [
            {"role": "user", "content": "weather in Oslo"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}],
            },
            {"role": "tool", "name": "weather", "content": "grey"},
            {"role": "user", "content": "in a word"},
        ],
        tools=[TOOL],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_random_model(tmp_path_factory.mktemp("models") / "plain"))


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """Return a chat model that ends a turn with another token than end-of-sequence."""
    return with_chat_template(tmp_path / "chat", CHAT, "<|end|>")


def with_chat_template(folder: Path, template: str, *special: str) -> Path:
    """Write a random model with a chat template, whose responses may end with the last token."""
    make_random_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in special[-1:])]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def renderer_of(folder: Path, **settings: Any) -> Renderer:
    return Renderer(str(folder), Model(path=str(folder), **settings))


# -- the end of a response


def test_responses_end_as_the_chat_template_ends_a_turn(chat_model: Path) -> None:
    renderer = renderer_of(chat_model)
    end = renderer.tokenizer.convert_tokens_to_ids("<|end|>")
    assert [ids[-1] for ids in renderer.response_ids(["one", "two"])] == [end, end]


def test_responses_end_as_a_chat_template_of_the_config_ends_a_turn(chat_model: Path) -> None:
    renderer = renderer_of(chat_model, template=CHAT)
    assert renderer.end_id == renderer.tokenizer.convert_tokens_to_ids("<|end|>")


def test_responses_end_with_end_of_sequence_if_the_config_has_a_template_of_prompts(chat_model: Path) -> None:
    renderer = renderer_of(chat_model, template=TEMPLATE)
    assert renderer.response_ids(["one"])[0][-1] == renderer.tokenizer.eos_token_id


def test_responses_end_with_end_of_sequence_if_the_turn_ends_with_no_end_token_of_the_model(chat_model: Path) -> None:
    (chat_model / "generation_config.json").unlink()
    renderer = renderer_of(chat_model)
    assert renderer.response_ids(["one"])[0][-1] == renderer.tokenizer.eos_token_id


def decoded(renderer: Renderer, prompt: Conversation) -> str:
    return str(renderer.tokenizer.decode(renderer.prompt_ids([prompt])[0], skip_special_tokens=True)).strip()


def test_templates_get_tools_and_whole_messages(chat_model: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"town": "Graz"}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": "ho"},
    ]
    prompt = Conversation(messages, [{"name": "weather"}])
    text = "{% for m in messages %}{{ m.content or '' }}{{ m.get('tool_calls', '') }}{% endfor %}{{ tools }}"
    expected = f"hi{[call]}ho{prompt.tools}"
    by_config = Renderer(str(chat_model), Model(path=str(chat_model), template=text))
    assert decoded(by_config, prompt) == expected
    by_model = Renderer(str(chat_model), Model(path=str(chat_model)))
    by_model.tokenizer.chat_template = text
    assert decoded(by_model, prompt) == expected


@pytest.mark.parametrize("is_configured", [True, False])
def test_a_turn_without_text_is_rendered_as_an_empty_one(chat_model: Path, is_configured: bool) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    settings = Model(path=str(chat_model), template=template if is_configured else None)
    renderer = Renderer(str(chat_model), settings)
    renderer.tokenizer.chat_template = template
    turns = [("user", "hi"), ("assistant", None), ("user", "None of it")]
    prompt = Conversation([{"role": role, "content": content} for role, content in turns])
    assert decoded(renderer, prompt) == "[hi][][None of it]"


# -- as the library renders


@pytest.mark.parametrize("thinks", [None, True, False])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_templates_render_as_in_the_library(
    tokenizer: Any, name: str, add_generation_prompt: bool, thinks: bool | None
) -> None:
    variables = {} if thinks is None else {"enable_thinking": thinks}
    template = ChatTemplate(SHIPPED[name], name, {**tokenizer.special_tokens_map, **variables})
    rendered = 0
    for conversation in CONVERSATIONS.values():
        try:
            expected = tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                chat_template=SHIPPED[name],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError):
            continue  # such as a template that takes no system message
        assert template.render(conversation, add_generation_prompt=add_generation_prompt) == expected
        rendered += 1
    assert rendered


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_templates_are_accepted_as_the_template_of_a_config(name: str) -> None:
    check_template(SHIPPED[name], "student")


def test_a_template_of_the_config_renders_as_the_chat_template(chat_model: Path) -> None:
    template = (
        "{% for message in messages %}\n    {% if message.role == 'user' %}\n[USER] {{ message.content }}\n"
        "    {% else %}\n[BOT] {{ message.content | tojson }}\n    {% endif %}\n{% endfor %}\n[BOT]"
    )
    renderer = renderer_of(chat_model, template=template)
    for conversation in (CONVERSATIONS["plain"], CONVERSATIONS["turns"]):
        expected = renderer.tokenizer.apply_chat_template(
            conversation.messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert renderer.prompt_text(conversation) == expected


def test_template_kwargs_reach_the_template(chat_model: Path) -> None:
    template = CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}"
    on, off = (
        renderer_of(chat_model, template=template, template_kwargs=kwargs)
        for kwargs in ({}, {"enable_thinking": False})
    )
    assert off.prompt_text(PROBE) == on.prompt_text(PROBE) + "<think></think>"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ mesages[-1].content }}", r"unknown variable mesages; .*meant messages\?"),
        (
            "{{ messages[-1].content }}{% if add_generation_promt %}A:{% endif %}",
            "unknown variable add_generation_promt",
        ),
        ("{{ messages[-1].contnt }} =", "prints `contnt` of a message"),
        ("{{ messages[-1", "not a valid Jinja template"),
    ],
)
def test_a_misspelt_name_in_a_template_is_refused(template: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"template of student: .*{problem}"):
        check_template(template, "student")


# -- the clock


def test_a_template_that_reads_the_clock_gets_the_date_of_the_run(chat_model: Path) -> None:
    settings = Model(path=str(chat_model), template="{{ strftime_now('%d %b %Y') }} {{ messages[-1].content }}")
    settings._date = date(2026, 1, 31)
    assert Renderer(str(chat_model), settings).prompt_text(PROBE) == "31 Jan 2026 question"


# -- warnings


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        (CHATML, None),
        (
            CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"),
            r"no generation prompt: '<\|im_start\|>assistant",
        ),
        (CHATML.replace("assistant\n{% endif %}", "assistant{% endif %}"), r"puts '\\n' before a response"),
        (CHATML.replace("{% for", "{{ messages | length }}{% for"), "does not begin with the rendered prompt.*'3.*'4"),
        (CHATML.replace("<|im_end|>", "!"), "which is not the token"),
        (CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}", None),
    ],
)
def test_a_template_whose_prompt_does_not_begin_the_conversation_is_warned_of(
    tmp_path: Path, template: str, warning: str | None
) -> None:
    folder = with_chat_template(tmp_path / "m", template, "<|im_start|>", "<|im_end|>")
    settings = Model(path=str(folder))
    warnings = "\n".join(template_warnings(Renderer(str(folder), settings), settings))
    if warning is None:
        assert warnings == ""
    else:
        assert re.search(warning, warnings)


def test_a_template_kwarg_that_the_template_does_not_use_is_warned_of(chat_model: Path) -> None:
    settings = Model(path=str(chat_model), template_kwargs={"enable_thinkng": False})
    warning = next(template_warnings(Renderer(str(chat_model), settings), settings))
    assert "no variable named enable_thinkng" in warning


def test_the_prompt_of_an_encoder_is_a_whole_text(tmp_path: Path) -> None:
    """T5 was trained on texts with the token that its tokenizer appends."""
    question = Conversation([{"role": "user", "content": "larger of 1 and 2"}])
    for family, is_whole in (("t5", True), ("llama", False)):
        folder = make_generator(tmp_path / family, family)
        renderer = Renderer(str(folder), Model(path=str(folder), template=TEMPLATE))
        [ids] = renderer.prompt_ids([question])
        whole = renderer.tokenizer(renderer.prompt_text(question))["input_ids"]
        assert whole[-1] == renderer.end_id
        assert ids == (whole if is_whole else whole[:-1])


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("template", [TEMPLATE, "{{ messages[-1].content }} ={{ eos_token }}"])
def test_a_standalone_template_writes_the_tokens_that_the_tokenizer_adds(
    tmp_path: Path, family: str, template: str
) -> None:
    folder = make_generator(tmp_path / family, family)
    renderer = Renderer(str(folder), Model(path=str(folder), template=template))
    messages = [{"role": "user", "content": "larger of 1 and 2"}]
    [expected] = renderer.prompt_ids([Conversation(messages)])
    ids = renderer.tokenizer.apply_chat_template(messages, chat_template=renderer.standalone_template())["input_ids"]
    assert ids == expected


@pytest.mark.parametrize("template", [TEMPLATE, "{{ bos_token }}{{ messages[-1].content }} ="])
def test_a_standalone_template_begins_a_sequence_once(tmp_path: Path, template: str) -> None:
    folder = make_random_model(tmp_path / "model")
    renderer = Renderer(str(folder), Model(path=str(folder), template=template))
    messages = [{"role": "user", "content": "larger of 1 and 2"}]
    [expected] = renderer.prompt_ids([Conversation(messages)])
    ids = renderer.tokenizer.apply_chat_template(messages, chat_template=renderer.standalone_template())["input_ids"]
    assert ids == expected
    assert ids.count(renderer.tokenizer.bos_token_id) == 1
