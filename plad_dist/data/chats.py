"""Conversations of prompt sources: chat messages, ShareGPT turns, HH dialogues, and tools."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from plad_dist.config import Columns
from plad_dist.data.conversation import Messages, Tools, has_bare_calls, with_full_calls
from plad_dist.data.files import parse_json
from plad_dist.errors import UserError, excerpt

ROLES = ("system", "user", "assistant", "tool")
# Roles that OpenAI's API renamed, by their other names.
_RENAMED_ROLES = {"developer": "system", "function": "tool"}
# Fields that chat templates read, beside role and content. All but `tool_calls` are texts.
_TEXT_FIELDS = ("tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")

# Roles by the names that ShareGPT data and its descendants use.
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model"), "assistant"),
    **dict.fromkeys(("tool", "function_response", "observation"), "tool"),
    "system": "system",
}

# Turns of a dialogue in the format of Anthropic's HH data.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# What begins another turn inside a turn: on a line of its own, after an escaped line end, or after
# the end of a sentence.
_LEFT_OVER = re.compile(
    r"(?:^[^\w\n]*|\\[nr]\s*|(?<=[.?!])[ \t]+)(?:human|assistant)[^\w\n]{0,4}[:：]", re.IGNORECASE | re.MULTILINE
)
# The same in a dialogue in which only the human was recognised: other names, or within a line.
_OTHER_SPEAKER = re.compile(
    r"^[^\w\n]*(?i:user|ai|bot|chatbot|system|model|gpt)\s*[:：]|\b(?:HUMAN|Human|ASSISTANT|Assistant)\s*[:：]",
    re.MULTILINE,
)


class InvalidRowError(UserError):
    """A row holds no prompt in the form that the config names. `invalid_rows` decides about it."""


def without_nulls(value: Any) -> Any:
    """Return a value without the keys whose value is null, which tables add to their structs."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def check_turns(messages: Messages, where: str) -> None:
    """Raise :class:`InvalidRowError` if the user has no turn in a conversation, or an empty one."""
    turns = [(number, message) for number, message in enumerate(messages) if message["role"] == "user"]
    if not turns:
        raise InvalidRowError(f"{where}: has no turn of the user; expected at least one. Correct or remove the row")
    for number, message in turns:
        if not (message["content"] or "").strip():
            raise InvalidRowError(
                f"{where}: message {number} (counted from 0): the user's turn is empty; expected a text. Correct or "
                "remove the row"
            )


@dataclass(frozen=True)
class ChatParser:
    """Reads the conversations of one source.

    Attributes:
        source: config of the source.
        key: config section of the source, for messages.
        is_table: rows come from a table, whose structs have null for what a row does not have.
    """

    source: Columns
    key: str
    is_table: bool

    def messages(self, value: Any, where: str) -> Messages:
        """Return the messages of a conversation.

        Raises:
            InvalidRowError: it is invalid, or has something that a prompt cannot carry.
        """
        is_sharegpt = self.source.messages_format == "sharegpt"
        form = "{from, value}" if is_sharegpt else "{role, content}"
        if isinstance(value, str):  # a table of texts, such as CSV, cannot hold a list otherwise
            try:
                parsed = parse_json(value)
            except ValueError as error:
                raise InvalidRowError(
                    f"{where}: expected a non-empty list of {form}, or the JSON of one, got {excerpt(value)}: {error}"
                ) from None
            if not isinstance(parsed, str):
                return replace(self, is_table=False).messages(parsed, where)
        if not isinstance(value, list) or not value:
            raise InvalidRowError(f"{where}: expected a non-empty list of {form}, got {excerpt(value)}")
        messages: Messages = []
        for number, item in enumerate(value):
            if not is_sharegpt and _is_plain(item):  # nearly all are
                messages.append({"role": item["role"], "content": item["content"]})
                continue
            place = f"{where}: message {number} (counted from 0)"
            if not isinstance(item, dict):
                raise InvalidRowError(f"{place}: expected a non-empty list of {form}, got an item {excerpt(item)}")
            message = {name: field for name, field in item.items() if field is not None}
            messages.append(self._message(self._from_sharegpt(message, place) if is_sharegpt else message, place))
        # Calls with a `function` stay as they are: templates show their fields, and need no id.
        return with_full_calls(messages) if has_bare_calls(messages) else messages

    def _from_sharegpt(self, turn: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a turn of ShareGPT data in the form of chat messages."""
        if "from" not in turn and "role" in turn:
            raise InvalidRowError(
                f"{where}: expected {{from, value}}, got {{role, ...}}; remove {self.key}.messages_format"
            )
        speaker, value = turn.pop("from", None), turn.pop("value", None)
        if speaker == "function_call":
            try:
                calls = parse_json(value)
            except (TypeError, ValueError) as error:
                raise InvalidRowError(
                    f"{where}: function_call: expected the JSON of a call, got {excerpt(value)}: {error}"
                ) from None
            return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **turn}
        if speaker not in _SHAREGPT:
            raise InvalidRowError(
                f"{where}: unknown speaker {speaker!r}; expected one of {', '.join(_SHAREGPT)}. Rename it in the data"
            )
        return {"role": _SHAREGPT[speaker], "content": value, **turn}

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        fields = {name: value for name, value in message.items() if name not in self.source.ignored_fields}
        content = fields.pop("content", None)
        role = self._role(fields, where)
        if "tool_calls" not in fields and "function_call" in fields:  # the name that the API used before
            fields["tool_calls"] = [fields.pop("function_call")]
        calls = self._tool_calls(fields.pop("tool_calls", None), role, where)
        for name, value in fields.items():
            if name not in _TEXT_FIELDS:
                raise InvalidRowError(
                    f"{where}: has the field {name!r}, which no prompt carries; remove it, or list it in "
                    f"{self.key}.ignored_fields"
                )
            if not isinstance(value, str):
                raise InvalidRowError(f"{where}: {name}: expected a text, got {excerpt(value)}")
        if content is None and calls is None:
            if message.get("tool_calls"):
                raise InvalidRowError(
                    f"{where}: has no content once tool_calls is ignored; remove the turn or the row, or take "
                    f"tool_calls off {self.key}.ignored_fields"
                )
            raise InvalidRowError(
                f"{where}: expected a non-empty list of {{role, content}}, got an item {excerpt(message)}"
            )
        text = None if content is None else self._text(content, where)
        return {"role": role, "content": text, **({} if calls is None else {"tool_calls": calls}), **fields}

    def _role(self, fields: dict[str, Any], where: str) -> str:
        """Take the role out of a message's fields, and return it by the name of templates."""
        role = fields.pop("role", None)
        if role == "function" and "name" not in fields:
            raise InvalidRowError(
                f"{where}: role 'function': expected a `name`, that of the function; add it, or use the role tool"
            )
        renamed = _RENAMED_ROLES.get(role, role) if isinstance(role, str) else role
        if renamed not in ROLES:
            advice = f"; for {{from, value}}, set {self.key}.messages_format to sharegpt" if "from" in fields else ""
            known = ", ".join((*ROLES, *_RENAMED_ROLES))
            raise InvalidRowError(f"{where}: role {role!r}: expected one of {known}{advice}")
        return str(renamed)

    def _text(self, content: Any, where: str) -> str:
        """Return a content as one text. Parts are joined by line ends, as vLLM does it."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise InvalidRowError(f"{where}: content: expected a text or a list of text parts, got {excerpt(content)}")
        return "\n".join(self._part(part, f"{where}: content") for part in content)

    def _part(self, part: Any, where: str) -> str:
        if isinstance(part, str):
            return part
        fields = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind, text = fields.pop("type", "text"), fields.pop("text", None)
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise InvalidRowError(
                f"{where}: has a part of type {kind!r}; expected parts {{type: text, text: ...}}, because prompts are "
                f"texts. Remove the part or the row; got {excerpt(part)}"
            )
        if unknown := fields.keys() - set(self.source.ignored_fields):
            raise InvalidRowError(
                f"{where}: a part has the field {min(unknown)!r}, which no prompt carries; remove it, or list it in "
                f"{self.key}.ignored_fields"
            )
        return text

    # -- tools

    def _tool_calls(self, calls: Any, role: str, where: str) -> list[dict[str, Any]] | None:
        if calls is None or calls == []:
            return None
        if role != "assistant" or not isinstance(calls, list):
            raise InvalidRowError(
                f"{where}: tool_calls: expected a list in a turn of the assistant, got {excerpt(calls)}"
            )
        places = (f"{where}: tool_calls: item {number} (counted from 0)" for number in range(len(calls)))
        return [self._call(call, place) for call, place in zip(calls, places, strict=True)]

    def _call(self, call: Any, where: str) -> dict[str, Any]:
        """Return a call whose arguments are an object, as the templates of models take them."""
        if isinstance(call, dict) and self.is_table:
            call = without_nulls(call)
        name = _function(call).get("name")
        arguments = _function(call).get("arguments")
        if not isinstance(name, str) or not name or not isinstance(arguments, dict | str | None):
            raise InvalidRowError(
                f"{where}: expected {{function: {{name, arguments}}}} with an object or its JSON as arguments, got "
                f"{excerpt(call)}"
            )
        if isinstance(arguments, str):
            try:
                parsed = parse_json(arguments) if arguments.strip() else {}
            except ValueError:
                return dict(call)  # what the model wrote was no JSON: the text is its call
            arguments = parsed if isinstance(parsed, dict) else arguments
        if arguments is None:
            return dict(call)
        if "function" in call:
            return {**call, "function": {**call["function"], "arguments": arguments}}
        return {**call, "arguments": arguments}

    def tools(self, value: Any, where: str) -> Tools | None:
        """Return the definitions of tools in a column, None without any.

        Raises:
            InvalidRowError: it is neither a list of definitions nor the JSON of one.
        """
        expected = f"{where}: expected a list of tools {{type: function, function: {{name, ...}}}}, or the JSON of one"
        tools = value
        if isinstance(value, str):
            try:
                tools = parse_json(value) if value.strip() else None
            except ValueError as error:
                raise InvalidRowError(f"{expected}; got {excerpt(value)}: {error}") from None
        elif self.is_table:
            tools = without_nulls(value)
        if tools is None or tools == []:
            return None
        if not isinstance(tools, list) or not all(isinstance(_function(tool).get("name"), str) for tool in tools):
            raise InvalidRowError(f"{expected}; got {excerpt(value)}")
        return [_full_tool(tool) for tool in tools]


def _is_plain(item: Any) -> bool:
    """Return True for a valid message of a role and a text alone."""
    return (
        isinstance(item, dict)
        and item.keys() == {"role", "content"}
        and isinstance(item["content"], str)
        and item["role"] in ROLES
    )


def _function(item: Any) -> dict[str, Any]:
    """Return the function of a tool or of a call, with or without the envelope of the API."""
    function = item.get("function", item) if isinstance(item, dict) else None
    return function if isinstance(function, dict) else {}


def _full_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with the envelope of the API, which only functions have."""
    if tool.get("function") is not None or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


# -- dialogues as one text


def parse_dialogue(text: Any, where: str) -> tuple[Messages, str | None]:
    """Return the turns of a dialogue before its final response, and that response, if any.

    Raises:
        InvalidRowError: the text is no dialogue in this format, or begins a turn in another way.
    """
    problem, turns = "", []
    if isinstance(text, str):
        dialogue = text.replace("\r\n", "\n").replace("\r", "\n")
        turns = [(speaker, turn.strip()) for speaker, turn in _TURN.findall(dialogue)]
        if not dialogue.lstrip().startswith("Human:"):
            turns = []
        problem = _dialogue_problem(turns)
    if not turns or problem:
        raise InvalidRowError(
            f"{where}: expected a text of turns that begin with '\\n\\nHuman:' and '\\n\\nAssistant:', the first by "
            f"the human; {problem or 'it does not begin so'}. Correct or remove the row; got {excerpt(text)}"
        )
    reference = turns.pop()[1] if turns[-1][0] == "Assistant" else None
    return [{"role": _SPEAKERS[speaker], "content": turn} for speaker, turn in turns], reference or None


def _dialogue_problem(turns: list[tuple[str, str]]) -> str:
    """Return what is wrong with the turns of a dialogue, empty if they are as they should be."""
    has_response = any(speaker == "Assistant" for speaker, _ in turns)
    for number, (speaker, turn) in enumerate(turns):
        place = f"turn {number} (counted from 0)"
        begun = _LEFT_OVER.search(turn) or (None if has_response else _OTHER_SPEAKER.search(turn))
        if begun:
            return f"{place}: {begun[0].strip()!r} in it begins another turn"
        if number and speaker == turns[number - 1][0]:
            return f"{place}: a second turn of the same speaker"
        if not turn and (speaker == "Human" or number < len(turns) - 1):
            return f"{place}: is empty"
    return ""
