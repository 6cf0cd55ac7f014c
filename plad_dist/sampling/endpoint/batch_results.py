"""Results of a batch: what its files say about each request."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plad_dist.config import Endpoint
from plad_dist.sampling.backend import Completion, RefusedPromptError, SampleNumber
from plad_dist.sampling.endpoint.batch_api import custom_id
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.choices import completions_of
from plad_dist.sampling.endpoint.reply import Failure, Outcome, Reply, read_replies
from plad_dist.sampling.endpoint.request import CompletionRequest
from plad_dist.untrusted import parse_json

_UNPROCESSED = ("batch_expired", "batch_cancelled", "batch_canceled")  # requests that the model never saw
_FULL_QUEUE = re.compile(r"token_limit_exceeded|enqueued|rate.?limit|too many|try again", re.IGNORECASE)


@dataclass(slots=True)
class BatchResults:
    """Results of a batch.

    Attributes:
        outcomes: what is known for good.
        cost: money that the batch has cost.
        lost_cost: part of it that brought no outcome.
        failure: reason why the stage must stop, or why the batch as a whole has failed.
    """

    outcomes: dict[SampleNumber, Completion | RefusedPromptError] = field(default_factory=dict)
    cost: float = 0.0
    lost_cost: float = 0.0
    failure: Failure | None = None


class ResultReader:
    """Reads the results of batches and counts their cost."""

    def __init__(self, endpoint: Endpoint, budget: Budget, redact: Callable[[str], str]) -> None:
        self._endpoint, self._budget, self._redact = endpoint, budget, redact
        self._successes = 0

    def read(
        self,
        lines: Mapping[str, Mapping[str, Any]],
        requests: Mapping[SampleNumber, CompletionRequest],
        tries: Counter[SampleNumber],
    ) -> BatchResults:
        """Read the lines of a batch. A request without a line has no outcome.

        Args:
            lines: by the names of the requests.
            tries: failures of each request so far, to which those of the batch are added.
        """
        results, refusals = BatchResults(), list[Failure]()
        for key, request in requests.items():
            outcome = self._read_line(lines.get(custom_id(key)), request)
            if outcome is None:
                continue
            cost = self._cost_of(outcome, request)
            results.cost += cost
            if not isinstance(outcome, Failure):
                self._successes += 1
                results.outcomes[key] = self._completion(outcome, request, cost)
                continue
            if outcome.kind == "blocked":
                results.failure = outcome
            elif outcome.kind == "refused":
                refusals.append(outcome)
            reason = self._reason_to_give_up(outcome, key, tries)
            if reason is None:
                results.lost_cost += cost
            else:
                results.outcomes[key] = RefusedPromptError(f"{self._endpoint.model}: {reason}", cost)
        if not self._successes and refusals and all(failure.status >= 400 for failure in refusals):
            # Perhaps the server refuses every request, so that the prompts are not at fault.
            results.lost_cost, results.outcomes, results.failure = results.cost, {}, refusals[0]
        return results

    def _read_line(self, line: Mapping[str, Any] | None, request: CompletionRequest) -> Outcome | None:
        """Return the outcome of a request, None if the batch ended before it was processed."""
        response = (line or {}).get("response")
        if isinstance(response, dict) and response.get("body") is not None:
            status = response.get("status_code")
            status = status if isinstance(status, int) and 100 <= status <= 599 else 200
            return read_replies(status, json.dumps(response.get("body")).encode(), request.max_tokens, self._redact)
        error = (line or {}).get("error")
        if not isinstance(error, dict) or str(error.get("code")) in _UNPROCESSED:
            return None
        return Failure("transient", self._redact(f"{error.get('code')}: {error.get('message')}"))

    def _cost_of(self, outcome: Outcome, request: CompletionRequest) -> float:
        """Return the cost of a request, the worst one if the server does not report its tokens."""
        worst_cost = self._budget.worst_cost(request.worst_usage)
        replies = [] if isinstance(outcome, Failure) else [reply for reply in outcome if isinstance(reply, Reply)]
        usage = request.possible(outcome.usage if isinstance(outcome, Failure) else replies[0].usage)
        cost = worst_cost if usage is None else self._budget.cost(usage)
        if replies:
            self._budget.learn(worst_cost, cost)
        return cost

    def _completion(self, outcome: list[Reply | Failure], request: CompletionRequest, cost: float) -> Completion:
        reply = next(choice for choice in outcome if isinstance(choice, Reply))
        usage = request.possible(reply.usage) or request.worst_usage
        (completion,) = completions_of(self._endpoint.model, [reply], usage, cost)
        assert isinstance(completion, Completion)
        return completion

    def _reason_to_give_up(self, failure: Failure, key: SampleNumber, tries: Counter[SampleNumber]) -> str | None:
        """Return why a request becomes an error row, None if it is sent again."""
        if failure.kind == "refused":
            return failure.text
        tries[key] += failure.kind != "blocked"
        if tries[key] > self._endpoint.max_retries and self._successes:
            return f"no usable response in {tries[key]} batches; the last failure: {failure.text}"
        return None


def lines_of(content: bytes) -> Mapping[str, dict[str, Any]]:
    """Return the lines of files of results by the names of their requests; the first counts."""
    lines: dict[str, dict[str, Any]] = {}
    for text in content.splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue  # its request counts as not answered
        if isinstance(line, dict):
            lines.setdefault(str(line.get("custom_id")), line)
    return lines


def failure_of(state: Mapping[str, Any], redact: Callable[[str], str]) -> Failure:
    """Return why a batch as a whole has failed."""
    errors = state.get("errors")
    errors = errors.get("data") if isinstance(errors, dict) else errors
    text = redact(f"the batch has failed: {json.dumps(errors)}")
    return Failure("throttled" if _FULL_QUEUE.search(text) else "refused", text, 400)
