"""The outage rule: the stage stops after `give_up_after_s` of failures without a success.

An outage starts with a failure that the server is to blame for (transient or throttled) and ends
with the next success. It makes no error rows: the retry policy gives up a prompt only if other
prompts succeed while it fails.
"""

from __future__ import annotations

import math


class Outage:
    """State of the outage rule of one client.

    Attributes:
        successes: successful requests so far.
        started_at: time of the first failure after the last success, None without an outage.
        failures: failures since then.
        last_failure: text of the latest failure.
    """

    def __init__(self, give_up_after_s: float) -> None:
        self._give_up_after_s = give_up_after_s
        self.successes = self.failures = 0
        self.started_at: float | None = None
        self.last_failure = ""

    def record_success(self) -> None:
        self.successes += 1
        self.end()

    def record_failure(self, text: str, now: float) -> None:
        self.started_at = now if self.started_at is None else self.started_at
        self.failures += 1
        self.last_failure = text

    def end(self) -> None:
        """End the outage. A client that becomes idle does so too: idle time proves no outage."""
        self.started_at, self.failures = None, 0

    def duration_s(self, now: float) -> float:
        """Return the seconds since the outage started, 0 without one."""
        return 0.0 if self.started_at is None else now - self.started_at

    def remaining_s(self, now: float) -> float:
        """Return the seconds until the outage stops the stage, infinite without an outage."""
        return math.inf if self.started_at is None else self.started_at + self._give_up_after_s - now
