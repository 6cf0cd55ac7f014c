"""Redaction of server messages: nothing that looks like an API key reaches an error or a log."""

from __future__ import annotations

import re

_SECRETS = re.compile(
    r"(?P<scheme>\b(?:bearer|basic)\s+)[^\s\"',;]+|\b(?:sk|pk|rk|gsk|hf|xai|nvapi)[-_][\w*.-]{6,}|(?<=://)\S+@",
    re.IGNORECASE,
)
_MAX_CHARACTERS = 300
_KEY_PIECE = 8
_SHORTEST_SECRET = 4  # a shorter value, such as a region in a header, protects nothing


def redacted(text: str, *secrets: str | None) -> str:
    """Return a server's text on one line, cut to a readable length, with secrets replaced by `***`.

    Secrets are the given ones, each piece of eight characters of them, and anything in the form of
    a key, an authorization header or a password in a URL. They are replaced before the text is cut.
    """
    text = " ".join(without_surrogates(text).split())
    for secret in secrets:
        if not secret or len(secret) < _SHORTEST_SECRET:
            continue
        text = text.replace(secret, "***")
        for start in range(len(secret) - _KEY_PIECE + 1):
            text = text.replace(secret[start : start + _KEY_PIECE], "***")
    text = _SECRETS.sub(lambda match: f"{match['scheme'] or ''}***", text)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def without_surrogates(text: str) -> str:
    """Replace lone surrogates: a response cut within an emoji ends with one, and UTF-8 has none."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
