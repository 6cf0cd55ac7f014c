"""Prompt source `python_functions`: names and descriptions of installed Python functions.

The standard library and the site-packages of the running interpreter are parsed with :mod:`ast`;
none of their code is imported or run. A row is the first sentence of a docstring and the name of
its function, both as lower-case words.
"""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import os
import random
import signal
import sysconfig
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterator
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

from plad_dist.config import PythonFunctionsSource
from plad_dist.errors import UserError
from plad_dist.harvest.cache import cache_path, read_cache, write_cache
from plad_dist.harvest.descriptions import NearDuplicates
from plad_dist.harvest.parsing import DescribedName, NamedFunction, digest, parse_files

logger = logging.getLogger(__name__)

MIN_HELDOUT = 10
MAX_PACKAGE_SHARE_PERCENT = 15  # share of the training rows from one package
FILES_PER_TASK = 16
PROCESSES = min(os.cpu_count() or 1, 32)
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "testing", "tests"}

Packages = dict[str, list[Path]]  # files by top-level package


def harvest(
    source: PythonFunctionsSource, seed: int, cache_dir: Path | None = None
) -> tuple[list[NamedFunction], list[NamedFunction]]:
    """Return training and held-out rows, both shuffled by the seed.

    No training row is a near duplicate of a held-out row. The rows depend only on the installation
    and the source, not on the number of processes. If the harvest is stopped by `source.seconds`,
    they also depend on the speed of the machine, which is logged as a warning.

    Args:
        cache_dir: folder of the cache; None for `plad-dist` in the user's cache folder.

    Raises:
        UserError: the packages have too few described functions.
    """
    roots = _roots()
    path = cache_path(source, roots, cache_dir)
    cached = read_cache(path)
    train, heldout, is_complete = (*cached, True) if cached else _collect(source, roots)
    _check_counts(source, len(train), len(heldout), is_complete)
    if is_complete and not cached:
        write_cache(path, train, heldout)
    shuffler = random.Random(seed)  # noqa: S311
    shuffler.shuffle(train)
    shuffler.shuffle(heldout)
    return train, heldout


def _collect(source: PythonFunctionsSource, roots: list[Path]) -> tuple[list[NamedFunction], list[NamedFunction], bool]:
    """Return training rows, held-out rows, and True if the harvest ended before the time limit."""
    deadline = time.monotonic() + source.seconds
    packages = _packages(roots)
    heldout_packages = {name: packages.pop(name) for name in list(packages) if name in source.heldout_packages}
    train: list[NamedFunction] = []
    heldout: list[NamedFunction] = []
    is_complete = True
    # Other start methods than `fork` import the caller's main module with all its dependencies in
    # every process. The children only parse text, so they need no lock that a thread of the caller
    # could hold; a child that hangs is killed at the deadline.
    with multiprocessing.get_context("fork").Pool(PROCESSES, _start_worker) as pool:
        try:
            heldout.extend(_parse(pool, heldout_packages, deadline, full=()))
            full: set[str] = set()
            near = NearDuplicates(row.description for row in _balanced(heldout, source.heldout_limit))
            train.extend(_select(_parse(pool, packages, deadline, full), near, source.limit, full))
        except multiprocessing.TimeoutError:
            is_complete = False
            logger.warning(
                "prompts.source.seconds=%d are over; which %d training rows were found depended on the machine's speed",
                source.seconds,
                len(train),
            )
    return train, _balanced(heldout, source.heldout_limit), is_complete


def _select(rows: Iterator[NamedFunction], near: NearDuplicates, limit: int, full: set[str]) -> Iterator[NamedFunction]:
    """Yield the first `limit` rows that are not near duplicates.

    A package that has reached its share of the rows is added to `full`.
    """
    counts: Counter[str] = Counter()
    for row in itertools.islice((row for row in rows if row.description not in near), limit):
        counts[row.package] += 1
        if counts[row.package] * 100 >= limit * MAX_PACKAGE_SHARE_PERCENT:
            full.add(row.package)
        yield row


def _balanced(rows: list[NamedFunction], limit: int) -> list[NamedFunction]:
    """Return at most `limit` rows, taken from the packages in turn so that none dominates."""
    by_package: dict[str, list[NamedFunction]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: digest(row.description)):
        by_package[row.package].append(row)
    return [row for turn in itertools.zip_longest(*by_package.values()) for row in turn if row][:limit]


def _check_counts(source: PythonFunctionsSource, train: int, heldout: int, is_complete: bool) -> None:
    """Raise :class:`UserError` if there are too few training or held-out rows."""
    names = ", ".join(source.heldout_packages)
    limit = "" if is_complete else f" within prompts.source.seconds={source.seconds}, which may be too few"
    if heldout < MIN_HELDOUT or not train:
        raise UserError(
            f"prompts.source.heldout_packages: found {heldout} described functions in {names} and {train} in all other "
            f"packages{limit}; expected at least {MIN_HELDOUT} and 1. Name some installed top-level packages that have "
            "docstrings, such as asyncio, email and logging, and leave other packages for training"
        )


# -- files and processes


def _roots() -> list[Path]:
    """Return the folders of top-level packages: standard library, then site-packages."""
    return list(dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))


def _packages(roots: list[Path]) -> Packages:
    """Return the Python files of every top-level package, root by root.

    Within a root, packages and files are sorted by hash, so that a limit leaves an even choice and
    does not cut the end of the alphabet.
    """
    files: Packages = {}
    for root in roots:
        files_of_root: dict[str, list[Path]] = defaultdict(list)
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            if Path(folder) == root:
                folders[:] = [name for name in folders if name.isidentifier()]
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    files_of_root[path.relative_to(root).parts[0].removesuffix(".py")].append(path)
        for package in sorted(files_of_root, key=digest):
            paths = sorted(files_of_root[package], key=lambda path: digest(path.relative_to(root).as_posix()))
            files.setdefault(package, []).extend(paths)
    return files


def _parse(pool: Pool, packages: Packages, deadline: float, full: Container[str]) -> Iterator[NamedFunction]:
    """Yield the rows of packages, the first row of each description.

    The order is that of the packages, independent of which process finishes first.

    Args:
        full: packages to skip. The caller may add to it during the iteration.

    Raises:
        multiprocessing.TimeoutError: the deadline has passed.
    """
    tasks = (
        (package, files[start : start + FILES_PER_TASK])
        for package, files in packages.items()
        for start in range(0, len(files), FILES_PER_TASK)
        if package not in full
    )
    total_unreadable = 0
    seen: set[str] = set()
    running: deque[tuple[str, AsyncResult[tuple[list[DescribedName], int]]]] = deque()
    while True:
        running.extend(
            (package, pool.apply_async(parse_files, (files,)))
            for package, files in itertools.islice(tasks, 4 * PROCESSES - len(running))
        )
        if not running:
            break
        package, task = running.popleft()
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise multiprocessing.TimeoutError
        functions, unreadable = task.get(remaining_s)
        total_unreadable += unreadable
        for description, name in functions:
            if package not in full and description not in seen:
                seen.add(description)
                yield NamedFunction(description, name, package)
    if total_unreadable:
        logger.info("skipped %d files that are too large or cannot be parsed", total_unreadable)


def _start_worker() -> None:
    """Prepare a forked process for parsing and for its termination by the pool."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool sends it; the caller may have set a handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # warnings about the parsed code, such as invalid escapes
    gc.disable()  # syntax trees have no cycles, and the search for cycles takes a third of the time
