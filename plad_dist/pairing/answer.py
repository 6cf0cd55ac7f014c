"""A response as scorers see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict


class Answer(TypedDict):
    """One response with what it answers. `role`: teacher or student."""

    messages: list[dict[str, str]]
    reference: str | None
    response: str
    role: str


# A finite number for each answer, None for one that has no score.
Scorer = Callable[[list[Answer]], list[float | None]]
