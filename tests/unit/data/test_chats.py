"""Conversations of prompt sources: what is carried into prompts, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plad_dist.config import FilesSource
from plad_dist.data.chats import InvalidRowError
from plad_dist.data.conversation import Conversation
from plad_dist.data.prompts import _table
from plad_dist.data.sources import Prompt, read_prompts
from plad_dist.errors import UserError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Graz"}}}
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": WEATHER}
AGENT = [
    {"role": "user", "content": "weather in Graz"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "ask"},
    {"role": "tool", "content": "grey", "tool_call_id": "c1", "name": "weather"},
    {"role": "user", "content": "in one word"},
]


def read(folder: Path, row: dict[str, Any], **options: Any) -> Prompt:
    path = folder / "m.jsonl"
    path.write_text(json.dumps(row))
    options = {"messages_column": "m"} | options
    (prompt,) = read_prompts(FilesSource(type="files", paths=[str(path)], **options))
    return prompt


def user(content: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **fields}]


def test_fields_that_templates_read_are_carried_through_the_prompts_dataset(tmp_path: Path) -> None:
    prompt = read(tmp_path, {"m": AGENT, "tools": [TOOL]}, tools_column="tools")
    assert (prompt.messages, prompt.tools) == (AGENT, [TOOL])
    (row,) = _table([prompt]).to_pylist()
    assert Conversation.from_row(row) == prompt.conversation
    assert row["messages"][1] == {"role": "assistant", "content": ""}
    (plain,) = _table([read(tmp_path, {"m": user("hi")})]).to_pylist()
    assert (plain["conversation"], plain["tools"]) == (None, None)


def test_conversations_that_differ_in_any_field_are_different_prompts(tmp_path: Path) -> None:
    other = [AGENT[0], AGENT[1] | {"tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}, *AGENT[2:]]
    prompts = [
        read(tmp_path, {"m": AGENT, "tools": None}, tools_column="tools"),
        read(tmp_path, {"m": AGENT, "tools": [TOOL]}, tools_column="tools"),
        read(tmp_path, {"m": other}),
    ]
    assert len({prompt.content for prompt in prompts}) == len({prompt.prompt_id for prompt in prompts}) == 3


def test_arguments_of_calls_become_objects_and_other_texts_stay(tmp_path: Path) -> None:
    for written, carried in (('{"town": "Graz"}', {"town": "Graz"}), ("", {}), ("{broken", "{broken"), ("[1]", "[1]")):
        call = {"function": {"name": "weather", "arguments": written}}
        prompt = read(tmp_path, {"m": [AGENT[0], AGENT[1] | {"tool_calls": [call]}, *AGENT[2:]]})
        assert prompt.messages[1]["tool_calls"] == [{"function": {"name": "weather", "arguments": carried}}]


@pytest.mark.parametrize("text", ['["\\ud800"]', "[" * 100_000])
def test_json_in_a_cell_that_cannot_be_used_is_told_by_row(tmp_path: Path, text: str) -> None:
    """It is valid for the parser, or too deep for it."""
    call = {"function": {"name": "weather", "arguments": text}}
    prompt = read(tmp_path, {"m": [AGENT[0], AGENT[1] | {"tool_calls": [call]}, *AGENT[2:]]})
    assert prompt.messages[1]["tool_calls"] == [call]
    with pytest.raises(InvalidRowError, match=r"m\.jsonl:1: 'tools': .*(half of a surrogate|nested too deeply)"):
        read(tmp_path, {"m": AGENT, "tools": text}, tools_column="tools")
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}]
    with pytest.raises(InvalidRowError, match=r":1: .*function_call: .*(half of a surrogate|nested too deeply)"):
        read(tmp_path, {"m": turns}, messages_format="sharegpt")


def test_nulls_that_tables_add_are_left_out(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {"y": [2]}}}]
    turns = [AGENT[0], {"role": "assistant", "content": "", "tool_calls": calls}, AGENT[3]]
    path = tmp_path / "m.parquet"
    tools = [TOOL, {"function": {"name": "g", "strict": True}}]
    pq.write_table(pa.Table.from_pylist([{"m": turns, "tools": tools}]), path)
    source = FilesSource(type="files", paths=[str(path)], messages_column="m", tools_column="tools")
    (prompt,) = read_prompts(source)
    assert prompt.messages == turns
    assert prompt.tools == tools


def test_text_parts_are_joined_by_line_ends_and_other_parts_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one", "image_url": None}, {"type": "text", "text": "two"}]
    prompt = read(tmp_path, {"m": user(parts)})
    assert prompt.messages == user("one\ntwo")
    assert prompt.prompt_id == read(tmp_path, {"m": user("one\ntwo")}).prompt_id
    for kind in ("image_url", "input_audio", "image"):
        with pytest.raises(UserError, match=rf"m\.jsonl:1: 'm': message 0 .*part of type '{kind}'"):
            read(tmp_path, {"m": user([*parts, {"type": kind, kind: {"url": "x"}}])})
    cached = [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]
    with pytest.raises(UserError, match=r"a part has the field 'cache_control'.*ignored_fields"):
        read(tmp_path, {"m": user(cached)})
    assert read(tmp_path, {"m": user(cached)}, ignored_fields=["cache_control"]).messages == user("one")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            user("hi", weight=1),
            r"message 0 \(counted from 0\): has the field 'weight'.*prompts\.source\.ignored_fields",
        ),
        (user("hi", name=3), "name: expected a text, got 3"),
        (user("hi", tool_calls=[CALL]), "tool_calls: expected a list in a turn of the assistant"),
        ([*user("hi"), {"role": "assistant", "content": None}, *user("hi")], "message 1.*expected a non-empty list"),
        (
            [*user("hi"), {"role": "assistant", "tool_calls": [{"id": "1"}]}, *user("hi")],
            r"item 0 .*\{name, arguments\}",
        ),
        ([*user("hi"), {"role": "tool", "content": None}], "message 1.*expected a non-empty list"),
        (user(3), "content: expected a text or a list of text parts, got 3"),
        (user(""), r"message 0 \(counted from 0\): the user's turn is empty"),
        (user(" \n"), "the user's turn is empty"),
        (user([]), "the user's turn is empty"),
        ([*user("hi"), {"role": "assistant", "content": "ho"}, *user("")], "message 2.*the user's turn is empty"),
        ([{"role": "system", "content": "be kind"}], "has no turn of the user"),
        ([{"from": "human", "value": "hi"}], "role None.*set prompts.source.messages_format to sharegpt"),
    ],
)
def test_what_a_prompt_cannot_carry_is_refused_by_name_and_row(
    tmp_path: Path, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=rf"m\.jsonl:1: 'm': .*{message}|m\.jsonl:1: 'm': {message}"):
        read(tmp_path, {"m": messages})


def test_ignored_fields_are_left_out(tmp_path: Path) -> None:
    prompt = read(tmp_path, {"m": user("hi", weight=1, id=None, name="ann")}, ignored_fields=["weight", "name"])
    assert prompt.messages == user("hi")


def test_a_reference_with_more_than_a_text_is_refused(tmp_path: Path) -> None:
    """Nor is it advised to ignore the calls of a turn that would have no content then."""
    for fields in ({"tool_calls": [CALL]}, {"reasoning_content": "hm"}):
        turns = [*user("hi"), {"role": "assistant", "content": "ho", **fields}]
        with pytest.raises(
            UserError, match=rf"jsonl:1: 'm': the last turn of the assistant has {min(fields)}.*ignored"
        ):
            read(tmp_path, {"m": turns}, reference_column="m")
        assert read(tmp_path, {"m": turns}, reference_column="m", ignored_fields=list(fields)).reference == "ho"
    turns = [*user("hi"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(UserError, match=r"has tool_calls, but a reference is a text; remove the turn or the row$"):
        read(tmp_path, {"m": turns}, reference_column="m")
    with pytest.raises(
        UserError, match=r"message 1 .*has no content once tool_calls is ignored; remove .*ignored_fields$"
    ):
        read(tmp_path, {"m": turns}, reference_column="m", ignored_fields=["tool_calls"])


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], [{"type": "function", **WEATHER}]])
def test_tools_are_a_list_or_the_json_of_one(tmp_path: Path, tools: Any) -> None:
    assert read(tmp_path, {"m": user("hi"), "t": tools}, tools_column="t").tools == [TOOL]


def test_bare_calls_get_the_envelope_and_an_id_that_the_answer_names(tmp_path: Path) -> None:
    def called(*turns: dict[str, Any]) -> list[dict[str, Any]]:
        return read(tmp_path, {"m": [*user("hi"), *turns, *user("ho")]}).messages[1:-1]

    def turn(*calls: dict[str, Any]) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": list(calls)}

    bare = {"name": "f", "arguments": '{"x": 1}'}
    full = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    answer = {"role": "tool", "content": "grey"}
    assert called(turn(bare, bare), answer, answer, turn({"name": "g"})) == [
        turn({"id": "call_0", **full}, {"id": "call_1", **full}),
        answer | {"tool_call_id": "call_0"},
        answer | {"tool_call_id": "call_1"},
        turn({"id": "call_2", "type": "function", "function": {"name": "g", "arguments": {}}}),
    ]
    named = [turn({"id": "call_0", **full}, {"id": "b", **full}), answer | {"tool_call_id": "call_0"}, answer]
    assert called(turn(bare, {"id": "b", **bare}), *named[1:]) == [*named[:2], answer | {"tool_call_id": "b"}]
    assert called(
        {"role": "assistant", "function_call": bare}, {"role": "function", "name": "f", "content": "grey"}
    ) == [
        turn({"id": "call_0", **full}),
        answer | {"name": "f", "tool_call_id": "call_0"},
    ]


def test_roles_by_their_other_names_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, {"m": [{"role": "developer", "content": "be kind"}, *user("hi")]}).messages == [
        {"role": "system", "content": "be kind"},
        *user("hi"),
    ]
    with pytest.raises(UserError, match=r"message 1 .*role 'function': expected a `name`"):
        read(tmp_path, {"m": [*user("hi"), {"role": "function", "content": "grey"}]})


def test_a_conversation_can_be_the_json_of_a_list(tmp_path: Path) -> None:
    assert read(tmp_path, {"m": json.dumps(AGENT)}).messages == AGENT
    with pytest.raises(
        InvalidRowError, match=r"jsonl:1: 'm': expected a non-empty list .*JSON of one, got '\[\{': Exp"
    ):
        read(tmp_path, {"m": "[{"})


def test_a_value_that_a_message_cuts_ends_with_dots(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got \{'a': 'x+\.\.\.$"):
        read(tmp_path, {"m": {"a": "x" * 99}})


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_a_row_can_have_no_tools(tmp_path: Path, tools: Any) -> None:
    assert read(tmp_path, {"m": user("hi"), "t": tools}, tools_column="t").tools is None


@pytest.mark.parametrize("tools", ["weather", "{", [3], [{"type": "function"}], {"name": "weather"}])
def test_tools_in_another_form_are_refused(tmp_path: Path, tools: Any) -> None:
    with pytest.raises(UserError, match=r"m\.jsonl:1: 't': expected a list of tools"):
        read(tmp_path, {"m": user("hi"), "t": tools}, tools_column="t")


def test_invalid_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"m": user("hi")}, {"m": user("")}, {"m": "text"}, {"m": user("ho")}]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource(type="files", paths=[str(path)], messages_column="m", invalid_rows="drop")
    errors: list[InvalidRowError] = []
    prompts = list(read_prompts(source, on_invalid=errors.append))
    assert [prompt.meta["row"] for prompt in prompts] == [0, 3]
    assert ["jsonl:2" in str(errors[0]), "jsonl:3" in str(errors[1]), len(errors)] == [True, True, 2]
    with pytest.raises(UserError, match="no column 'x'"):
        list(read_prompts(source.model_copy(update={"messages_column": "x"})))


# -- ShareGPT


def test_sharegpt_turns_become_messages(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "weather in Graz"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "grey"},
        {"from": "gpt", "value": "grey"},
        {"from": "user", "value": "and now?"},
        {"from": "chatgpt", "value": "dark"},
    ]
    prompt = read(tmp_path, {"m": turns}, messages_format="sharegpt", reference_column="m")
    roles = ["system", "user", "assistant", "tool", "assistant", "user"]
    assert [message["role"] for message in prompt.messages] == roles
    assert prompt.messages[2] == {"role": "assistant", "content": None, "tool_calls": [{"id": "call_0", **CALL}]}
    assert prompt.messages[3] == {"role": "tool", "content": "grey", "tool_call_id": "call_0"}
    assert prompt.reference == "dark"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "narrator", "value": "x"}, "unknown speaker 'narrator'; expected one of human"),
        ({"value": "x"}, "unknown speaker None"),
        ({"from": "function_call", "value": "weather"}, "function_call: expected the JSON of a call"),
        ({"from": "human", "value": ""}, "the user's turn is empty"),
        ({"from": "human"}, "expected a non-empty list"),
        ({"from": "human", "value": "x", "weight": 0}, "has the field 'weight'"),
        ({"role": "user", "content": "x"}, "remove prompts.source.messages_format"),
    ],
)
def test_other_sharegpt_turns_are_refused_by_row(tmp_path: Path, turn: dict[str, Any], message: str) -> None:
    turns = [{"from": "human", "value": "hi"}, turn]
    with pytest.raises(UserError, match=rf"m\.jsonl:1: 'm': message 1 \(counted from 0\): .*{message}"):
        read(tmp_path, {"m": turns}, messages_format="sharegpt")


# -- dialogues


def dialogue(folder: Path, text: str) -> Prompt:
    return read(folder, {"chosen": text}, messages_column=None, dialogue_column="chosen")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_dialogue_is_read_with_any_line_ends(tmp_path: Path, end: str) -> None:
    text = "\n\nHuman: Which fruit\nis yellow?\n\nAssistant: A banana.\n\nHuman: And green?\n\nAssistant: A lime."
    prompt = dialogue(tmp_path, text.replace("\n", end))
    contents = ["Which fruit\nis yellow?", "A banana.", "And green?"]
    assert [message["content"] for message in prompt.messages] == contents
    assert prompt.reference == "A lime."


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: A?\nAssistant: B.\nHuman: C?\nAssistant: D.",
        "\n\nHuman: A?\n\nAssistant: B.\nHuman: C?\n\nAssistant: D.",
        "\n\nHuman: A?\n\nAssistant: B.\n\n Human: C?\n\nAssistant: D.",
        "\n\nHuman: A?\n\nAssistant: B.\n\nHuman : C?\n\nAssistant: D.",
        "\n\nHuman: A?\n\nAssistant: B.\n\n### Human: C?\n\nAssistant: D.",
        "\n\nHuman: A?\n\nAssistant: B.\n\n**Human:** C?\n\nAssistant: D.",
        "\n\nHuman: A?\n\nAssistant: B. Human: C? Assistant: D.",
        "\n\nHuman: A? Assistant: B.",
        "\n\nHuman: A\\n\\nAssistant: B.",
        "\n\nHuman: A?\n\nAI: B.",
        "\n\nHuman: A?\n\nAI: B.\n\nHuman: C?\n\nAI: D.",
        "\n\nHuman: A?\n\nASSISTANT: B.",
        "\n\nHuman: A?\n\nAssistant: \n\nHuman: C?\n\nAssistant: D.",
        "\n\nHuman: \n\nAssistant: B.\n\nHuman: C?\n\nAssistant: D.",
        "\n\nHuman: A?\n\nHuman: C?\n\nAssistant: D.",
        "### Human: A?\n\n### Assistant: B.",
    ],
)
def test_turns_that_are_parted_otherwise_are_refused_by_row(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"m\.jsonl:1: 'chosen': expected a text of turns"):
        dialogue(tmp_path, text)
