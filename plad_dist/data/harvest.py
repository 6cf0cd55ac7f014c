"""Real text that every Python installation carries: functions, named by their one-line descriptions.

The standard library and the site-packages of the running interpreter are parsed with :mod:`ast`; nothing in them is
imported or run. A row is the first sentence of a docstring and the name of its function, both as lower-cased words.
"""

from __future__ import annotations

import ast
import gc
import gzip
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import astuple, dataclass
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

from plad_dist.config import PythonFunctionsSource
from plad_dist.errors import UserError

logger = logging.getLogger(__name__)

MIN_HELDOUT = 10
PACKAGE_SHARE_PERCENT = 15  # of the training rows, at most, from one package
MAX_FILE_BYTES = 1_000_000
CHUNK_FILES = 16  # files in a task of one process
PROCESSES = min(os.cpu_count() or 1, 32)
Packages = dict[str, list[Path]]  # their files
Pair = tuple[str, str]  # description, name
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "testing", "tests"}


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """One function: what it does, and what its author called it."""

    description: str  # lower-cased words
    name: str  # lower-cased words
    package: str  # top-level package


def harvest(
    source: PythonFunctionsSource, seed: int, cache_dir: Path | None = None
) -> tuple[list[NamedFunction], list[NamedFunction]]:
    """(training rows, held-out rows), both shuffled by the seed, with no description in common, nor nearly so.

    The rows depend on the installation and the source alone, not on the number of processes; only `source.seconds`,
    where it strikes, makes them depend on speed, with a warning. They are kept in `cache_dir` (default: `plad-dist` in
    the user's cache folder). Raises :class:`UserError` where the packages have too few functions.
    """
    roots = _roots()
    path = _cache_path(source, roots, cache_dir)
    cached = _read_cache(path)
    train, heldout, complete = (*cached, True) if cached else _collect(source, roots)
    _check(source, len(train), len(heldout), complete)
    if complete and not cached:
        _write_cache(path, train, heldout)
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
    for row in sorted(rows, key=lambda row: _digest(row.description)):
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
        for package in sorted(here, key=_digest):
            found = sorted(here[package], key=lambda path: _digest(path.relative_to(root).as_posix()))
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
            (package, pool.apply_async(_read_files, (files,)))
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


def _read_files(paths: list[Path]) -> tuple[list[Pair], int]:
    """(pairs of description and name in the files, files that could not be read)."""
    pairs: list[Pair] = []
    skipped = 0
    for path in paths:
        try:
            pairs += _read_file(path)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            skipped += 1
    return pairs, skipped


def _read_file(path: Path) -> list[Pair]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError("too large")
    code = path.read_bytes()
    if b"def " not in code or not INDENTED_DOCSTRING.search(code):
        return []
    pairs = []
    for function in _functions(ast.parse(code)):
        name = function_name(function.name)
        description = describe(ast.get_docstring(function, clean=False) or "") if name else None
        if name and description and description.replace(" ", "") != name.replace(" ", ""):
            pairs.append((description, name))
    return pairs


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, in the order of the text."""
    statements: list[ast.AST] = [tree]
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        for part in ("finalbody", "orelse", "cases", "handlers", "body"):
            statements.extend(reversed(getattr(statement, part, [])))


# ----------------------------------------------------------------------------------------------------------- the text

INDENTED_DOCSTRING = re.compile(rb'^[ \t]+[rRuU]?"""', re.MULTILINE)
NAME_WORD = re.compile(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z0-9]+")  # get_2d, readHTTPBody, Conv2d
TEXT_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
PARAGRAPH_END = re.compile(r"\n\s*(?:\n|:\w[^`\n]*:\s|[@>*+#|-]|\w+:\s*\n|[=~^]{3})")
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bvs)(?<!\betc)[.!?](?=\s|$)")
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*)(?:<[^`]*>)?`")  # :class:`Name`, :func:`text <target>`
MARKUP = re.compile(r"[`\"*]|(?<!\w)'|'(?!\w)")
CODE = re.compile(r"://|www\.|>>>|[=<>{}\[\]|\\@$%^~;#]|[^\W\x00-\x7f]")  # or letters beyond ASCII
STOP_WORDS = frozenset(
    re.findall(r"\w+", "a an the this that its it is are be of to in on for with from by and or as at")
)
MAX_OTHER_SHARE = 0.15  # of the characters of a description: neither letters nor spaces


def function_name(identifier: str) -> str | None:
    """An identifier as lower-cased words, or None where it is no good answer: dunder, test, too short or too long."""
    bare = identifier.strip("_")
    if not bare.isascii() or bare.lower().startswith("test") or (identifier[:2] == "__" == identifier[-2:]):
        return None
    words = [word.lower() for word in NAME_WORD.findall(bare)]
    if not 1 <= len(words) <= 6 or not any(sum(map(str.isalpha, word)) >= 3 for word in words):
        return None
    return " ".join(words)


def describe(docstring: str) -> str | None:
    """The first sentence of a docstring as lower-cased words, or None where that is not 3 to 24 words of plain text."""
    paragraph = PARAGRAPH_END.split("\n" + docstring.strip(), maxsplit=1)[0]
    sentence = SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
    text = MARKUP.sub("", ROLE.sub(r"\1", sentence.replace("\u2019", "'")))
    others = sum(not (letter.isalpha() or letter.isspace()) for letter in text)
    if CODE.search(text) or others > MAX_OTHER_SHARE * len(text):
        return None
    words = TEXT_WORD.findall(text.lower())
    return " ".join(words) if 3 <= len(words) <= 24 else None


class NearDuplicates:
    """Whether a description is nearly one of those given: the same words but for stop words, or four in five shared.

    The second (a Jaccard index of 0.8 or more of the sets of words) is exact and fast: two such sets must share one of
    their rarest words, as many as a set can miss of the other and one more, so only these are looked up.
    """

    def __init__(self, descriptions: Iterable[str]) -> None:
        sets = [frozenset(description.split()) for description in descriptions]
        self.contents = {words - STOP_WORDS for words in sets}
        self.frequency = Counter(word for words in sets for word in words)
        self.by_word: dict[str, list[frozenset[str]]] = defaultdict(list)
        for words in sets:
            for word in self._rarest(words):
                self.by_word[word].append(words)

    def __contains__(self, description: str) -> bool:
        words = frozenset(description.split())
        if words - STOP_WORDS in self.contents:
            return True
        near = (other for word in self._rarest(words) for other in self.by_word.get(word, ()))
        return any(5 * len(words & other) >= 4 * len(words | other) for other in near)

    def _rarest(self, words: frozenset[str]) -> list[str]:
        shared = -(-4 * len(words) // 5)  # so many words at least are in a near duplicate
        return sorted(words, key=lambda word: (self.frequency[word], word))[: len(words) - shared + 1]


def _cache_path(source: PythonFunctionsSource, roots: list[Path], cache_dir: Path | None) -> Path:
    """Where the rows are kept: a name made of all that decides them, but for the seed, which only shuffles."""
    installed = [sorted(path.name for path in root.glob("*.*-info")) for root in roots]
    asked = [source.limit, source.heldout_limit, sorted(source.heldout_packages)]
    made_of = [Path(__file__).read_text(encoding="utf-8"), sys.version, [str(root) for root in roots], installed, asked]
    if cache_dir is None:
        home = os.environ.get("HOME") or tempfile.gettempdir()
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", "plad-dist")
    return cache_dir / f"python-functions-{_digest(json.dumps(made_of))[:24]}.jsonl.gz"


def _read_cache(path: Path) -> tuple[list[NamedFunction], list[NamedFunction]] | None:
    """(training rows, held-out rows), or None where there is no sound file of them."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            trained, held = json.loads(next(file))
            rows = [NamedFunction(*map(str, json.loads(line))) for line in file]
        return (rows[:trained], rows[trained:]) if len(rows) == trained + held else None
    except (OSError, EOFError, ValueError, TypeError, StopIteration, zlib.error):
        return None


def _write_cache(path: Path, train: list[NamedFunction], heldout: list[NamedFunction]) -> None:
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
