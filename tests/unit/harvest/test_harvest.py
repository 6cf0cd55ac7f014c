"""Harvest of named functions, here from generated packages instead of the installed ones."""

from __future__ import annotations

import gzip
import itertools
import multiprocessing
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from plad_dist.config import PythonFunctionsSource
from plad_dist.config_file import parse_config
from plad_dist.data.selection import Selection
from plad_dist.errors import UserError
from plad_dist.harvest import python_functions as module
from plad_dist.harvest.cache import read_cache
from plad_dist.harvest.descriptions import STOP_WORDS, NearDuplicates, describe, function_name
from plad_dist.harvest.parsing import MAX_FILE_BYTES, NamedFunction
from plad_dist.harvest.python_functions import harvest
from tests.conftest import tiny_config

VERBS = ["read", "write", "count", "remove", "merge", "sort", "check", "encode", "split", "rename"]
NOUNS = ["messages", "folders", "tokens", "graphs", "headers", "users", "signals", "images", "events", "tables"]
PLACES = ["mailbox", "archive", "cluster", "session", "catalogue"]


def functions(package: str, rows: int) -> str:
    """Return a module with `rows` functions, each with a different description."""
    choices = itertools.islice(itertools.product(VERBS, NOUNS, PLACES), rows)
    return "\n".join(
        f'def {verb}_{noun}_{place}():\n    """{verb.title()} {package} {noun} near {package}{place} {verb}{noun}."""\n'
        for verb, noun, place in choices
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the only folder of packages: `heldout` has 30 functions, `first` 40, `second` 5."""
    root = tmp_path / "packages"
    for package, rows in {"heldout": 30, "first": 40, "second": 5}.items():
        add(root, f"{package}/__init__.py", functions(package, rows))
    monkeypatch.setattr(module, "_roots", lambda: [root])
    return root


def add(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def source(**changes: object) -> PythonFunctionsSource:
    return PythonFunctionsSource.model_validate(
        {"type": "python_functions", "limit": 1000, "heldout_packages": ["heldout"], **changes}
    )


def names_by_description(rows: list[NamedFunction]) -> dict[str, str]:
    return {row.description: row.name for row in rows}


# -- text


@pytest.mark.parametrize(
    ("identifier", "words"),
    [
        ("count_unread_messages", "count unread messages"),
        ("_private_helper", "private helper"),
        ("getHTTPResponse", "get http response"),
        ("readXML", "read xml"),
        ("Conv2d", "conv2d"),
        ("SHOUT", "shout"),
        ("do_a_thing_with_six_words", "do a thing with six words"),
    ],
)
def test_names_are_split_into_lower_case_words(identifier: str, words: str) -> None:
    assert function_name(identifier) == words


@pytest.mark.parametrize(
    "identifier",
    ["__init__", "test_reads", "_test_reads", "testReads", "x", "_", "a_b", "zu_früh", "one_two_three_four_five_six_7"],
)
def test_useless_names_are_dropped(identifier: str) -> None:
    assert function_name(identifier) is None


@pytest.mark.parametrize(
    ("docstring", "words"),
    [
        ("Return the number of unread messages.", "return the number of unread messages"),
        ("\n    Return the number\n    of messages.\n\n    Slowly.", "return the number of messages"),
        ("Close the file. Open it again.", "close the file"),
        ("Use a cache, e.g. a file, for rows.", "use a cache e g a file for rows"),
        ("Make a ``set_value`` call on :class:`~a.b.Thing`", "make a set value call on a b thing"),
        ("Don't *ever* use 'eval' here!", "don't ever use eval here"),
        ("Sum up the rows\n:param rows: many of them", "sum up the rows"),
        ("Sum up the rows\nArgs:\n    rows: many of them", "sum up the rows"),
        ("Sum up the rows\n    >>> total([1])", "sum up the rows"),
    ],
)
def test_descriptions_are_the_first_sentence_in_plain_words(docstring: str, words: str) -> None:
    assert describe(docstring) == words


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        "Too short.",
        " ".join(["long"] * 25),
        "See https://example.org for more of it",
        ">>> total([1, 2, 3])",
        "Return x = y where that holds",
        "a, (b), -- c, (d), -- e",
        "Über den Wolken ist es schön",
        ":param rows: many of them",
    ],
)
def test_descriptions_that_are_not_plain_sentences_are_dropped(docstring: str) -> None:
    assert describe(docstring) is None


# -- harvested rows


def test_functions_of_classes_branches_and_functions_are_found(root: Path, tmp_path: Path) -> None:
    code = '''
class Box:
    async def open_lid(self):
        """Lift the lid off the box."""
if True:
    try:
        pass
    except ValueError:
        def shut_lid():
            """Put the lid back on again."""
            def inner_part():
                """Do something deep within it."""
def bare_name(): pass
def just_name():
    """Just name."""
def count_unread_messages():
    """Count unread messages."""
'''
    add(root, "second/boxes.py", code)
    train, _ = harvest(source(), 1, tmp_path)
    names = {row.name for row in train if row.package == "second"} - set(generated_names("second", 5))
    assert names == {"open lid", "shut lid", "inner part"}


def generated_names(package: str, rows: int) -> list[str]:
    return [line[4:-3].replace("_", " ") for line in functions(package, rows).splitlines() if line.startswith("def")]


def test_held_out_packages_are_never_trained_on(root: Path, tmp_path: Path) -> None:
    train, heldout = harvest(source(), 1, tmp_path)
    assert Counter(row.package for row in heldout) == {"heldout": 30}
    assert Counter(row.package for row in train) == {"first": 40, "second": 5}
    assert not names_by_description(train).keys() & names_by_description(heldout).keys()


def test_near_duplicates_of_held_out_rows_are_not_trained_on(root: Path, tmp_path: Path) -> None:
    add(
        root,
        "heldout/extra.py",
        'def find_root():\n    """Find the root of the tree."""\n'
        'def walk():\n    """Visit all green nodes under one old parent in some fixed order."""\n',
    )
    add(
        root,
        "second/extra.py",
        'def find_root():\n    """Find the root of the tree."""\n'
        'def find_it():\n    """Find a root for this tree"""\n'
        'def go():\n    """Visit all blue nodes under one old parent in some fixed order."""\n'
        'def other():\n    """Visit all nodes of the large graph in order."""\n',
    )
    train, heldout = harvest(source(), 1, tmp_path)
    assert {"find root", "walk"} <= set(names_by_description(heldout).values())
    assert {"find root", "find it", "go", "other"} & set(names_by_description(train).values()) == {"other"}


def test_near_duplicates_are_found_exactly() -> None:
    chooser = random.Random(5)
    pool = [" ".join(chooser.choices("abcdefghijklmnopqrstuvwxyz"[:14], k=chooser.randint(3, 12))) for _ in range(400)]
    indexed, candidates = pool[:80], pool[80:]
    near = NearDuplicates(indexed)

    def is_near_duplicate(description: str) -> bool:
        words = set(description.split())
        return any(
            len(words & set(other.split())) >= 0.8 * len(words | set(other.split()))
            or words - STOP_WORDS == set(other.split()) - STOP_WORDS
            for other in indexed
        )

    expected = [is_near_duplicate(description) for description in candidates]
    assert [description in near for description in candidates] == expected
    assert 0 < sum(expected) < len(expected)


def test_a_description_has_one_name(root: Path, tmp_path: Path) -> None:
    add(root, "second/same.py", "".join(f'def name_{i}():\n    """The same words each time."""\n' for i in "abc"))
    train, _ = harvest(source(), 1, tmp_path)
    assert [row.name for row in train if row.description == "the same words each time"] == ["name a"]


def test_limits_hold_and_no_package_dominates(root: Path, tmp_path: Path) -> None:
    add(root, "third/__init__.py", functions("third", 40))
    add(root, "heldout_small/__init__.py", functions("heldout_small", 6))
    changes = {"limit": 100, "heldout_limit": 14, "heldout_packages": ["heldout", "heldout_small"]}
    train, heldout = harvest(source(**changes), 1, tmp_path)
    assert Counter(row.package for row in heldout) == {"heldout": 8, "heldout_small": 6}
    assert Counter(row.package for row in train) == {"first": 15, "third": 15, "second": 5}


def test_the_seed_decides_the_order_and_nothing_else(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = harvest(source(), 1, tmp_path / "a")
    monkeypatch.setattr(module, "PROCESSES", 3)
    assert harvest(source(), 1, tmp_path / "b") == first
    for rows, reshuffled in zip(first, harvest(source(), 2, tmp_path / "a"), strict=True):
        assert rows != reshuffled
        assert set(rows) == set(reshuffled)


def test_code_is_never_executed(root: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    run = f"open({str(trace)!r}, 'w').close()\n"
    add(root, "second/active.py", f'{run}def is_parsed(x={run.strip()}):\n    """Tell that this was parsed."""\n')
    train, _ = harvest(source(), 1, tmp_path)
    assert names_by_description(train)["tell that this was parsed"] == "is parsed"
    assert not trace.exists()


def test_unreadable_files_and_test_folders_are_skipped(root: Path, tmp_path: Path) -> None:
    expected = harvest(source(), 1, tmp_path / "a")
    good = 'def unwanted_thing():\n    """Be of no use at all."""\n'
    add(root, "second/broken.py", good + "def (:\n")
    add(root, "second/binary.py", good.encode() + b"# \xff\0")
    add(root, "second/large.py", good + "#" * MAX_FILE_BYTES)
    add(root, "second/deep.py", good + "x = " + "(" * 5000 + ")" * 5000)
    (root / "second/dangling.py").symlink_to(tmp_path / "nowhere")
    for folder in ("test", "second/tests", "second/testing", "second/__pycache__", "second-1.0.dist-info"):
        add(root, f"{folder}/code.py", good)
    assert harvest(source(), 1, tmp_path / "b") == expected


def test_the_error_about_too_few_held_out_rows_names_the_packages(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heldout_packages: found 5 described functions in second, absent"):
        harvest(source(heldout_packages=["second", "absent"]), 1, tmp_path)


def test_no_training_rows_are_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 in all other packages"):
        harvest(source(heldout_packages=["heldout", "first", "second"]), 1, tmp_path)


def test_rows_found_in_time_are_used_but_not_cached(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parse = module._parse

    def late(*args: object, **kwargs: object) -> Iterator[NamedFunction]:
        yield from itertools.islice(parse(*args, **kwargs), 30)  # type: ignore[arg-type]
        if not kwargs:  # the held-out packages are parsed in time
            raise multiprocessing.TimeoutError

    monkeypatch.setattr(module, "_parse", late)
    train, heldout = harvest(source(), 1, tmp_path / "cache")
    assert (len(train), len(heldout)) == (30, 30)
    assert "prompts.source.seconds=120 are over" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_the_error_names_a_time_limit_that_is_too_short(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seconds=0, which may be too few"):
        harvest(source().model_copy(update={"seconds": 0}), 1, tmp_path)


# -- cache


def test_cached_rows_are_used_unless_the_source_or_the_packages_changed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = harvest(source(), 1)
    add(root, "second/more.py", 'def one_more():\n    """Add one more to them."""\n')
    assert harvest(source(), 1) == first
    assert len(harvest(source(limit=1001), 1)[0]) == len(first[0]) + 1
    add(root, "second-2.0.dist-info/METADATA", "")
    assert len(harvest(source(), 1)[0]) == len(first[0]) + 1
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.gz")} == {"plad-dist"}


@pytest.mark.parametrize("damage", ["empty", "short", "text", "rows"])
def test_a_damaged_cache_is_rebuilt(root: Path, tmp_path: Path, damage: str) -> None:
    first = harvest(source(), 1, tmp_path)
    (cache,) = tmp_path.glob("*.gz")
    sound = cache.read_bytes()
    match damage:
        case "empty":
            cache.write_bytes(b"")
        case "short":
            cache.write_bytes(sound[: len(sound) // 2])
        case "text":
            cache.write_bytes(b"no gzip")
        case "rows":
            with gzip.open(cache, "wt") as file:
                file.write('["1", 2]\n["a", "b"]\n')
    assert harvest(source(), 1, tmp_path) == first
    assert read_cache(cache) is not None
    assert list(tmp_path.glob("*.gz")) == [cache]


def test_an_unwritable_cache_does_not_stop_the_harvest(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    train, heldout = harvest(source(), 1, tmp_path / "file" / "cache")
    assert len(train) == 45
    assert len(heldout) == 30


def test_prompts_can_ask_for_names_or_for_descriptions(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = {}
    for answer in ("name", "description"):
        raw = tiny_config(tmp_path)
        raw["prompts"] = {"source": source(answer=answer, heldout_limit=30).model_dump()}
        rows[answer] = [
            (prompt.messages[0]["content"], prompt.reference) for _, prompt in Selection(parse_config(raw, "test"))
        ]
    assert len(rows["name"]) == 75
    assert rows["description"] == [(reference, prompt) for prompt, reference in rows["name"]]
