"""Conversations as chat templates and servers take them: messages, and the tools to call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

# Columns of the prompts dataset that hold a conversation. `messages` has role and text only, for
# readers that need no more. `conversation` is null unless a message has more.
COLUMNS = ("messages", "conversation", "tools")
_PLAIN = {"role", "content"}
_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of a prompt, and the tools offered to the model that responds.

    Attributes:
        messages: each has `role` and `content`, and may have `tool_calls`, `tool_call_id`, `name`,
            and its thought. `content` can be None beside `tool_calls`.
        tools: definitions of the tools, None without.
    """

    messages: Messages
    tools: Tools | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation of a row of the prompts dataset."""
        full, tools = row.get("conversation"), row.get("tools")
        return cls(json.loads(full) if full else row["messages"], json.loads(tools) if tools else None)

    def to_row(self) -> dict[str, Any]:
        """Return the values of :data:`COLUMNS`."""
        return {
            "messages": [{"role": message["role"], "content": message["content"] or ""} for message in self.messages],
            "conversation": None if self.is_plain else to_json(self.messages),
            "tools": None if self.tools is None else to_json(self.tools),
        }

    @property
    def is_plain(self) -> bool:
        """True if every message has a role and a text, and nothing else."""
        return all(message.keys() == _PLAIN and message["content"] is not None for message in self.messages)

    def with_response(self, text: str) -> Conversation:
        """Return the conversation with a response as its last turn."""
        return replace(self, messages=[*self.messages, {"role": "assistant", "content": text}])

    def with_empty_contents(self) -> Conversation:
        """Return the conversation with an empty text in place of each null content."""
        return replace(self, messages=[{**message, "content": message["content"] or ""} for message in self.messages])


def has_bare_calls(messages: Messages) -> bool:
    """Return True if a call has a name and arguments, but no `function` that holds them."""
    return any(call.get("function") is None for message in messages for call in message.get("tool_calls") or ())


def with_full_calls(messages: Messages) -> Messages:
    """Return messages whose calls have the form of the API, with ids that turns of tools name.

    Ids that the conversation has are kept. The turn of a tool that names no call answers the first
    one before it that no turn names.
    """
    named = {message["tool_call_id"] for message in messages if message.get("tool_call_id")}
    used = named | {call.get("id") for message in messages for call in message.get("tool_calls") or ()}
    new_ids = (name for name in map("call_{}".format, count()) if name not in used)
    full = [dict(message) for message in messages]
    open_calls: list[dict[str, Any]] = []
    for message in full:
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_full_call(call) for call in calls]
            open_calls += message["tool_calls"]
        elif message["role"] == "tool":
            call = _answered(open_calls, message.get("tool_call_id"), named)
            if call is not None:
                open_calls.remove(call)
                call["id"] = call["id"] or message.get("tool_call_id") or next(new_ids)
                message["tool_call_id"] = message.get("tool_call_id") or call["id"]
    for message in full:
        for call in message.get("tool_calls") or ():
            call["id"] = call["id"] or next(new_ids)
    return full


def _full_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call in the form {id, type, function}, with None as the id if it has none."""
    full = {"id": None, "type": "function"} | {key: value for key, value in call.items() if value is not None}
    if "function" not in full:
        full["function"] = {"name": full.pop("name"), "arguments": full.pop("arguments", {})}
    return full


def _answered(open_calls: list[dict[str, Any]], id_: str | None, named: set[str]) -> dict[str, Any] | None:
    """Return the call that a turn of a tool answers, by its id or by the order of calls."""
    if id_ is None:
        return next((call for call in open_calls if call["id"] not in named), None)
    without_id = next((call for call in open_calls if call["id"] is None), None)
    return next((call for call in open_calls if call["id"] == id_), without_id)


def to_json(value: Any) -> str:
    """Return JSON with the keys in their order, in which templates show them."""
    return _ENCODER.encode(value)
