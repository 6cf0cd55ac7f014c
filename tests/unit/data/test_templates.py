"""Rendering of prompts and responses to tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from plad_dist.config import Model
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
