"""Figures of a phase, written by the first rank: JSON lines, TensorBoard, trackers, driver."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from plad_dist.data.local_files import failure_explained
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.messages import Began, Diverged, HeldoutRanked, Message, Said, Started, StepDone
from plad_dist.training.records.metrics_file import METRICS_FILE, STARTS_FILE
from plad_dist.training.worker.trackers import Tracker, open_tracker

_NOT_OF_HELDOUT_PAIRS = ("prompt_tokens_saved", "active_share")


class MetricsLog:
    """Writes the figures of one attempt at a phase; only the first rank has one.

    Args:
        folder: ``events/<phase>``.
        step: step from which the attempt resumes; later figures of earlier attempts are superseded.
        steps: number of steps of the phase.
        mailbox: way to the driver with a `post` method, or None.
        trackers: names of the trackers that also get the figures.
        run: URL of the run directory, which identifies the run to trackers.
        attempt: number of this attempt; the figures of the highest attempt count.

    Raises:
        RunFailed: the files cannot be written, here or in any method.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        mailbox: Any,
        trackers: tuple[str, ...] = (),
        run: str = "",
        attempt: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with failure_explained(str(folder), "written"):
            folder.mkdir(parents=True, exist_ok=True)
            self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
            self._file = _continued(folder / METRICS_FILE)
        self._phase, self._steps, self._mailbox, self._attempt = folder.name, steps, mailbox, attempt
        self._trackers: list[Tracker] = []
        for name in trackers:
            try:
                self._trackers.append(open_tracker(name, run, folder.name, resumes=step > 0))
            except Exception as error:  # noqa: BLE001 - whatever the tracker's package raises
                self.report(f"{name} cannot be opened and gets no figures: {error!r:.200}")

    def write_step(self, state: TrainState, figures: dict[str, float]) -> None:
        """Write the figures of the step that led to a state."""
        progress = {"step": state.step, "groups": state.groups, "tokens": state.tokens, "workers": state.workers}
        self._write({**progress, **figures}, "train", figures, state.step)
        self._post(StepDone(self._phase, **progress, figures=figures))

    def write_heldout(self, step: int, pairs: int, figures: dict[str, float]) -> None:
        """Write how well the held-out pairs are ranked after a step."""
        heldout = {name: value for name, value in figures.items() if name not in _NOT_OF_HELDOUT_PAIRS}
        self._write({"step": step, "heldout_pairs": pairs, "heldout": heldout}, "heldout", heldout, step)
        self._post(HeldoutRanked(self._phase, step, heldout["pair_accuracy"]))

    def report_start(self, text: str) -> None:
        """Report to the driver that the attempt starts or resumes."""
        self._post(Began(self._phase, self._steps, text))

    def write_start(self, step: int, parts: Mapping[str, float]) -> None:
        """Write the seconds of each part of the start that led to the first step of the attempt."""
        record = {"step": step, "parts": {part: round(seconds, 3) for part, seconds in parts.items()}}
        with failure_explained(str(self._folder), "written"), _continued(self._folder / STARTS_FILE) as file:
            file.write(self._line(record))
        self._post(Started(self._phase, dict(parts)))

    def report(self, text: str) -> None:
        """Add a line to the driver's log."""
        self._post(Said(self._phase, text))

    def report_divergence(self) -> None:
        """Report to the driver that the current step diverged."""
        self._post(Diverged(self._phase))

    def close(self) -> None:
        """Close the files and the trackers."""
        for tracker in list(self._trackers):
            self._call_tracker(tracker, tracker.close)
        with failure_explained(str(self._folder), "written"), self._file:
            self._board.close()

    def _call_tracker(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """Call a tracker; report and drop it if it fails.

        Training must not depend on a tracker's server.
        """
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever the tracker's package raises
            self._trackers.remove(tracker)
            self.report(f"{type(tracker).__name__.strip('_')} failed and gets no more figures: {error!r:.200}")

    def _write(self, record: dict[str, Any], group: str, figures: dict[str, float], step: int) -> None:
        by_tag = {f"{group}/{name}": value for name, value in figures.items()}
        with failure_explained(str(self._folder), "written"):
            self._file.write(self._line(record))
            for tag, value in by_tag.items():
                self._board.add_scalar(tag, value, step)
        for tracker in list(self._trackers):
            self._call_tracker(tracker, lambda: tracker.log(by_tag, step))  # noqa: B023 - called at once

    def _line(self, record: dict[str, Any]) -> str:
        return json.dumps({"time": round(time.time(), 3), "attempt": self._attempt, **record}) + "\n"

    def _post(self, message: Message) -> None:
        if self._mailbox is not None:
            self._mailbox.post(message)


def _continued(path: Path) -> TextIO:
    """Open a file of lines for appending, after the end of a line that was cut short."""
    is_cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = path.open("a", encoding="utf-8", buffering=1)
    if is_cut:
        file.write("\n")
    return file
