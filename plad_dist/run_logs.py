"""Timings and logs of a run, on which nothing depends."""

from __future__ import annotations

import contextlib
import logging

from plad_dist.data.local_files import failure_explained
from plad_dist.errors import RunFailed
from plad_dist.rundir import RunDir

TIMINGS = "logs/timings.json"


def read_timings(run: RunDir) -> dict[str, float]:
    """Return the seconds that each stage took.

    A damaged file counts as empty, since nothing depends on it.
    """
    try:
        timings = run.storage.read_json(TIMINGS)
    except RunFailed:
        return {}
    timings = timings if isinstance(timings, dict) else {}
    return {name: seconds for name, seconds in timings.items() if isinstance(seconds, int | float)}


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
