"""The backend of a sampling actor whose model is behind a server."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from plad_dist.compat.linux import process_began
from plad_dist.config import Decoding, Endpoint, Model
from plad_dist.data.chat_templates import config_template
from plad_dist.data.conversation import Conversation, Messages, to_json, with_full_calls
from plad_dist.data.dataset import Dataset
from plad_dist.data.reasoning import opened_tag
from plad_dist.errors import UserError
from plad_dist.fleet.protocol import StopStageError
from plad_dist.sampling.backend import Completion, Keep, RefusedPromptError, Response, SampleNumber
from plad_dist.sampling.endpoint.batch import BlockRequests
from plad_dist.sampling.endpoint.batch_record import BatchLedger
from plad_dist.sampling.endpoint.client import EndpointClient
from plad_dist.sampling.endpoint.errors import EndpointStoppedError
from plad_dist.sampling.endpoint.ledger import Ledger, spent_before
from plad_dist.sampling.endpoint.request import make_request
from plad_dist.sampling.thoughts import Separate, tags_of_prompt, tags_of_server, with_thought
from plad_dist.timeline import StartClock

_DRAIN_S = 20.0
_SUPERSEDED_DRAIN_S = 2.0  # well below the time for which a driver that was superseded waits for its actors


class EndpointBackend:
    """Responses of an OpenAI-compatible server.

    Args:
        name: the model's name at the server.
        outputs: datasets that the endpoint fills, each with the blocks assigned to it. What these
            blocks had cost before there was a ledger counts towards the spending cap.
        payer: name of the ledger.
    """

    paid, dead = True, False
    fatal: tuple[type[Exception], ...] = (StopStageError, UserError)

    def __init__(
        self,
        settings: Model,
        name: str,
        outputs: Sequence[tuple[Dataset, Collection[int]]],
        payer: str = "endpoint",
    ) -> None:
        assert settings.endpoint is not None
        self.path: str | None = name
        self.start = StartClock(process_began())
        self._settings, self._endpoint = settings, _with_template_kwargs(settings)
        self._client = EndpointClient(self._endpoint, ledger=_ledger_of(self._endpoint, outputs, payer))
        self._template = config_template(settings, name) if settings.template else None

    @property
    def retries(self) -> int:
        return self._client.retries

    @property
    def tokens(self) -> int:
        """Pieces of responses received so far, so that a long response is seen to grow."""
        return self._client.events

    @property
    def takes_n(self) -> bool:
        """True if several responses may be drawn in one request."""
        return self._client.takes_n

    async def check(self) -> str | None:
        """Return what the user must correct, None if the key is set and the server responds."""
        self.start.end("process")
        problem = await self._client.check()
        self.start.end("server")
        return problem

    def render(self, prompts: Sequence[Conversation]) -> Sequence[Any]:
        """Return messages for `api: chat`, and rendered texts for `api: completions`."""
        return [self._render_one(prompt) for prompt in prompts]

    def _render_one(self, prompt: Conversation) -> Messages | str | UserError:
        if self._template is None:
            return [_as_sent(message) for message in with_full_calls(prompt.messages)]
        try:
            return self._template.render(prompt)
        except UserError as error:
            return error

    async def complete(self, prompt: Any, decoding: Decoding, seed: int, request_id: str) -> Completion:
        """Draw one response.

        Raises:
            RefusedPromptError: the server does not respond to this prompt.
            StopStageError: the server is down, the spending cap is reached, or the client is
                closed.
            UserError: the user must correct the key, the address, the model or the account.
        """
        try:
            completion = await self._client.complete(prompt, decoding, seed)
        except EndpointStoppedError as error:
            raise StopStageError(str(error), error.cost) from None
        return with_thought(completion, self._settings, self._separate(prompt))

    async def complete_many(
        self, prompt: Any, decoding: Decoding, seeds: Sequence[int], request_id: str
    ) -> tuple[list[Completion | RefusedPromptError | None], float]:
        """Draw several responses in one request: see :meth:`EndpointClient.complete_many`.

        Raises:
            Exception: as :meth:`complete`.
        """
        try:
            outcomes, lost_cost = await self._client.complete_many(prompt, decoding, seeds)
        except EndpointStoppedError as error:
            raise StopStageError(str(error), error.cost) from None
        return [outcome and self._with_thought(outcome, prompt) for outcome in outcomes], lost_cost

    def _with_thought(self, outcome: Completion | RefusedPromptError, prompt: Any) -> Completion | RefusedPromptError:
        """Return an outcome with its thought apart, or its refusal."""
        if isinstance(outcome, RefusedPromptError):
            return outcome
        try:
            return with_thought(outcome, self._settings, self._separate(prompt))
        except RefusedPromptError as refusal:
            return refusal

    def _separate(self, prompt: Any) -> Separate:
        return tags_of_prompt(opened_tag(prompt)) if isinstance(prompt, str) else tags_of_server

    async def draw_block(
        self,
        dataset: Dataset,
        block: int,
        fingerprint: str,
        decoding: Decoding,
        requests: Mapping[SampleNumber, tuple[Any, int]],
        keep: Keep,
    ) -> None:
        """Draw samples through the provider's batches with `mode: batch`.

        With `mode: realtime`, only batches in flight are taken to their end, which a command with
        `mode: batch` has left.

        Raises:
            Exception: as :meth:`complete`.
        """
        ledger = BatchLedger(dataset, block, fingerprint)
        is_batch = self._endpoint.mode == "batch"
        if not is_batch and not await asyncio.to_thread(ledger.open_records):
            return
        pending = {
            number: make_request(self._endpoint, prompt, decoding, seed) for number, (prompt, seed) in requests.items()
        }

        async def keep_separated(
            outcomes: Mapping[SampleNumber, Completion | RefusedPromptError], lost_cost: float
        ) -> None:
            prompts = {number: prompt for number, (prompt, _) in requests.items()}
            separated = {
                number: self._with_thought(outcome, prompts.get(number)) for number, outcome in outcomes.items()
            }
            await keep(separated, lost_cost)

        block_requests = BlockRequests(ledger, pending, keep_separated)
        try:
            if is_batch:
                await self._client.batches.draw(block_requests)
            else:
                await self._client.batches.finish(block_requests, may_submit=False)
        except EndpointStoppedError as error:
            raise StopStageError(str(error), error.cost) from None

    async def score(self, prompt: Any, response: Response, request_id: str) -> Completion:
        """Raise :class:`RefusedPromptError`: servers report no likelihood of a given response."""
        raise RefusedPromptError(f"{self.path}: a server reports no likelihood of a given response")

    async def load_weights(self, path: str) -> None:
        """Do nothing: the weights are the server's."""

    async def close(self) -> None:
        """Send nothing more, and wait briefly for the responses in flight, which are paid for."""
        await self._client.close(_SUPERSEDED_DRAIN_S if await self._client.is_superseded() else _DRAIN_S)


def _ledger_of(endpoint: Endpoint, outputs: Sequence[tuple[Dataset, Collection[int]]], payer: str) -> Ledger | None:
    """Return the ledger of a paid endpoint."""
    if not outputs or (endpoint.input_price is None and endpoint.output_price is None):
        return None
    ledger = Ledger(outputs[0][0].storage, payer)
    ledger.start(lambda: spent_before(outputs))
    return ledger


def _with_template_kwargs(settings: Model) -> Endpoint:
    """Return the endpoint of a model, with the variables of its chat template in every request."""
    endpoint, kwargs = settings.endpoint, settings.template_kwargs
    assert endpoint is not None
    if not kwargs or endpoint.api == "completions":  # then the template is rendered here
        return endpoint
    return endpoint.model_copy(update={"extra_body": {"chat_template_kwargs": kwargs, **endpoint.extra_body}})


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as the API takes it: arguments of tool calls are texts of JSON."""
    if "tool_calls" not in message:
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else to_json({} if arguments is None else arguments)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}
