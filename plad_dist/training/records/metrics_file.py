"""The figures of a phase as JSON lines under ``events/<phase>/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, held-out rankings) of a phase in order of steps; the latest attempt's latest word on a step counts."""
    steps: dict[int, dict[str, Any]] = {}
    heldout: dict[int, dict[str, Any]] = {}
    path = folder / METRICS_FILE
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of an attempt that was killed
                continue
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                continue
            found = heldout if "heldout" in record else steps
            before = found.get(record["step"])
            if before is None or record.get("attempt", 0) >= before.get("attempt", 0):
                found[record["step"]] = record
    return [steps[step] for step in sorted(steps)], [heldout[step] for step in sorted(heldout)]
