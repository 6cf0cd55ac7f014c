"""Rate limits: when the next request may be sent, and how many tokens it will probably take.

Plain objects without I/O. Times are seconds of one monotonic clock, passed as `now`. Nothing here
waits: the client does.
"""

from __future__ import annotations

import math

_EPSILON = 1e-6


class Bucket:
    """Token bucket for a rate per minute.

    No window of 60 seconds exceeds `per_minute`, except by a single amount that is larger than the
    bucket. The bucket refills continuously and holds one second's worth, at least 1. An amount
    above that is taken on credit when the bucket is full.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._capacity = max(1.0, per_minute / 60)
        # Together with a full bucket, 60 seconds of refill are one minute's worth.
        self._refill_per_s = per_minute / 60 * 59 / 60
        self._level, self._updated_at = self._capacity, now

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until the amount may be taken."""
        self._level = min(self._capacity, self._level + (now - self._updated_at) * self._refill_per_s)
        self._updated_at = now
        deficit = min(amount, self._capacity) - self._level
        return deficit / self._refill_per_s if deficit > _EPSILON else 0.0

    def take(self, amount: float) -> None:
        """Take an amount; a negative one is given back."""
        self._level -= amount


class Pace:
    """Time of the next request: the two rate limits, and the pause that the server asks for."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None, now: float) -> None:
        self._requests = Bucket(requests_per_minute, now) if requests_per_minute is not None else None
        self._tokens = Bucket(tokens_per_minute, now) if tokens_per_minute is not None else None
        self._paused_until = -math.inf

    def wait_s(self, tokens: float, now: float) -> float:
        """Return the seconds until a request of this many tokens may be sent."""
        return max(
            self.pause_remaining_s(now),
            self._requests.wait_s(1, now) if self._requests else 0.0,
            self._tokens.wait_s(tokens, now) if self._tokens else 0.0,
        )

    def take(self, tokens: float) -> None:
        """Count a request of this many estimated tokens, as it is sent."""
        if self._requests:
            self._requests.take(1)
        self.correct(tokens)

    def correct(self, tokens: float) -> None:
        """Count the difference between the actual and the estimated tokens of a request."""
        if self._tokens:
            self._tokens.take(tokens)

    def pause(self, until: float) -> None:
        """Send no request before a time. A shorter pause does not end a longer one."""
        self._paused_until = max(self._paused_until, until)

    def pause_remaining_s(self, now: float) -> float:
        return max(0.0, self._paused_until - now)


class TokenEstimate:
    """Estimate of the tokens of a request, learnt from the usage that the server reports.

    Until the first responses, four bytes of a prompt count as one token, and a response as
    `max_tokens`.
    """

    def __init__(self) -> None:
        self._prompt_bytes, self._prompt_tokens = 4000.0, 1000.0
        self._max_tokens, self._completion_tokens = 0.0, 0.0

    def tokens(self, prompt_bytes: int, max_tokens: int) -> float:
        """Return the expected tokens of a request, prompt and response together."""
        prior = 4.0 * max_tokens  # the weight of four responses of full length
        share = (self._completion_tokens + prior) / (self._max_tokens + prior)
        return self.prompt_tokens(prompt_bytes) + max_tokens * share

    def prompt_tokens(self, prompt_bytes: int) -> float:
        """Return the expected tokens of a text of this many bytes."""
        return prompt_bytes * self._prompt_tokens / self._prompt_bytes

    def learn(self, prompt_bytes: int, max_tokens: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Add a request and the usage that the server reported for it."""
        self._prompt_bytes += prompt_bytes
        self._prompt_tokens += prompt_tokens
        self._max_tokens += max_tokens
        self._completion_tokens += completion_tokens
