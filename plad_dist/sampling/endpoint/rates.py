"""When a request to a server may go and what it may cost, as plain objects that are told the time.

Times are seconds of one monotonic clock, given as `now`. Nothing here waits: :mod:`plad_dist.sampling.endpoint.client` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 60.0
_EPSILON = 1e-6


class Bucket:
    """A rate that holds in every minute: no 60 seconds see more than `per_minute`, or that and one larger amount.

    It fills smoothly and holds a second's worth, at least 1. An amount above that goes when the bucket is full, on credit.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._holds = max(1.0, per_minute / 60)
        self._per_s = per_minute / 60 * 59 / 60  # with what it holds, a minute's worth in a minute
        self._level, self._at = self._holds, now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until the amount may be taken."""
        self._level = min(self._holds, self._level + (now - self._at) * self._per_s)
        self._at = now
        lacking = min(amount, self._holds) - self._level
        return lacking / self._per_s if lacking > _EPSILON else 0.0

    def take(self, amount: float) -> None:
        """Take an amount, or give one back that was too much (below 0)."""
        self._level -= amount


class Pace:
    """When the next request may go: the two rates, and the pause that the server asked for."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None, now: float) -> None:
        self._requests = Bucket(requests_per_minute, now) if requests_per_minute is not None else None
        self._tokens = Bucket(tokens_per_minute, now) if tokens_per_minute is not None else None
        self._paused_until = -math.inf

    def wait(self, tokens: float, now: float) -> float:
        """Seconds until a request of so many tokens may go; 0 where it may go now."""
        return max(
            self.pause_left(now),
            self._requests.wait(1, now) if self._requests else 0.0,
            self._tokens.wait(tokens, now) if self._tokens else 0.0,
        )

    def take(self, tokens: float) -> None:
        """A request of so many tokens goes."""
        if self._requests:
            self._requests.take(1)
        self.correct(tokens)

    def correct(self, tokens: float) -> None:
        """A request took so many tokens more than was taken for it; less, where negative."""
        if self._tokens:
            self._tokens.take(tokens)

    def pause(self, until: float) -> None:
        """No request goes before."""
        self._paused_until = max(self._paused_until, until)

    def pause_left(self, now: float) -> float:
        return max(0.0, self._paused_until - now)


class TokenEstimate:
    """Tokens that a request will probably take, learnt from what the server reports.

    Bytes of a prompt cost a quarter of a token and a response takes all of `max_tokens`, until some are answered.
    """

    def __init__(self) -> None:
        self._bytes, self._prompt_tokens = 4000.0, 1000.0
        self._asked, self._written = 0.0, 0.0

    def tokens(self, prompt_bytes: int, max_tokens: int) -> float:
        full = 4.0 * max_tokens  # four responses of full length are believed in beforehand
        share = (self._written + full) / (self._asked + full)
        return self.prompt_tokens(prompt_bytes) + max_tokens * share

    def prompt_tokens(self, prompt_bytes: int) -> float:
        return prompt_bytes * self._prompt_tokens / self._bytes

    def learn(self, prompt_bytes: int, max_tokens: int, prompt_tokens: int, completion_tokens: int) -> None:
        self._bytes += prompt_bytes
        self._prompt_tokens += prompt_tokens
        self._asked += max_tokens
        self._written += completion_tokens


class Outage:
    """The time for which nothing succeeds: a failure begins it, a success ends it.

    Attributes:
        successes: requests that were answered, ever.
        since: when the first failure after the last success was seen; None when all is well.
        failures: failures since then; `last` is the latest one.
    """

    def __init__(self, give_up_after_s: float) -> None:
        self._give_up_after_s = give_up_after_s
        self.successes = self.failures = 0
        self.since: float | None = None
        self.last = ""

    def success(self) -> None:
        self.successes += 1
        self.rest()

    def rest(self) -> None:
        """No request is under way: time that passes now says nothing of the server."""
        self.since, self.failures = None, 0

    def failure(self, text: str, now: float) -> None:
        self.since = now if self.since is None else self.since
        self.failures += 1
        self.last = text

    def left(self, now: float) -> float:
        """Seconds until it has lasted too long."""
        return math.inf if self.since is None else self.since + self._give_up_after_s - now


class Budget:
    """What was spent, and what requests under way may still cost at worst.

    Attributes:
        cap: most that may be spent; None without a limit.
        spent: paid, what is assumed for lost answers included.
        assumed: that part of `spent`; `lost` is the number of those requests.
        in_flight: reservations that are held.
    """

    def __init__(self, cap: float | None, input_price: float | None, output_price: float | None, spent: float) -> None:
        self.cap, self.spent = cap, spent
        self._input_price, self._output_price = input_price or 0.0, output_price or 0.0
        self.assumed, self.lost = 0.0, 0
        self.in_flight, self._reserved = 0, 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self._input_price + completion_tokens * self._output_price) / 1e6

    def reserve(self, worst: float) -> bool:
        """Hold back the worst case of a request. False, and nothing is held, where the cap has no room for it now."""
        if self.cap is not None and self.spent + self._reserved + worst > self.cap:
            return False
        self._reserved += worst
        self.in_flight += 1
        return True

    def settle(self, worst: float, cost: float | None) -> float:
        """A request ended and cost so much. None: nobody knows, its worst case is assumed. Returns what was counted."""
        self.in_flight -= 1
        self._reserved = self._reserved - worst if self.in_flight else 0.0  # no rest of rounding stays
        if cost is None:
            cost = worst
            self.assumed += worst
            self.lost += 1
        self.spent += cost
        return cost


def backoff_s(failures: int, jitter: float) -> float:
    """Pause after so many failures: exponential with full jitter. `jitter` is a random number in [0, 1)."""
    return jitter * min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2.0 ** min(failures - 1, 16))


def retry_after_s(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds that `Retry-After` asks for: a number, or a date as seen from the server's own clock. None without one."""
    text = headers.get("Retry-After", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        at, server_now = _timestamp(text), _timestamp(headers.get("Date", ""))
        if at is None:
            return None
        seconds = at - (wall if server_now is None else server_now)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _timestamp(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
