"""Retry policy: `Retry-After`, backoff, and when a prompt or the whole stage is given up.

`RetryPolicy.decide` turns a failure into a decision, which the client carries out:

====================  ====================================================================
kind of failure       decision
====================  ====================================================================
transient             retry with backoff; after `max_retries` give up the prompt if others
                      succeeded meanwhile
throttled             pause all requests; after `give_up_after_s` give up the prompt if
                      others succeeded meanwhile
refused               an error row if the server responds to anything else
blocked               ask the user; an error row if a firewall rejects only this prompt
====================  ====================================================================

A prompt thus becomes an error row only if the server has responded to other prompts: while this one
failed, or at any time before if the server refuses this prompt for good. A refusal that is no HTTP
error needs no such proof. Otherwise the fault is the server's, and the outage rule decides when the
stage stops.
`Retry-After` pauses all requests of the client, not only the one that failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from plad_dist.sampling.endpoint.reply import Failure

_LONGEST_PAUSE_S = 30 * 24 * 3600.0  # that is taken from a server's word
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 60.0
_FIREWALL_STATUSES = (403, 404, 405, 410)


def backoff_s(failures: int, jitter: float) -> float:
    """Return the wait after a number of failures: exponential with full jitter.

    Args:
        jitter: random number in [0, 1).
    """
    return jitter * min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16))


def retry_after_s(headers: Mapping[str, str], wall: float) -> float | None:
    """Return the seconds that `Retry-After` asks for, None without a valid header.

    The header holds seconds or a date. A date is compared with the server's own clock (`Date`), so
    that a wrong clock of this machine does not change the pause.

    Args:
        wall: Unix time of this machine, used if the server sends no `Date`.
    """
    text = headers.get("Retry-After", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        until, server_now = _unix_time(text), _unix_time(headers.get("Date", ""))
        if until is None:
            return None
        seconds = until - (wall if server_now is None else server_now)
    return min(max(0.0, seconds), _LONGEST_PAUSE_S) if math.isfinite(seconds) else None


def _unix_time(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError, OSError):  # as the parser raises for some texts
        return None


@dataclass(slots=True)
class FailureHistory:
    """Failures of one prompt so far.

    Attributes:
        errors: failed tries that were not throttled.
        throttled: throttled tries.
        throttled_since: time of the first throttled try, None before it.
        successes_before: successful requests of the client when this prompt first failed.
    """

    errors: int = 0
    throttled: int = 0
    throttled_since: float | None = None
    successes_before: int | None = None

    @property
    def tries(self) -> int:
        """Failed tries."""
        return self.errors + self.throttled

    def add(self, failure: Failure, successes: int, now: float) -> None:
        if self.successes_before is None:
            self.successes_before = successes
        if failure.kind != "throttled":
            self.errors += 1
            return
        self.throttled += 1
        if self.throttled_since is None:
            self.throttled_since = now


@dataclass(frozen=True, slots=True)
class Retry:
    """Send the prompt again.

    Attributes:
        wait_s: seconds that this prompt waits while others continue.
        pause_until: time before which no request of the client is sent.
        stops_with_outage: the wait ends at the time at which an outage stops the stage.
    """

    wait_s: float = 0.0
    pause_until: float = -math.inf
    stops_with_outage: bool = False


@dataclass(frozen=True, slots=True)
class AskUser:
    """Stop the stage: the user must correct the key, the address, the model or the account."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Make the prompt an error row: the server has processed it and will not respond."""


@dataclass(frozen=True, slots=True)
class RefuseIfOthersSucceed:
    """Make the prompt an error row if the server responds to others; it may refuse every request.

    Attributes:
        successes: number of successful requests to exceed; otherwise a probe must succeed.
        otherwise: what to do if the server does not respond to others either.
    """

    successes: int
    otherwise: Retry


@dataclass(frozen=True, slots=True)
class GiveUpIfOthersSucceeded:
    """Make the prompt an error row if others succeeded since its first failure; its tries are over.

    Attributes:
        successes: number of successful requests to exceed.
        otherwise: what to do if nothing succeeded, so that the server is at fault.
        pause_until: time before which no request of the client is sent, not even a probe.
    """

    successes: int
    otherwise: Retry
    pause_until: float = -math.inf


Decision = Retry | AskUser | Refuse | RefuseIfOthersSucceed | GiveUpIfOthersSucceeded


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Decides on failed requests; the attributes are keys of the endpoint's config."""

    max_retries: int
    give_up_after_s: float

    def decide(self, failure: Failure, history: FailureHistory, successes: int, now: float, jitter: float) -> Decision:
        """Return the decision on a failed request.

        Args:
            history: failures of the prompt, including this one.
            successes: successful requests of the client so far.
            now: time of the failure.
            jitter: random number in [0, 1), for the backoff.
        """
        match failure.kind:
            case "transient":
                return self._decide_transient(failure, history, now, jitter)
            case "throttled":
                return self._decide_throttled(failure, history, now, jitter)
            case "refused" if failure.status < 400:
                return Refuse()
            case "refused":
                return RefuseIfOthersSucceed(0, Retry(backoff_s(history.errors, jitter)))
            case "blocked":
                # A firewall may reject a single prompt with the status of a wrong key or address.
                if failure.status in _FIREWALL_STATUSES and successes:
                    return RefuseIfOthersSucceed(successes, Retry(backoff_s(history.errors, jitter)))
                return AskUser()

    def _decide_transient(self, failure: Failure, history: FailureHistory, now: float, jitter: float) -> Decision:
        pause_until = now + (failure.retry_after_s or 0.0)
        retry = Retry(backoff_s(history.errors, jitter), pause_until, stops_with_outage=True)
        if history.errors <= self.max_retries:
            return retry
        assert history.successes_before is not None
        return GiveUpIfOthersSucceeded(history.successes_before, retry, pause_until)

    def _decide_throttled(self, failure: Failure, history: FailureHistory, now: float, jitter: float) -> Decision:
        retry = Retry(pause_until=now + (failure.retry_after_s or backoff_s(history.throttled, jitter)))
        assert history.throttled_since is not None
        assert history.successes_before is not None
        if now - history.throttled_since <= self.give_up_after_s:
            return retry
        return GiveUpIfOthersSucceeded(history.successes_before, retry)
