"""Redaction of server messages: nothing that looks like an API key reaches an error or a log.

A message is cut before it is cleaned, so that a server cannot keep a client busy with a long one.
"""

from __future__ import annotations

import re

from plad_dist.untrusted import harmless

_SECRETS = re.compile(
    r"(?P<scheme>\b(?:bearer|basic)\s+)[^\s\"',;]+|\b(?:sk|pk|rk|gsk|hf|xai|nvapi)[-_][\w*.-]{6,}", re.IGNORECASE
)
_MAX_CHARACTERS = 300
_MAX_READ = 4096  # characters of a message that are looked at
_KEY_PIECE = 8
_SHORTEST_SECRET = 4  # a shorter value, such as a region in a header, protects nothing


def redacted(text: str, *secrets: str | None) -> str:
    """Return a server's text on one line, cut to a readable length, with secrets replaced by `***`.

    Secrets are the given ones, each piece of eight characters of them, and anything in the form of
    a key, an authorization header or a password in a URL. They are replaced before the text is cut
    to its final length. What a terminal would obey is dropped.
    """
    is_cut = len(text) > _MAX_READ
    # Harmless first: control characters within a key would hide it from the patterns.
    text = " ".join(harmless(without_surrogates(text[:_MAX_READ])).split())
    if is_cut:
        text = _without_remnant(text)
    for secret in secrets:
        if not secret or len(secret) < _SHORTEST_SECRET:
            continue
        text = text.replace(secret, "***")
        for start in range(len(secret) - _KEY_PIECE + 1):
            text = text.replace(secret[start : start + _KEY_PIECE], "***")
    text = " ".join(map(_without_password, text.split(" ")))
    text = _SECRETS.sub(lambda match: f"{match['scheme'] or ''}***", text)
    return f"{text[:_MAX_CHARACTERS]}..." if is_cut or len(text) > _MAX_CHARACTERS else text


def _without_remnant(text: str) -> str:
    """Return a cut text without its last word, which may be the beginning of a secret."""
    start, _, word = text.rpartition(" ")
    return start or word[:-_MAX_CHARACTERS]


def _without_password(word: str) -> str:
    """Return a word without what stands before the host of a URL in it."""
    scheme, separator, rest = word.partition("://")
    return f"{scheme}://***{rest.rpartition('@')[2]}" if separator and "@" in rest else word


def without_surrogates(text: str) -> str:
    """Replace lone surrogates: a response cut within an emoji ends with one, and UTF-8 has none."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
