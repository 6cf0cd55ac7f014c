"""Real text that every Python installation carries: functions, named by their one-line descriptions.

The standard library and the site-packages of the running interpreter are parsed with :mod:`ast`; nothing in them is
imported or run. A row is the first sentence of a docstring and the name of its function, both as lower-cased words.
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
from plad_dist.harvest.parsing import NamedFunction, Pair, digest, read_files

logger = logging.getLogger(__name__)

MIN_HELDOUT = 10
PACKAGE_SHARE_PERCENT = 15  # of the training rows, at most, from one package
CHUNK_FILES = 16  # files in a task of one process
PROCESSES = min(os.cpu_count() or 1, 32)
Packages = dict[str, list[Path]]  # their files
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "testing", "tests"}


def harvest(
    source: PythonFunctionsSource, seed: int, cache_dir: Path | None = None
) -> tuple[list[NamedFunction], list[NamedFunction]]:
    """(training rows, held-out rows), both shuffled by the seed, with no description in common, nor nearly so.

    The rows depend on the installation and the source alone, not on the number of processes; only `source.seconds`,
    where it strikes, makes them depend on speed, with a warning. They are kept in `cache_dir` (default: `plad-dist` in
    the user's cache folder). Raises :class:`UserError` where the packages have too few functions.
    """
    roots = _roots()
    path = cache_path(source, roots, cache_dir)
    cached = read_cache(path)
    train, heldout, complete = (*cached, True) if cached else _collect(source, roots)
    _check(source, len(train), len(heldout), complete)
    if complete and not cached:
        write_cache(path, train, heldout)
    shuffler = random.Random(seed)  # noqa: S311
    shuffler.shuffle(train)
    shuffler.shuffle(heldout)
    return train, heldout


def _collect(source: PythonFunctionsSource, roots: list[Path]) -> tuple[list[NamedFunction], list[NamedFunction], bool]:
    """(training rows, held-out rows, whether there was time for all of it)."""
    deadline = time.monotonic() + source.seconds
    packages = _packages(roots)
    reserved = {name: packages.pop(name) for name in list(packages) if name in source.heldout_packages}
    train: list[NamedFunction] = []
    found: list[NamedFunction] = []
    complete = True
    # `fork`: the other methods import the caller's main module, with all it needs, in every process. The children only
    # parse text, so they take no lock that a thread of the caller could hold; one that hangs is ended at the deadline.
    with multiprocessing.get_context("fork").Pool(PROCESSES, _start_worker) as pool:
        try:
            found.extend(_parsed(pool, reserved, deadline, full=()))
            full: set[str] = set()
            near = NearDuplicates(row.description for row in _balanced(found, source.heldout_limit))
            train.extend(_take(_parsed(pool, packages, deadline, full), near, source.limit, full))
        except multiprocessing.TimeoutError:
            complete = False
            late = (
                "prompts.source.seconds=%d are over; which %d training rows were found depended on the machine's speed"
            )
            logger.warning(late, source.seconds, len(train))
    return train, _balanced(found, source.heldout_limit), complete


def _take(rows: Iterator[NamedFunction], near: NearDuplicates, limit: int, full: set[str]) -> Iterator[NamedFunction]:
    """The first `limit` rows that are not near. A package that has its share of them goes into `full`."""
    counts: Counter[str] = Counter()
    for row in itertools.islice((row for row in rows if row.description not in near), limit):
        counts[row.package] += 1
        if counts[row.package] * 100 >= limit * PACKAGE_SHARE_PERCENT:
            full.add(row.package)
        yield row


def _balanced(rows: list[NamedFunction], limit: int) -> list[NamedFunction]:
    """At most `limit` rows, taken from the packages in turn so that a large one does not dominate."""
    by_package: dict[str, list[NamedFunction]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: digest(row.description)):
        by_package[row.package].append(row)
    return [row for turn in itertools.zip_longest(*by_package.values()) for row in turn if row][:limit]


def _check(source: PythonFunctionsSource, train: int, heldout: int, complete: bool) -> None:
    names = ", ".join(source.heldout_packages)
    late = "" if complete else f" within prompts.source.seconds={source.seconds}, which may be too few"
    if heldout < MIN_HELDOUT or not train:
        raise UserError(
            f"prompts.source.heldout_packages: found {heldout} described functions in {names} and {train} in all other "
            f"packages{late}; expected at least {MIN_HELDOUT} and 1. Name some installed top-level packages that have "
            "docstrings, such as asyncio, email and logging, and leave others for training."
        )


# ---------------------------------------------------------------------------------------------------------- the files


def _roots() -> list[Path]:
    """Folders of top-level packages: the standard library (of the base install, in a venv), then site-packages."""
    return list(dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))


def _packages(roots: list[Path]) -> Packages:
    """Python files of every top-level package, root by root; in a root, packages and their files go by their hash.

    So a limit takes an even choice of them rather than the first ones of the alphabet.
    """
    files: Packages = {}
    for root in roots:
        here: dict[str, list[Path]] = defaultdict(list)
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            if Path(folder) == root:
                folders[:] = [name for name in folders if name.isidentifier()]
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    here[path.relative_to(root).parts[0].removesuffix(".py")].append(path)
        for package in sorted(here, key=digest):
            found = sorted(here[package], key=lambda path: digest(path.relative_to(root).as_posix()))
            files.setdefault(package, []).extend(found)
    return files


def _parsed(pool: Pool, packages: Packages, deadline: float, full: Container[str]) -> Iterator[NamedFunction]:
    """Rows of the packages in the order given, whichever process is first, the first one of each description.

    A package is left once it is in `full`. Raises :class:`multiprocessing.TimeoutError` at the deadline.
    """
    tasks = (
        (package, files[start : start + CHUNK_FILES])
        for package, files in packages.items()
        for start in range(0, len(files), CHUNK_FILES)
        if package not in full
    )
    skipped = 0
    seen: set[str] = set()
    running: deque[tuple[str, AsyncResult[tuple[list[Pair], int]]]] = deque()
    while True:
        running.extend(
            (package, pool.apply_async(read_files, (files,)))
            for package, files in itertools.islice(tasks, 4 * PROCESSES - len(running))
        )
        if not running:
            break
        package, task = running.popleft()
        left = deadline - time.monotonic()
        if left <= 0:
            raise multiprocessing.TimeoutError
        pairs, unreadable = task.get(left)
        skipped += unreadable
        for description, name in pairs:
            if package not in full and description not in seen:
                seen.add(description)
                yield NamedFunction(description, name, package)
    if skipped:
        logger.info("skipped %d files that are too large or cannot be parsed", skipped)


def _start_worker() -> None:
    """Make a forked process fit for parsing, and for being ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool ends it so, whatever handlers the caller has set
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # of the code that is parsed, such as invalid escapes
    gc.disable()  # syntax trees have no cycles; looking for them takes a third of the time


# ----------------------------------------------------------------------------------------------------------- the text
