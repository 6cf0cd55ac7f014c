"""Recognition of secrets in a config, which is written to `run.yaml`, reports and model cards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

# Last words of names whose values are secrets. `max_tokens`, `bos_token` and `token_ids` are none.
_NAMES = re.compile(
    r"(?:.*_)?(?:api_?keys?|(?:private|access|secret|account|signing|encryption)_?key(?:_id)?|authorization|password"
    r"|passwd|passphrase|pwd|secrets?|credentials?|cookie|jwt|bearer|subscription_?key)"
    r"|(?:.*_)?(?:access|api|auth|bearer|hf|hub|huggingface|github|id|refresh|secret|security|session|user|wandb)_?token"
    r"|token|auth"
)
_VALUES = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|nvapi)[-_][A-Za-z0-9_-]{10,}|\bhf_[A-Za-z0-9]{10,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}|\bglpat-[\w-]{10,}"
    r"|^\s*(?:bearer|basic)\s+\S{6,}\s*$|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"://[^\s/@:]*:[^\s/@]+@")
_SHORTEST = 8  # characters of a variable's value that is taken for a secret
_LONG = 16  # from which a secret is also found within a text
ADVICE = (
    "a config is written to run.yaml and reports. Remove it: keys of servers are named by `api_key_env`, "
    "`api_key_file`, `api_key_command` or `headers_env`, and the hub reads the HF_TOKEN environment variable"
)


def secret_location(value: Any, *, names: bool = False) -> str | None:
    """Return the key of a secret in a value at any depth, None without one.

    Args:
        names: also take values for secrets because of their names.
    """
    return next(_secrets(value, "", _environment(), names), None)


def _secrets(value: Any, location: str, known: tuple[str, ...], names: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            key = f"{location}.{name}" if location else str(name)
            if names and _is_secret_name(str(name)) and item not in (None, "") and not isinstance(item, bool | dict):
                yield key
            yield from _secrets(str(name), f"{location}.*" if location else "*", known, names)
            yield from _secrets(item, key, known, names)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _secrets(item, f"{location}.{index}" if location else str(index), known, names)
    elif isinstance(value, str) and (
        any(value == secret or (len(secret) >= _LONG and secret in value) for secret in known)
        or _VALUES.search(value)
        or _PASSWORD.search(value)
    ):
        yield location


def _is_secret_name(name: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return _NAMES.fullmatch(re.sub(r"[^a-z0-9]+", "_", snake).removeprefix("x_")) is not None


def _environment() -> tuple[str, ...]:
    """Return the values of environment variables whose names are those of secrets."""
    return tuple(value for name, value in os.environ.items() if len(value) >= _SHORTEST and _is_secret_name(name))
