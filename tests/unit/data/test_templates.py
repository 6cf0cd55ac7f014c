"""Rendering of prompts and responses to tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from plad_dist.config import Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.templates import Renderer
from tests.tiny import TEMPLATE, make_random_model

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """Return a chat model that ends a turn with another token than end-of-sequence."""
    folder = make_random_model(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def test_responses_end_as_the_chat_template_ends_a_turn(chat_model: Path) -> None:
    renderer = Renderer(str(chat_model), Model(path=str(chat_model)))
    end = renderer.tokenizer.convert_tokens_to_ids("<|end|>")
    assert [ids[-1] for ids in renderer.response_ids(["one", "two"])] == [end, end]


def test_responses_end_with_end_of_sequence_if_the_config_has_a_template(chat_model: Path) -> None:
    renderer = Renderer(str(chat_model), Model(path=str(chat_model), template=TEMPLATE))
    assert renderer.response_ids(["one"])[0][-1] == renderer.tokenizer.eos_token_id


def test_responses_end_with_end_of_sequence_if_the_turn_ends_with_no_end_token_of_the_model(chat_model: Path) -> None:
    (chat_model / "generation_config.json").unlink()
    renderer = Renderer(str(chat_model), Model(path=str(chat_model)))
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
