"""Several responses from one request: whether the server takes `n`, and how the bill is divided."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise

from plad_dist.config import Endpoint
from plad_dist.sampling.backend import Completion, RefusedPromptError
from plad_dist.sampling.endpoint.reply import Failure, Reply
from plad_dist.sampling.endpoint.usage import Usage

logger = logging.getLogger("plad")


class ManyChoices:
    """Record of whether a server returns several choices for one request.

    A request with `n` may be refused because of `n` or because of its prompt. `n` is at fault if a
    single response to a prompt succeeds afterwards, before any request with `n` has.

    Attributes:
        are_possible: False once requests with `n` are of no use.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._url, self.are_possible = endpoint.url, endpoint.n_in_one_request
        self._is_proven = self._is_doubted = False

    def note_many(self, returned: int, asked: int) -> None:
        """Note that a request for several choices has returned some, or was refused."""
        self._is_proven = self._is_proven or returned > 1
        if not returned:
            self._is_doubted = True
        elif returned == 1 and not self._is_proven:
            self._give_up(f"returns one of {asked} responses")

    def note_single(self) -> None:
        """Note that a request for one choice has succeeded."""
        if self._is_doubted and not self._is_proven:
            self._give_up("refuses requests for several responses")

    def _give_up(self, reason: str) -> None:
        if self.are_possible:
            logger.warning(
                "%s: the server %s, so each response is a request from here on, and each pays for its prompt",
                self._url,
                reason,
            )
        self.are_possible = False


def completions_of(
    model: str, choices: Sequence[Reply | Failure], usage: Usage, cost: float
) -> list[Completion | RefusedPromptError | None]:
    """Return the outcome of each choice, None for one that must be asked for again.

    The replies share the bill, which is of the whole request: the first one carries the tokens of
    the prompt, and the tokens of the responses are divided by the lengths of the texts.
    """
    replies = [choice for choice in choices if isinstance(choice, Reply)]
    lengths = [1 + len(reply.text) + len(reply.reasoning or "") for reply in replies]
    tokens, costs = iter(_shares(usage.completion_tokens, lengths)), iter(_shares_of_cost(cost, lengths))
    outcomes: list[Completion | RefusedPromptError | None] = []
    prompt_tokens = usage.prompt_tokens
    for choice in choices:
        if isinstance(choice, Failure):
            is_refused = choice.kind == "refused"
            outcomes.append(RefusedPromptError(f"{model}: {choice.text}") if is_refused else None)
            continue
        outcomes.append(
            Completion(
                text=choice.text,
                token_ids=[],
                num_tokens=next(tokens),
                logprob=None,
                finish_reason=choice.finish_reason,
                prompt_tokens=prompt_tokens,
                cost=next(costs),
                reasoning=choice.reasoning,
            )
        )
        prompt_tokens = 0
    return outcomes


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Divide a number in proportion to weights into integers that add up to it."""
    bounds = [total * part // sum(weights) for part in accumulate(weights, initial=0)]
    return [end - start for start, end in pairwise(bounds)]


def _shares_of_cost(total: float, weights: Sequence[int]) -> list[float]:
    """Divide money in proportion to weights; the last share is the rest."""
    shares = [total * weight / sum(weights) for weight in weights[:-1]]
    return [*shares, total - sum(shares)]
