"""Recognition of secrets in a config, which is written to `run.yaml`, reports and model cards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

# Last words of names whose values are secrets. `max_tokens`, `bos_token` and `token_ids` are none.
_NAMES = re.compile(
    r"(?:.*_)?(?:api_?keys?|(?:private|access|secret|account|signing|encryption)_?key(?:_id)?|authorization|password"
    r"|passwd|passphrase|pwd|secrets?|credentials?|cookie|jwt|bearer|subscription_?key)"
    r"|(?:.*_)?(?:access|api|auth|bearer|hf|hub|huggingface|github|id|refresh|secret|security|session|wandb)_?token"
    r"|token|auth"
)
_VALUES = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|nvapi)[-_][A-Za-z0-9_-]{10,}|\bhf_[A-Za-z0-9]{10,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}|\bglpat-[\w-]{10,}"
    r"|^\s*(?:bearer|basic)\s+\S{6,}\s*$|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)
# In values such as paths and names of models, only what can hardly be anything else.
_SURE_VALUES = re.compile(
    r"^(?:sk|pk|rk|gsk|xai|nvapi)-[A-Za-z0-9]{10,}$"
    r"|(?<![\w./-])(?:sk|pk|rk|gsk|xai|nvapi)[-_](?=\S*\d)(?=\S*[A-Z])(?=\S*[a-z])[\w-]{20,}"
    r"|(?<![\w./-])(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}\b|glpat-[\w-]{20,})"
    r"|^\s*[Bb]earer\s+\S{6,}\s*$|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_MARKER = re.compile(r"[<\[].*[>\]]")  # a special token of a model, such as <|user|>
_PASSWORD = re.compile(r"://[^\s/@:]*:[^\s/@]+@")
_SHORTEST = 8  # characters of a variable's value that is taken for a secret
_LONG = 16  # from which a secret is also found within a text
ADVICE = (
    "a config is written to run.yaml and reports. Remove it: keys of servers are named by `api_key_env`, "
    "`api_key_file`, `api_key_command` or `headers_env`, and the hub reads the HF_TOKEN environment variable"
)


def secret_location(value: Any, *, is_free: bool = False) -> str | None:
    """Return the key of a secret in a value at any depth, None without one.

    Args:
        is_free: the value has no schema, so its names count too, and more of its values.
    """
    return next(_secrets(value, "", _environment(), is_free), None)


def _secrets(value: Any, location: str, known: tuple[str, ...], is_free: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            key = f"{location}.{name}" if location else str(name)
            if is_free and _is_secret_name(str(name)) and _can_be_secret(item):
                yield key
            yield from _secrets(str(name), f"{location}.*" if location else "*", known, is_free)
            yield from _secrets(item, key, known, is_free)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _secrets(item, f"{location}.{index}" if location else str(index), known, is_free)
    elif isinstance(value, str) and (
        any(value == secret or (len(secret) >= _LONG and secret in value) for secret in known)
        or (_VALUES if is_free else _SURE_VALUES).search(value)
        or _PASSWORD.search(value)
    ):
        yield location


def _can_be_secret(value: Any) -> bool:
    if isinstance(value, str):
        return value != "" and _MARKER.fullmatch(value) is None
    return value is not None and not isinstance(value, bool | dict)


@lru_cache(maxsize=4096)  # every section of a config looks at the same names, those of the environment too
def _is_secret_name(name: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return _NAMES.fullmatch(re.sub(r"[^a-z0-9]+", "_", snake).removeprefix("x_")) is not None


def _environment() -> tuple[str, ...]:
    """Return the values of environment variables whose names are those of secrets.

    Paths are none: PWD is the working directory, and GOOGLE_APPLICATION_CREDENTIALS names a file.
    """
    return tuple(
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _is_secret_name(name) and not value.startswith(("/", "~", "."))
    )
