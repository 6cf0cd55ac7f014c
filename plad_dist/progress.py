"""Progress of a stage with rates and remaining time: a live line on a terminal, else log lines."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from plad_dist.timeline import Activity, StageClock

logger = logging.getLogger("plad")


class Progress:
    """Progress of one stage at a time, in units such as rows.

    Args:
        every_s: seconds between log lines if the output is not a terminal.
    """

    def __init__(self, every_s: float = 8.0) -> None:
        self._live = sys.stderr.isatty()
        self._every = 0.5 if self._live else every_s
        self._longest_silence = 1.25 * self._every
        self._shown = False
        self._last_progress = self._last_shown = time.monotonic()
        self._clock = StageClock(Activity.COMPUTING)

    @contextmanager
    def timed(self, step: str, activity: Activity) -> Iterator[StageClock]:
        """Time the activities of a step in the block, and log a line whenever none came for long.

        Args:
            step: name of the step, for these lines.
            activity: the first one.
        """
        self._clock = StageClock(activity)
        self._last_shown = time.monotonic()
        finished = threading.Event()
        thread = threading.Thread(target=self._fill_silence, args=(step, finished), daemon=True)
        thread.start()
        try:
            yield self._clock
        finally:
            finished.set()
            thread.join()

    def enter(self, activity: Activity) -> None:
        """Record that the step is at this activity from now on."""
        self._clock.enter(activity)

    def _fill_silence(self, step: str, finished: threading.Event) -> None:
        started = time.monotonic()
        while not finished.wait(min(0.25, self._every)):
            now = time.monotonic()
            if now - self._last_shown >= self._longest_silence:
                self._write(f"{step}: {self._clock.activity}, {_duration(now - started)} so far")

    @property
    def idle_s(self) -> float:
        """Seconds since the last progress, or since the start of the stage."""
        return time.monotonic() - self._last_progress

    def start(self, stage: str, total: int, unit: str) -> None:
        """Start a stage.

        Args:
            stage: name of the stage.
            total: number of units of the stage.
            unit: plural name of the units.
        """
        self._stage, self._total, self._unit = stage, total, unit
        self._completed = self._tokens = 0
        self._note = ""
        self._started = self._last_shown = self._last_progress = time.monotonic()

    def set(self, completed: int, tokens: int, note: str) -> None:
        """Set the count. Rates ignore the units that were completed before the first call.

        Args:
            completed: units that are completed in total.
            tokens: tokens of these units.
            note: text beside the count.
        """
        if self._completed == 0:
            self._completed, self._tokens = completed - 1, tokens
            self._first = time.monotonic()
            self._before_first, self._tokens_before_first = completed - 1, tokens
        self._note = f", {note}"
        self.advance(completed - self._completed, tokens - self._tokens)

    def advance(self, count: int, tokens: int = 0) -> None:
        """Add to the count.

        Args:
            count: units that were completed.
            tokens: tokens of these units.
        """
        if self._completed == 0 and count:  # rates exclude the start of engines and workers
            self._first = time.monotonic()
            self._before_first, self._tokens_before_first = count, tokens
        if count:
            self._last_progress = time.monotonic()
        self._completed += count
        self._tokens += tokens
        self.tick()
        if self._completed >= self._total:
            self._show()
            self.end_line()

    def note(self, text: str) -> None:
        """Set the text beside the count."""
        self._note = f", {text}" if text else ""

    def tick(self) -> None:
        """Show the progress if it is due."""
        if time.monotonic() - self._last_shown >= self._every:
            self._show()

    def say(self, text: str) -> None:
        """Log a separate line."""
        self.end_line()
        self._last_shown = time.monotonic()
        logger.info("%s", text)

    def end_line(self) -> None:
        """End the live line, so that other output starts on a new one."""
        if self._shown:
            sys.stderr.write("\n")
            self._shown = False

    def _show(self) -> None:
        self._write(f"{self._stage}: {self._completed:,}/{self._total:,} {self._unit}{self._note}{self._rates()}")

    def _write(self, text: str) -> None:
        self._last_shown = time.monotonic()
        if self._live:
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._shown = True
        else:
            logger.info("%s", text)

    def _rates(self) -> str:
        if not self._completed:
            return f", waiting for the first after {time.monotonic() - self._started:.0f} s"
        seconds = time.monotonic() - self._first
        counted = self._completed - self._before_first
        if seconds < 0.5 or counted <= 0:
            return ""
        rate = counted / seconds
        remaining_s = (self._total - self._completed) / rate
        new_tokens = self._tokens - self._tokens_before_first
        tokens = f", {new_tokens / seconds:,.0f} tokens/s" if new_tokens else ""
        return f", {rate:,.1f}/s{tokens}, about {_duration(remaining_s)} left"


def _duration(total_seconds: float) -> str:
    minutes, seconds = divmod(round(total_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
