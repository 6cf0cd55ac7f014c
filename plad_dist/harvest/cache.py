"""Cache of harvested rows between runs."""

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
    """Return the cache file of a source.

    Its name is a hash of everything that decides the rows: the code of the harvest, the Python
    version, the installed packages and the limits. The seed is left out: it only shuffles rows.

    Args:
        roots: folders of top-level packages.
        cache_dir: folder of the file; None for `plad-dist` in the user's cache folder.
    """
    installed = [sorted(path.name for path in root.glob("*.*-info")) for root in roots]
    options = [source.limit, source.heldout_limit, sorted(source.heldout_packages)]
    code = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    inputs = [code, sys.version, [str(root) for root in roots], installed, options]
    if cache_dir is None:
        home = os.environ.get("HOME") or tempfile.gettempdir()
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", "plad-dist")
    return cache_dir / f"python-functions-{digest(json.dumps(inputs))[:24]}.jsonl.gz"


def read_cache(path: Path) -> tuple[list[NamedFunction], list[NamedFunction]] | None:
    """Return training and held-out rows, or None if the file is missing or damaged."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            train_rows, heldout_rows = json.loads(next(file))
            rows = [NamedFunction(*map(str, json.loads(line))) for line in file]
        return (rows[:train_rows], rows[train_rows:]) if len(rows) == train_rows + heldout_rows else None
    except (OSError, EOFError, ValueError, TypeError, StopIteration, zlib.error):
        return None


def write_cache(path: Path, train: list[NamedFunction], heldout: list[NamedFunction]) -> None:
    """Write the rows atomically. A failure is only logged, because the cache is optional."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            lines = [(len(train), len(heldout)), *map(astuple, train + heldout)]
            with gzip.open(temporary, "wt", compresslevel=5, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            temporary.replace(path)
    except OSError as error:
        logger.info("harvested rows cannot be cached in %s: %s", path.parent, error)
