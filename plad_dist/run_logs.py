"""Timings and logs of a run, on which nothing depends."""

from __future__ import annotations

import contextlib
import json
import logging

from plad_dist.data.local_files import failure_explained
from plad_dist.errors import RunFailed
from plad_dist.rundir import RunDir
from plad_dist.timeline import StageTime

TIMINGS = "logs/timings.json"


def read_timings(run: RunDir) -> dict[str, StageTime]:
    """Return the time that all commands so far have spent on each step of a run.

    What is damaged, or was written by an earlier version, counts as missing, since nothing depends
    on it.
    """
    try:
        timings = run.storage.read_json(TIMINGS)
    except RunFailed:
        return {}
    times: dict[str, StageTime] = {}
    for name, seconds in timings.items() if isinstance(timings, dict) else ():
        with contextlib.suppress(TypeError, ValueError):
            times[name] = StageTime(**{activity: float(value) for activity, value in dict(seconds).items()})
    return times


def add_timing(run: RunDir, step: str, time: StageTime) -> None:
    """Add the time that this command has spent on a step."""
    times = read_timings(run)
    times[step] = times.get(step, StageTime()).plus(time)
    rounded = {
        name: {activity: round(seconds, 1) for activity, seconds in spent._asdict().items()}
        for name, spent in times.items()
    }
    run.storage.replace(TIMINGS, json.dumps(rounded, indent=1).encode())


def log_to_run(run: RunDir) -> None:
    """Write the log also to `logs/plad.log` in the run directory, if that is on a file system.

    Raises:
        RunFailed: the file cannot be opened.
    """
    if run.storage.local_root is None:
        return
    folder = run.storage.local_root / "logs"
    logger = logging.getLogger("plad")
    # A study has several runs: the log of the previous one ends here.
    for previous in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        logger.removeHandler(previous)
        with contextlib.suppress(OSError):  # its last lines may not fit on a full disk
            previous.close()
    with failure_explained(str(folder), "written"):
        folder.mkdir(exist_ok=True)
        own = _RunLog(folder / "plad.log")
    own.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(own)


class _RunLog(logging.FileHandler):
    """Log file whose failures, as on a full disk, show no traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - of the library
        """Do nothing: what the disk refuses elsewhere ends the command with its own message."""
