"""Requests to the engine of transformers, and responses in progress."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plad_dist.config import Decoding


@dataclass(frozen=True, eq=False)
class BatchRequest:
    """A response to draw, or a response to score.

    Attributes:
        prompt_ids: tokens of the prompt.
        result: gets the row of a drawn response, or the log-likelihood of a scored one.
        room: largest number of tokens of a drawn response.
        decoding: None to score.
        seed: seed of a drawn response.
        response_ids: tokens to score, which follow the prompt.
    """

    prompt_ids: Sequence[int]
    result: asyncio.Future[Any]
    room: int = 0
    decoding: Decoding | None = None
    seed: int = 0
    response_ids: Sequence[int] = ()

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of tokens of the prompt and of the response to score."""
        return len(self.prompt_ids), len(self.response_ids)

    @property
    def length(self) -> int:
        """Number of tokens that are known before anything is drawn."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(eq=False)
class BatchRow:
    """One response of a batch, while it is drawn.

    Attributes:
        min_tokens: number of tokens before which nothing ends it.
        max_tokens: number of tokens after which it is cut.
        token_ids: tokens so far, with the one that ends it.
        logprob: log-likelihood of the tokens in nats.
        text: text of a finished response, without what ended it.
        finish_reason: `stop` or `length`; None while it is drawn.
        is_dropped: True if nobody waits for it any more.
    """

    prompt_ids: Sequence[int]
    seed: int
    min_tokens: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    is_dropped: bool = False

    @property
    def is_done(self) -> bool:
        """True if no more tokens of it are drawn."""
        return self.is_dropped or self.finish_reason is not None
