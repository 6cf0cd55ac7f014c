"""Progress of a stage with rates and remaining time: a live line on a terminal, now and then a plain line in a log."""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger("plad")


class Progress:
    """Counts rows of one stage at a time.

    Args:
        every_s: seconds between plain lines where the output is no terminal.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        self._live = sys.stderr.isatty()
        self._every = 0.5 if self._live else every_s
        self._shown = False
        self._moved = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since something was begun or done."""
        return time.monotonic() - self._moved

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a count of `total` units."""
        self._stage, self._total, self._unit = stage, total, unit
        self._done = self._tokens = 0
        self._note = ""
        self._started = self._last = self._moved = time.monotonic()

    def set(self, done: int, tokens: int, note: str) -> None:
        """`done` units are done in all; a resumed count starts where it was left."""
        if self._done == 0:
            self._done, self._tokens = done - 1, tokens
            self._first = time.monotonic()
            self._before_first, self._tokens_before_first = done - 1, tokens
        self._note = f", {note}"
        self.advance(done - self._done, tokens - self._tokens)

    def advance(self, count: int, tokens: int = 0) -> None:
        """`count` more units are done."""
        if self._done == 0 and count:  # rates leave out the start of engines and workers
            self._first = time.monotonic()
            self._before_first, self._tokens_before_first = count, tokens
        if count:
            self._moved = time.monotonic()
        self._done += count
        self._tokens += tokens
        self.tick()
        if self._done >= self._total:
            self._show()
            self.end_line()

    def note(self, text: str) -> None:
        """What is shown beside the count."""
        self._note = f", {text}" if text else ""

    def tick(self) -> None:
        """Show the state if it is time to."""
        if time.monotonic() - self._last >= self._every:
            self._show()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.end_line()
        logger.info("%s", text)

    def end_line(self) -> None:
        """Leave the live line as it stands."""
        if self._shown:
            sys.stderr.write("\n")
            self._shown = False

    def _show(self) -> None:
        self._last = time.monotonic()
        text = f"{self._stage}: {self._done:,}/{self._total:,} {self._unit}{self._note}{self._rates()}"
        if self._live:
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._shown = True
        else:
            logger.info("%s", text)

    def _rates(self) -> str:
        if not self._done:
            return f", waiting for the first after {time.monotonic() - self._started:.0f} s"
        seconds = time.monotonic() - self._first
        counted = self._done - self._before_first
        if seconds < 0.5 or counted <= 0:
            return ""
        rate = counted / seconds
        left = (self._total - self._done) / rate
        new_tokens = self._tokens - self._tokens_before_first
        tokens = f", {new_tokens / seconds:,.0f} tokens/s" if new_tokens else ""
        return f", {rate:,.1f}/s{tokens}, about {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
