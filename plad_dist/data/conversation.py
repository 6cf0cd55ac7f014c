"""Conversations as chat templates and servers take them: messages, and the tools to call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
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


def to_json(value: Any) -> str:
    """Return JSON with the keys in their order, in which templates show them."""
    return _ENCODER.encode(value)
