"""What an OpenAI-compatible server answered: a response, or a failure of a known kind, without a secret in its text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Usage = tuple[int, int]  # tokens of the prompt, tokens of the response
NOTHING: Usage = (0, 0)

_STOP = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}
_LENGTH = {"length", "max_tokens", "model_length"}
_NO_MONEY = re.compile(r"insufficient_(quota|balance)|billing_(hard_limit|not_active)", re.IGNORECASE)
_FLAGGED = re.compile(r"moderation|\bflagged\b|content[ _]?(policy|filter|management)|request too large", re.IGNORECASE)
_SECRETS = re.compile(
    r"(?P<scheme>\b(?:bearer|basic)\s+)[^\s\"',;]+|\b(?:sk|pk|rk|gsk|hf|xai|nvapi)[-_][\w*.-]{6,}|(?<=://)\S+@",
    re.IGNORECASE,
)
_LONGEST_TEXT = 300
_KEY_PIECE = 8


@dataclass(frozen=True, slots=True)
class Reply:
    """One response as the server gave it. `usage` is None where the server did not report it."""

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a usable answer.

    Attributes:
        kind: retry (it may work later), throttled (the server wants fewer requests), refused (this prompt will never be
            answered), mend (no request will be answered before the user acts).
        status: HTTP status, 0 without one.
        usage: tokens that the server bills for; None where it did not say, so that it may have billed anything.
    """

    kind: Literal["retry", "throttled", "refused", "mend"]
    text: str
    status: int = 0
    usage: Usage | None = NOTHING
    retry_after_s: float | None = None


def read_reply(status: int, raw: bytes, max_tokens: int, clean: Callable[[str], str]) -> Reply | Failure:
    """Read the body of an answer.

    Args:
        max_tokens: longest response that was asked for.
        clean: takes the secrets out of a server's text.
    """
    try:
        payload = json.loads(raw)
    except (ValueError, RecursionError):
        payload = None
    if not 200 <= status < 300:
        return _failure(status, raw, payload, clean)
    if not isinstance(payload, dict):
        return Failure("retry", clean(f"not a JSON object: {_text(raw)}"), status, usage=None)
    usage = _usage(payload)
    choices = payload.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        error = payload.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 600:  # a gateway that had begun to answer 200
            return _failure(code, raw, payload, clean)
        return Failure("retry", clean(f"no choices in the answer: {_said(raw, payload)}"), status, usage)
    return _read_choice(choices[0], usage, max_tokens, clean)


def _read_choice(
    choice: dict[str, Any], usage: Usage | None, max_tokens: int, clean: Callable[[str], str]
) -> Reply | Failure:
    """Read a choice. A `finish_reason` of null says nothing, so the count of tokens decides; one that nobody knows may
    stand for a response that was cut, and is a failure."""
    message = choice.get("message")
    message = message if isinstance(message, dict) else {"content": choice.get("text")}
    text, reason = message.get("content"), choice.get("finish_reason")
    if reason == "content_filter":
        return Failure("refused", "the server's content filter cut the answer", 200, usage)
    if reason in ("tool_calls", "function_call"):
        return Failure("refused", "the server answered with a call of a tool, which it was not offered", 200, usage)
    if text is None and isinstance(message.get("refusal"), str):
        return Failure("refused", clean(f"the model refused: {message['refusal']}"), 200, usage)
    if reason in _LENGTH and text is None:
        text = ""  # all tokens went into hidden reasoning; asked again, it would do the same
    if not isinstance(text, str):
        return Failure("retry", f"no text in the answer: its content is {type(text).__name__}", 200, usage)
    if not reason:
        reason = "length" if usage is not None and usage[1] >= max_tokens else "stop"
    if reason not in _STOP | _LENGTH:
        return Failure("retry", clean(f"finish_reason {reason!r}"), 200, usage)
    return Reply(_without_surrogates(text), "stop" if reason in _STOP else "length", usage)


def _failure(status: int, raw: bytes, payload: Any, clean: Callable[[str], str]) -> Failure:
    """What an error status means. Errors cost nothing, but a gateway's timeout says nothing of the server behind it."""
    said = _said(raw, payload)
    text, details = clean(f"HTTP {status}: {said}" if said else f"HTTP {status}"), _text(raw)
    match status:
        case 401:
            kind: Literal["retry", "throttled", "refused", "mend"] = "mend"
        case 429 if _NO_MONEY.search(details):
            kind = "mend"
        case _ if status < 500 and _FLAGGED.search(details):
            kind = "refused"
        case 429:
            kind = "throttled"
        case 408 | 409 | 425:
            kind = "retry"
        case 402 | 403 | 404 | 405 | 406 | 407 | 410 | 415:
            kind = "mend"
        case _:
            kind = "retry" if status >= 500 else "refused" if status >= 400 else "mend"
    return Failure(kind, text, status, usage=None if status in (504, 524) else NOTHING)


def _usage(payload: dict[str, Any]) -> Usage | None:
    usage = payload.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return prompt, completion


def _said(raw: bytes, payload: Any) -> str:
    """A server's own message, wherever it put it."""
    found = payload
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return _text(raw) if found is None else found if isinstance(found, str) else json.dumps(found)


def _text(raw: bytes) -> str:
    return raw[:65_536].decode(errors="replace")


def _without_surrogates(text: str) -> str:
    """Halves of characters, as a cut emoji leaves them, cannot be stored."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def redacted(text: str, key: str | None) -> str:
    """A server's text on one line without the key, a piece of it or anything that looks like one, cut to a length to read."""
    text = " ".join(_without_surrogates(text).split())
    if key:
        text = text.replace(key, "***")
        for start in range(len(key) - _KEY_PIECE + 1):
            text = text.replace(key[start : start + _KEY_PIECE], "***")
    text = _SECRETS.sub(lambda match: f"{match['scheme'] or ''}***", text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
