"""A response as scorers receive it: part of the public API, for `pairing.score_function`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from plad_dist.data.conversation import Messages, Tools


class Answer(TypedDict):
    """One response with its prompt.

    Attributes:
        messages: chat messages of the prompt.
        tools: definitions of the tools that the prompt offers, None without.
        reference: gold response to the prompt, None without one.
        response: text of the response.
        role: teacher or student, as whose response it enters pairs; in an evaluation, the name of
            the system.
    """

    messages: Messages
    tools: Tools | None
    reference: str | None
    response: str
    role: str


# Takes responses, returns a finite number for each, or None for a response without a score.
Scorer = Callable[[list[Answer]], list[float | None]]
