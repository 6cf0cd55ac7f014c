"""The interface between the sampling actor and an engine or a server that responds to prompts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from plad_dist.config import Decoding
from plad_dist.data.conversation import Conversation
from plad_dist.data.dataset import Dataset
from plad_dist.timeline import StartClock

SampleNumber = tuple[int, int]  # row of a block, sample_index


class RefusedPromptError(ValueError):
    """The backend will never respond to this prompt, which becomes an error row.

    Attributes:
        cost: money that the refused requests cost.
    """

    def __init__(self, message: str, cost: float = 0.0) -> None:
        super().__init__(message)
        self.cost = cost


@dataclass(frozen=True, slots=True)
class Completion:
    """One response, drawn or scored.

    Attributes:
        token_ids: empty if the backend does not reveal them.
        logprob: log-likelihood of the tokens in nats, None if the backend does not reveal it.
        finish_reason: `stop`, `length` or `error`.
        prompt_tokens: tokens of the prompt.
        cost: money paid for it.
        reasoning: thought of a model that thinks before it answers, None without one. `text` is
            then the answer alone, while the tokens are those of both.
    """

    text: str
    token_ids: Sequence[int]
    num_tokens: int
    logprob: float | None
    finish_reason: str
    prompt_tokens: int = 0
    cost: float = 0.0
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """A stored response to score.

    Attributes:
        token_ids: empty if they belong to another model; the text is then tokenized.
        finish_reason: `stop`, `length` or `error`.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: str


class Backend(Protocol):
    """An engine of this process, or the client of a server.

    Attributes:
        path: folder or name of the present weights, None while they change.
        paid: True if responses cost money, so that none may be lost.
        retries: requests that were repeated.
        fatal: exceptions of :meth:`complete` that end the stage.
        start: clock of the latest start, or change of weights.
    """

    path: str | None
    paid: bool
    retries: int
    fatal: tuple[type[Exception], ...]
    start: StartClock

    @property
    def dead(self) -> bool:
        """True if the backend will not respond any more."""

    @property
    def tokens(self) -> int:
        """Number of tokens generated for unfinished responses, 0 if it is unknown."""

    async def check(self) -> str | None:
        """Return what the user must change, or None if the backend is ready."""

    def render(self, prompts: Sequence[Conversation]) -> Sequence[Any]:
        """Return prompts in the form that :meth:`complete` takes.

        A prompt that cannot be rendered is replaced by its exception.
        """

    async def complete(self, prompt: Any, decoding: Decoding, seed: int, request_id: str) -> Completion:
        """Draw one response.

        Raises:
            RefusedPromptError: the backend will never respond to this prompt.
        """

    async def score(self, prompt: Any, response: Response, request_id: str) -> Completion:
        """Return a response with its log-likelihood.

        Raises:
            RefusedPromptError: the backend cannot compute it.
        """

    async def load_weights(self, path: str) -> None:
        """Respond with other weights of the same architecture from now on."""

    async def close(self) -> None:
        """Release all processes and connections."""


@runtime_checkable
class DrawsMany(Protocol):
    """A backend that can draw several responses to a prompt in one request."""

    @property
    def takes_n(self) -> bool:
        """True as long as such requests are of use."""

    async def complete_many(
        self, prompt: Any, decoding: Decoding, seeds: Sequence[int], request_id: str
    ) -> tuple[list[Completion | RefusedPromptError | None], float]:
        """Draw several responses.

        Returns:
            An outcome for each seed, None for a response that must be drawn alone, and money that
            was spent without an outcome.

        Raises:
            RefusedPromptError: the backend will never respond to this prompt.
        """


# Puts outcomes, and money that was spent without one, into storage.
Keep = Callable[[Mapping[SampleNumber, Completion | RefusedPromptError], float], Awaitable[None]]


@runtime_checkable
class DrawsBlocks(Protocol):
    """A backend that can draw the samples of a block before they are asked for one by one."""

    async def draw_block(
        self,
        dataset: Dataset,
        block: int,
        fingerprint: str,
        decoding: Decoding,
        requests: Mapping[SampleNumber, tuple[Any, int]],
        keep: Keep,
    ) -> None:
        """Draw samples of a block and keep them, or only those that were ordered before.

        Args:
            dataset: dataset of the samples, in whose folder the backend may keep records.
            requests: prompt and seed of each missing sample.
        """
