"""Harvested rows kept between runs."""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
import tempfile
import zlib
from dataclasses import astuple
from pathlib import Path

from plad_dist.config import PythonFunctionsSource
from plad_dist.harvest.parsing import NamedFunction, digest

logger = logging.getLogger(__name__)


def cache_path(source: PythonFunctionsSource, roots: list[Path], cache_dir: Path | None) -> Path:
    """Where the rows are kept: a name made of all that decides them, but for the seed, which only shuffles."""
    installed = [sorted(path.name for path in root.glob("*.*-info")) for root in roots]
    asked = [source.limit, source.heldout_limit, sorted(source.heldout_packages)]
    code = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    made_of = [code, sys.version, [str(root) for root in roots], installed, asked]
    if cache_dir is None:
        home = os.environ.get("HOME") or tempfile.gettempdir()
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", "plad-dist")
    return cache_dir / f"python-functions-{digest(json.dumps(made_of))[:24]}.jsonl.gz"


def read_cache(path: Path) -> tuple[list[NamedFunction], list[NamedFunction]] | None:
    """(training rows, held-out rows), or None where there is no sound file of them."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            trained, held = json.loads(next(file))
            rows = [NamedFunction(*map(str, json.loads(line))) for line in file]
        return (rows[:trained], rows[trained:]) if len(rows) == trained + held else None
    except (OSError, EOFError, ValueError, TypeError, StopIteration, zlib.error):
        return None


def write_cache(path: Path, train: list[NamedFunction], heldout: list[NamedFunction]) -> None:
    """Keep the rows, all or nothing. A cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            lines = [(len(train), len(heldout)), *map(astuple, train + heldout)]
            with gzip.open(temporary, "wt", compresslevel=5, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            temporary.replace(path)
    except OSError as error:
        logger.info("harvested rows are not cached in %s: %s", path.parent, error)
