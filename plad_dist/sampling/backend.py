"""What answers prompts: the protocol of an engine or a server, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from plad_dist.config import Decoding
from plad_dist.data.templates import Messages


class RefusedPromptError(ValueError):
    """The engine will not answer this prompt, now or ever: it becomes an error row. `cost`: what asking cost all the same."""

    def __init__(self, message: str, cost: float = 0.0) -> None:
        super().__init__(message)
        self.cost = cost


@dataclass(frozen=True, slots=True)
class Completion:
    """One response. `finish_reason` is stop, length or error; `token_ids` are empty where the engine keeps them to itself."""

    text: str
    token_ids: Sequence[int]
    num_tokens: int
    logprob: float | None
    finish_reason: str
    prompt_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Response:
    """A response that is scored. `token_ids` are empty where they are another model's: its text is tokenized then."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str


class Backend(Protocol):
    """What answers prompts: an engine of this process, or a server.

    Attributes:
        path: where the weights are that it answers with.
        paid: answers cost money, so that none may be lost.
        dead: it will not answer any more.
        tokens: written of the responses under way, 0 where that is not known.
        retries: requests that were tried again.
        fatal: errors of :meth:`complete` that end the stage.
    """

    path: str | None
    paid: bool
    retries: int
    fatal: tuple[type[Exception], ...]

    @property
    def dead(self) -> bool: ...

    @property
    def tokens(self) -> int: ...

    async def check(self) -> str | None:
        """What the user must mend before anything is asked, None where all is well."""

    def render(self, prompts: Sequence[Messages]) -> Sequence[Any]:
        """Prompts as :meth:`complete` takes them; an exception in the place of one that cannot be rendered."""

    async def complete(self, prompt: Any, decoding: Decoding, seed: int, request_id: str) -> Completion:
        """Draw one response. Raises :class:`RefusedPromptError` for a prompt that will never be answered."""

    async def score(self, prompt: Any, response: Response, request_id: str) -> Completion:
        """A given response with its log-likelihood. Raises :class:`RefusedPromptError` where it has none."""

    async def load_weights(self, path: str) -> None:
        """Answer with other weights of the same architecture."""

    async def close(self) -> None:
        """End it."""
