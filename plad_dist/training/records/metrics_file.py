"""Figures of a phase and the parts of its starts, as JSON lines in ``events/<phase>/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plad_dist.data.local_files import is_file

METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the figures of a phase.

    Several attempts may have logged a step. The last record of the latest attempt counts.

    Args:
        folder: ``events/<phase>``.

    Returns:
        The records of the steps, and those of the held-out evaluations, each in the order of steps.
    """
    steps: dict[int, dict[str, Any]] = {}
    heldout: dict[int, dict[str, Any]] = {}
    path = folder / METRICS_FILE
    if is_file(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of an attempt that was killed
                continue
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                continue
            records = heldout if "heldout" in record else steps
            earlier = records.get(record["step"])
            if earlier is None or record.get("attempt", 0) >= earlier.get("attempt", 0):
                records[record["step"]] = record
    return [steps[step] for step in sorted(steps)], [heldout[step] for step in sorted(heldout)]
