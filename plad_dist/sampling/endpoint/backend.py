"""A teacher behind a server, as the sampling actor uses it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from plad_dist.config import Decoding, Model
from plad_dist.data.dataset import Dataset
from plad_dist.data.templates import Messages, compile_template, render
from plad_dist.errors import UserError
from plad_dist.fleet.protocol import StopStageError
from plad_dist.sampling.backend import Completion, RefusedPromptError, Response
from plad_dist.sampling.endpoint.client import ClientClosedError, EndpointClient, EndpointDownError, SpendingCapReached
from plad_dist.sampling.spool import total_cost

_DRAIN_S = 20.0
MICRO = 1_000_000  # costs are counted in millionths, which add up exactly


class EndpointBackend:
    """Answers of an OpenAI-compatible server.

    Args:
        name: the model's name there.
        outputs: datasets that it fills, each with the blocks that are its own: what they have cost counts towards the cap.
    """

    paid, dead, tokens = True, False, 0
    fatal: tuple[type[Exception], ...] = (StopStageError, UserError)

    def __init__(self, settings: Model, name: str, outputs: Sequence[tuple[Dataset, Collection[int]]]) -> None:
        assert settings.endpoint is not None
        self.path: str | None = name
        self._client = EndpointClient(settings.endpoint, spent=spent_on(outputs))
        self._template = compile_template(settings.template, name) if settings.template else None

    @property
    def retries(self) -> int:
        return self._client.retries

    async def check(self) -> str | None:
        """Whether the key is there and the server answers."""
        return await self._client.check()

    def render(self, prompts: Sequence[Messages]) -> Sequence[Any]:
        """Messages as they are, or texts where the server is asked for completions."""
        return [self._rendered(messages) for messages in prompts]

    def _rendered(self, messages: Messages) -> Messages | str | UserError:
        if self._template is None:
            return [dict(message) for message in messages]
        try:
            return render(self._template, messages, str(self.path))
        except UserError as error:
            return error

    async def complete(self, prompt: Any, decoding: Decoding, seed: int, request_id: str) -> Completion:
        """Draw one response.

        Raises:
            RefusedPromptError: the server does not answer this prompt.
            StopStageError: the server is down, or the money is spent.
        """
        try:
            answer = await self._client.complete(prompt, decoding, seed)
        except (ClientClosedError, EndpointDownError, SpendingCapReached) as error:
            raise StopStageError(str(error), getattr(error, "cost", 0.0)) from None
        return Completion(
            text=answer.text,
            token_ids=[],
            num_tokens=answer.completion_tokens,
            logprob=None,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            cost=answer.cost,
        )

    async def score(self, prompt: Any, response: Response, request_id: str) -> Completion:
        """Servers give no likelihoods of what they did not write."""
        raise RefusedPromptError(f"{self.path}: a server gives no likelihood of a given response")

    async def load_weights(self, path: str) -> None:
        """A server has the weights that it has."""

    async def close(self) -> None:
        """Ask nothing more, and wait a little for the answers under way: they are paid for."""
        await self._client.close(_DRAIN_S)


def spent_on(outputs: Sequence[tuple[Dataset, Collection[int]]]) -> float:
    """Money that these blocks of these datasets have cost, committed and spooled."""
    spent = 0.0
    for dataset, blocks in outputs:
        manifest = dataset.manifest()
        if manifest is not None:
            parts = dict(enumerate(manifest.parts))
        else:
            parts = dataset.committed_parts()
            spent += total_cost(dataset, blocks)
        spent += sum(parts[block].counts.get("cost_micros", 0) for block in blocks if block in parts) / MICRO
    return spent
