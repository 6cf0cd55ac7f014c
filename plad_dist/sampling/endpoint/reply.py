"""Parsing of an OpenAI-compatible server's HTTP response into a reply or a failure of a known kind.

The kind of a failure is all that the retry policy knows of it, so every rule for status codes,
malformed bodies and finish reasons is in this file. Texts of the server are redacted here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from plad_dist.sampling.endpoint.redaction import without_surrogates
from plad_dist.sampling.endpoint.usage import NO_USAGE, Usage, read_usage
from plad_dist.untrusted import parse_json

FailureKind = Literal["transient", "throttled", "refused", "blocked"]

CERTIFICATE = 495  # status of a failure: the certificate is not trusted; some servers number it so
TOO_LARGE = 599  # status of a failure: an answer is larger than any that is possible

# Reasons why a response ended, in lower case.
_STOP = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"}
_LENGTH = {"length", "max_tokens", "max_output_tokens", "model_length"}
_FILTERED = {"content_filter", "safety", "refusal", "prohibited_content", "recitation", "blocklist"}
_EXHAUSTED_ACCOUNT = re.compile(r"insufficient_(quota|balance)|billing_(hard_limit|not_active)", re.IGNORECASE)
_REFUSED_CONTENT = re.compile(
    r"moderation|\bflagged\b|content[ _]?(policy|filter|management)|request too large", re.IGNORECASE
)
_MAX_ERROR_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable response.

    Attributes:
        usage: tokens of all choices of the request; None if the server did not report them.
        reasoning: thought that the server sends beside the text, None without one.
        is_streamed: True if it came as a stream, in which some servers report no usage.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage | None
    reasoning: str | None = None
    is_streamed: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a usable response.

    Attributes:
        kind: transient (the same request may succeed later), throttled (the server wants fewer
            requests), refused (the server will never respond to this prompt), blocked (no request
            succeeds before the user corrects the key, the address, the model or the account).
        text: redacted description.
        status: HTTP status, 0 without one.
        usage: tokens that the server bills; None if unknown, so that it may have billed the worst
            case.
        retry_after_s: pause that the server asks for in `Retry-After`, None without one.
    """

    kind: FailureKind
    text: str
    status: int = 0
    usage: Usage | None = NO_USAGE
    retry_after_s: float | None = None

    @property
    def rejects_stream(self) -> bool:
        """True if the server seems to lack streams, or a field of theirs."""
        return self.status in (400, 404, 405, 406, 415, 422, 501) and "stream" in self.text.lower()


# The choices of a request, at least one of which is a reply, or the failure of the request.
Outcome = list[Reply | Failure] | Failure


def read_replies(status: int, raw: bytes, max_tokens: int, redact: Callable[[str], str]) -> Outcome:
    """Parse the body of an HTTP response: its choices, or the failure of the request.

    If no choice has a reply, the request has failed.

    Args:
        max_tokens: requested limit of each response, in tokens.
        redact: removes secrets from a server's text.
    """
    payload = _parsed(raw)
    if not 200 <= status < 300:
        return _read_error(status, raw, payload, redact)
    if not isinstance(payload, dict):
        return Failure("transient", redact(f"not a JSON object: {_decoded(raw)}"), status, usage=None)
    usage = read_usage(payload.get("usage"))
    choices = payload.get("choices")
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    if not choices:
        error = payload.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        code = str(code) if isinstance(code, int | str) else ""
        if re.fullmatch(r"[45]\d\d", code):  # from a gateway that had already sent status 200
            return _read_error(int(code), raw, payload, redact)
        return Failure(
            "transient", redact(f"no choices in the response: {_error_message(raw, payload)}"), status, usage
        )
    outcomes = [_read_choice(choice, usage, max_tokens * len(choices), redact) for choice in choices]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    return failures[0] if len(failures) == len(outcomes) else outcomes


def _read_choice(
    choice: dict[str, Any], usage: Usage | None, max_tokens: int, redact: Callable[[str], str]
) -> Reply | Failure:
    """Parse a choice.

    A response that the server calls finished is an answer even if it has no text: the same request
    would give none again. If `finish_reason` is null, the number of tokens decides between stop and
    length. An unknown reason may mean that the response was cut, and is a failure.

    Args:
        usage: tokens of all choices.
        max_tokens: limit of all choices together.
    """
    message = choice.get("message")
    message = message if isinstance(message, dict) else {"content": choice.get("text")}
    content, reason = _read_content(message.get("content")), choice.get("finish_reason")
    reason = reason.lower() if isinstance(reason, str) else None
    calls_a_tool = (
        reason in ("tool_calls", "function_call") or message.get("tool_calls") or message.get("function_call")
    )
    if reason in _FILTERED:
        return Failure("refused", "the server's content filter cut the response", 200, usage)
    if calls_a_tool and (reason not in _STOP | _LENGTH or not content.text):
        return Failure("refused", "the response is a tool call, although no tools were offered", 200, usage)
    refusal = message.get("refusal") or content.refusal
    if not content.text and isinstance(refusal, str) and refusal:
        return Failure("refused", redact(f"the model refused: {refusal}"), 200, usage)
    if content.other:
        return Failure("refused", redact(f"the response is no text: it holds {content.other}"), 200, usage)
    text = content.text
    if text is None and reason in _STOP | _LENGTH:
        text = ""  # for example because hidden reasoning used all tokens
    if text is None:
        return Failure("transient", "no text in the response, and no reason why it ended", 200, usage)
    if not reason:
        reason = "length" if usage is not None and usage.completion_tokens >= max_tokens else "stop"
    if reason not in _STOP | _LENGTH:
        return Failure("transient", redact(f"finish_reason {reason!r}"), 200, usage)
    if text and usage is not None and not usage.completion_tokens:
        usage = None  # a text has tokens, so the report is not of this response
    thoughts = (message.get("reasoning_content"), message.get("reasoning"), content.reasoning)
    reasoning = next((thought for thought in thoughts if isinstance(thought, str) and thought), None)
    return Reply(
        without_surrogates(text),
        "stop" if reason in _STOP else "length",
        usage,
        without_surrogates(reasoning) if reasoning else None,
    )


@dataclass(frozen=True, slots=True)
class _Content:
    """Content of a message.

    Attributes:
        text: None without one.
        reasoning: thought among the parts.
        refusal: refusal among the parts.
        other: name of what is neither text nor thought.
    """

    text: str | None
    reasoning: str = ""
    refusal: str = ""
    other: str = ""


def _read_content(content: Any) -> _Content:
    """Parse the content of a message: a text, nothing, or parts in a list."""
    if content is None or isinstance(content, str):
        return _Content(content)
    if not isinstance(content, list):
        return _Content(None, other=type(content).__name__)
    texts: dict[str, list[str]] = {"text": [], "reasoning": [], "refusal": []}
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        match kind:
            case "text" | "output_text" if isinstance(part.get("text"), str):
                texts["text"].append(part["text"])
            case "refusal" if isinstance(part.get("refusal"), str):
                texts["refusal"].append(part["refusal"])
            case "thinking" | "reasoning":
                texts["reasoning"].append(_read_thought(part.get(kind, part.get("text"))))
            case "redacted_thinking":
                pass
            case _:
                return _Content(None, other=f"a part of type {kind!r:.40}" if kind else type(part).__name__)
    return _Content(*("".join(texts[name]) for name in ("text", "reasoning", "refusal")))


def _read_thought(thought: Any) -> str:
    """Return the text of a part that holds a thought, which is a text or parts again."""
    return thought if isinstance(thought, str) else _read_content(thought).text or "" if thought else ""


def read_error(status: int, raw: bytes, redact: Callable[[str], str]) -> Failure:
    """Return the failure of a request that the server has answered with an error status."""
    return _read_error(status, raw, _parsed(raw), redact)


def _parsed(raw: bytes) -> Any:
    try:
        return parse_json(raw)
    except ValueError:
        return None


def _read_error(status: int, raw: bytes, payload: Any, redact: Callable[[str], str]) -> Failure:
    """Classify an error status.

    Errors cost nothing, except a gateway's timeout (504, 524): the server behind the gateway may
    have completed the response and billed it.
    """
    message, body = _error_message(raw, payload), _decoded(raw)
    text = redact(f"HTTP {status}: {message}" if message else f"HTTP {status}")
    kind: FailureKind
    match status:
        case 401:
            kind = "blocked"
        case 429 if _EXHAUSTED_ACCOUNT.search(body):
            kind = "blocked"
        case _ if status < 500 and _REFUSED_CONTENT.search(body):
            kind = "refused"
        case 429:
            kind = "throttled"
        case 408 | 409 | 425:
            kind = "transient"
        case 402 | 403 | 404 | 405 | 406 | 407 | 410 | 415:
            kind = "blocked"
        case _:
            kind = "transient" if status >= 500 else "refused" if status >= 400 else "blocked"
    return Failure(kind, text, status, usage=None if status in (504, 524) else NO_USAGE)


def _error_message(raw: bytes, payload: Any) -> str:
    """Return the server's error message, which servers nest in different ways, or else the body."""
    message = payload
    for key in ("error", "message", "detail"):
        if isinstance(message, dict) and message.get(key):
            message = message[key]
    if message is None:
        return _decoded(raw)
    return message if isinstance(message, str) else json.dumps(message)


def _decoded(raw: bytes) -> str:
    return raw[:_MAX_ERROR_BYTES].decode(errors="replace")
