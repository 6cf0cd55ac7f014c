"""The body of a response, received piece by piece: server-sent events, or one JSON document.

A response is streamed so that only silence times out, however long the answer is. The events are
put together to the document that the server would have sent without `stream`, so that one parser
reads both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from plad_dist.untrusted import parse_json

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")  # beginnings of a stream of events
_DONE = "[DONE]"


@dataclass(slots=True)
class _StreamedChoice:
    """Deltas of one choice. A part of its content is a text, or a dict as in a content in parts."""

    parts: list[Any] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    tool_calls: list[Any] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {"content": choice.get("text")}
        content = delta.get("content")
        self.parts += content if isinstance(content, list) else [] if content is None else [content]
        for name in ("reasoning_content", "reasoning"):
            if isinstance(delta.get(name), str):
                self.reasoning.append(delta[name])
                break  # some servers send it under both names
        if isinstance(delta.get("refusal"), str):
            self.refusal.append(delta["refusal"])
        calls = delta.get("tool_calls")
        self.tool_calls += calls if isinstance(calls, list) else [calls] if calls else []
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def document(self, index: int) -> dict[str, Any]:
        """Return the choice as it is without streaming."""
        content: Any = self.parts or None
        if content and all(isinstance(part, str) for part in content):
            content = "".join(content)
        elif content:
            content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        message = {"content": content, "reasoning_content": "".join(self.reasoning) or None}
        message |= {"refusal": "".join(self.refusal) or None, "tool_calls": self.tool_calls}
        return {"index": index, "message": message, "finish_reason": self.finish_reason}


class ResponseBody:
    """Body of one response.

    Attributes:
        events: events received so far.
        is_done: True after the last event.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self._lines: list[str] = []  # data of the event that is not complete yet
        self._choices: dict[int, _StreamedChoice] = {}
        self._usage: Any = None
        self._error: dict[str, Any] | None = None
        self._is_stream: bool | None = None
        self.events, self.is_done = 0, False

    @property
    def is_stream(self) -> bool:
        return bool(self._is_stream)

    @property
    def is_complete(self) -> bool:
        """True if nothing is missing: a stream may also end without its last event."""
        reasons = [choice.finish_reason for choice in self._choices.values()]
        return not self._is_stream or self.is_done or self._error is not None or (bool(reasons) and all(reasons))

    @property
    def has_output(self) -> bool:
        """True if a stream has brought a piece of a response, which may be billed."""
        return any(choice.parts or choice.reasoning for choice in self._choices.values())

    def feed(self, data: bytes) -> None:
        """Add what the server has sent."""
        if self._is_stream is None:
            data = bytes(self._received + data).lstrip()
            self._received.clear()
            if any(name.startswith(data) and name != data for name in _FIELDS):
                self._received += data
                return  # too little to tell
            self._is_stream = data.startswith(_FIELDS)
        if not self._is_stream or b"\n" not in data:
            self._received += data
            return
        *lines, rest = bytes(self._received + data).split(b"\n")
        self._received = bytearray(rest)
        for line in lines:
            self._add_line(line.decode(errors="replace").rstrip("\r"))

    def end(self) -> None:
        """Note that the server sends no more."""
        if self._is_stream:
            self._add_line(self._received.decode(errors="replace").rstrip("\r"))
            self._add_line("")
            self._received.clear()

    def raw(self) -> bytes:
        """Return the body as one document."""
        if not self._is_stream:
            return bytes(self._received)
        if self._error is not None:
            return json.dumps(self._error).encode()
        choices = [choice.document(index) for index, choice in sorted(self._choices.items())]
        return json.dumps({"choices": choices, "usage": self._usage}).encode()

    def _add_line(self, line: str) -> None:
        if line.startswith("data:"):
            self._lines.append(line.removeprefix("data:").removeprefix(" "))
        elif not line.strip() and self._lines:
            self._add_event("\n".join(self._lines))
            self._lines = []

    def _add_event(self, data: str) -> None:
        if data.strip() == _DONE:
            self.is_done = True
            return
        try:
            event = parse_json(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self._error = self._error or {"error": {"message": f"an event that is not a JSON object: {data:.200}"}}
            return
        self.events += 1
        if event.get("error"):
            self._error = self._error or event
        self._usage = event.get("usage") or self._usage
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._usage = choice.get("usage") or self._usage  # where some servers report it
                index = choice.get("index")
                streamed = self._choices.setdefault(index if isinstance(index, int) else 0, _StreamedChoice())
                streamed.add(choice)
