"""Tokens that a server bills for a request, read from the `usage` of its response.

Servers report them in different ways. Reasoning tokens are part of `completion_tokens` at some, and
beside them at others, where only `total_tokens` has them. Cached tokens are part of the prompt,
except under the names of the Messages API, where they come on top of `input_tokens`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PROMPT, _COMPLETION = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")
_CACHED = ("prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens")
_MOST_TOKENS = 100_000_000  # no request has more, and sums of a few fit into 32 bits
_LONGEST_NUMBER = 32  # characters
_BESIDE_INPUT = ("cache_read_input_tokens", "cache_creation_input_tokens")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, as the server bills them.

    Attributes:
        completion_tokens: tokens of the response, its hidden reasoning included.
        cached_tokens: part of `prompt_tokens` that the server had in its cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens


NO_USAGE = Usage(0, 0)


def read_usage(usage: Any) -> Usage | None:
    """Return the billed tokens, or None if the report does not tell them.

    A total beyond prompt and completion is billed as output, as is reasoning that cannot be part of
    the completion. A report of no tokens at all tells nothing.
    """
    if not isinstance(usage, dict):
        return None
    prompt, completion, total = _first(usage, _PROMPT), _first(usage, _COMPLETION), _count(usage.get("total_tokens"))
    if prompt is not None and _count(usage.get("prompt_tokens")) is None:
        prompt += sum(_count(usage.get(name)) or 0 for name in _BESIDE_INPUT)
    if prompt is None and completion is not None and total is not None:
        prompt = max(0, total - completion)
    if prompt is None or (completion is None and total is None):
        return None
    completion, reasoning = completion or 0, _reasoning(usage)
    if total is not None:
        completion = max(completion, total - prompt)
    if reasoning > completion:
        completion += reasoning
    cached = max((_count(value) or 0 for value in _cached_counts(usage)), default=0)
    return Usage(prompt, completion, min(cached, prompt)) if prompt or completion else None


def _reasoning(usage: Mapping[str, Any]) -> int:
    counts = [_details(usage, name).get("reasoning_tokens") for name in _COMPLETION]
    return max(_count(value) or 0 for value in (*counts, usage.get("reasoning_tokens")))


def _cached_counts(usage: Mapping[str, Any]) -> list[Any]:
    return [_details(usage, name).get("cached_tokens") for name in _PROMPT] + [usage.get(name) for name in _CACHED]


def _details(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    details = usage.get(f"{name}_details")
    return details if isinstance(details, dict) else {}


def _first(usage: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((count for name in names if (count := _count(usage.get(name))) is not None), None)


def _count(value: Any) -> int | None:
    """Return a number of tokens, which may be sent as a float or as text, None without a possible
    one."""
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        return None
    return math.ceil(value)
