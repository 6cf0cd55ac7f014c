"""Output of the `plad` command: log lines on stderr; tables, reports and a last error message."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from plad_dist.untrusted import harmless

if TYPE_CHECKING:
    from plad_dist.evaluation.comparison import Comparison
    from plad_dist.evaluation.document import Metrics
    from plad_dist.rundir import RunDir


def log_to_terminal() -> None:
    """Send the log of plad-dist to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("plad")
    logger.handlers = [handler]
    logger.filters = [_make_harmless]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _make_harmless(record: logging.LogRecord) -> bool:
    """Drop from a message what a terminal obeys: it may quote a server or a file."""
    record.msg, record.args = harmless(record.getMessage()), ()
    return True


def exit_with(message: str, code: int) -> NoReturn:
    """Exit with a message on stderr and in the logs of the run."""
    message = harmless(message)
    for handler in logging.getLogger("plad").handlers:
        if isinstance(handler, logging.FileHandler):  # the run's own log gets the message too
            handler.handle(logging.makeLogRecord({"msg": message, "levelname": "ERROR", "levelno": logging.ERROR}))
    sys.stderr.write(f"\n{message}\n")
    sys.exit(code)


def print_table(table: object) -> None:
    """Print a rich table as wide as the terminal, or 140 columns wide into a file or pipe."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(width=140, markup=False, emoji=False)
    console.print(table)


def print_metrics(metrics: Metrics, report_path: str) -> None:
    """Print the metrics of a round with the verdict, and where its report is."""
    from plad_dist.evaluation.report.tables import metrics_table

    print_table(metrics_table(metrics))
    for sentence in metrics.verdict:
        print(f"- {harmless(sentence)}")
    print(f"\nReport: {report_path}")


def print_times(run: RunDir) -> None:
    """Print the time that all commands so far have spent on each step of a run."""
    from plad_dist.evaluation.report.tables import times_table
    from plad_dist.run_logs import read_timings

    if times := read_timings(run):
        print_table(times_table(times))


def print_comparison(comparison: Comparison, output: str | None, as_json: bool = False) -> None:
    """Print a comparison of runs as a table or as JSON, and write its page if there is an output
    path."""
    from plad_dist.evaluation.comparison import write_comparison
    from plad_dist.evaluation.report.tables import comparison_table

    if output is not None:
        write_comparison(comparison, Path(output))
    if as_json:
        print(json.dumps(comparison.to_json()))
        return
    print_table(comparison_table(comparison))
    if output is not None:
        print(f"\nReport: {output}")
