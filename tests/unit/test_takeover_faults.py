"""Takeover of products: after a kill, an error or a race at any call, the next command ends it."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist import drafts, reuse, rundir
from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data.claims import SupersededError
from plad_dist.data.prompts import prepare
from plad_dist.errors import RunFailed, UserError
from plad_dist.reuse import take_over
from plad_dist.rundir import RunDir, check_same_run, load_run, open_run
from tests.caching import cached
from tests.conftest import tiny_config, write_prompts
from tests.power_loss import PowerRecord

WRITES = ("link", "rename", "replace", "mkdir", "unlink", "rmdir", "file")
CALLS = (*WRITES, "listdir", "scandir", "stat", "fsync", "open")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE)


class Killed(BaseException):
    """The command dies."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a run with prompts, a model, samples and a log that grows."""
    folder = tmp_path_factory.mktemp("source")
    write_prompts(folder, 80)
    raw = tiny_config(folder)
    raw["run"]["dir"] = str(folder / "first")
    config = parse_config(raw, "first")
    run = open_run(config)
    prepare(config, run.storage)
    for name in (
        "models/teacher/plad.json",
        "events/teacher/metrics.jsonl",
        "samples/teacher/round-0/part-00000.arrow",
    ):
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text(name)
    return raw


@pytest.fixture
def configs(source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Config]:
    """The config of the source and that of the new run, whose folder exists."""
    monkeypatch.setattr(yaml, "load", cached(yaml.load))  # YAML takes most of the time
    monkeypatch.setattr(rundir, "dump_yaml", cached(rundir.dump_yaml))
    (tmp_path / "second").mkdir()
    second = {**source, "run": {**source["run"], "dir": str(tmp_path / "second")}}
    return parse_config(source, "first"), parse_config(second, "second")


def reset(config: Config) -> Path:
    """Empty the new run directory."""
    root = RunDir.of(config).root
    shutil.rmtree(root)
    root.mkdir()
    return root


def content(root: Path) -> dict[str, bytes]:
    """Return the files of a run by path, without claims and temporary files."""
    files = (file for file in root.rglob("[!.]*") if file.is_file() and "claims" not in file.parts)
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


@contextmanager
def failing_at(
    number: int, root: Path, error: Callable[[], BaseException], names: tuple[str, ...] = CALLS
) -> Iterator[list[str]]:
    """Let the n-th of some calls of the file system on the new run fail, and yield these calls."""
    calls: list[str] = []

    def wrapped(name: str, real: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            paths = (path, *args[:1]) if name in ("link", "rename", "replace") else (path,)
            if name == "fsync" or any(
                isinstance(item, str | Path) and str(item).startswith(str(root)) for item in paths
            ):
                calls.append(name)
                if len(calls) == number:
                    raise error()
                if name == "fsync":
                    return None
            return real(path, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in set(names) - {"file"}:
            patched.setattr(os, name, wrapped(name, getattr(os, name)))
        patched.setattr(builtins, "open", wrapped("file", builtins.open))
        patched.setattr(io, "open", wrapped("file", io.open))
        yield calls


def begin(config: Config, source: Config) -> RunDir:
    take_over(config, [source])
    return open_run(config)


def failure_of(config: Config, source: Config) -> str | None:
    """Return the message with which a command fails; None if the error was harmless."""
    try:
        begin(config, source)
    except (RunFailed, UserError) as error:
        return str(error)
    return None


def finished(config: Config, source: Config) -> dict[str, bytes]:
    """Take over with the next command, and return the content of the run."""
    root = begin(config, source).root
    assert not [file.name for file in root.iterdir() if file.name.startswith((".begun-", ".abandoned-"))]
    return content(root)


def number_of_calls(config: Config, source: Config, names: tuple[str, ...] = CALLS) -> int:
    root = reset(config)
    with failing_at(0, root, Killed, names) as calls:
        take_over(config, [source])
        open_run(config)
    return len(calls)


def test_a_takeover_that_is_killed_at_any_write_is_finished_by_the_next_command(configs: tuple[Config, Config]) -> None:
    source, config = configs
    expected = finished(config, source)
    assert {"run.yaml", "prompts/manifest.json", "models/teacher/plad.json"} <= expected.keys()
    for number in range(1, number_of_calls(config, source, WRITES) + 1):
        root = reset(config)
        with failing_at(number, root, Killed, WRITES), pytest.raises(Killed):
            begin(config, source)
        assert finished(config, source) == expected, number


@pytest.mark.parametrize("error", ERRORS)
def test_faults_of_the_file_system_at_any_call_of_a_takeover_lose_nothing(
    error: int, configs: tuple[Config, Config]
) -> None:
    source, config = configs
    expected, before = finished(config, source), content(RunDir.of(source).root)
    for number in range(1 + ERRORS.index(error), number_of_calls(config, source) + 1, len(ERRORS)):
        root = reset(config)
        with failing_at(number, root, partial(OSError, error, os.strerror(error))) as calls:
            message = failure_of(config, source)
        assert message is None or os.strerror(error) in message, (number, calls[number - 1])
        if calls[number - 1] not in ("unlink", "rmdir"):
            left = [path for path in root.rglob(".*") if ".begun-" not in str(path) and ".abandoned-" not in str(path)]
            assert not left, (number, calls[number - 1])
        assert finished(config, source) == expected, (number, calls[number - 1])
    assert content(RunDir.of(source).root) == before, "the source is unchanged"


@pytest.mark.parametrize("change", ["commit", "repair"])
def test_a_takeover_takes_whole_files_of_a_source_that_goes_on_or_is_repaired(
    configs: tuple[Config, Config], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source, config = configs
    folder = RunDir.of(source).root / "samples/teacher/round-0"
    part, later = folder / "part-00000.arrow", folder / "part-00001.arrow"
    link, links = os.link, number_of_calls(config, source, ("link",))
    for number in range(links):
        calls = itertools.count()

        def changing(*paths: Any, calls: Iterator[int] = calls, number: int = number, **options: Any) -> None:
            if next(calls) == number:
                if change == "commit":
                    later.write_bytes(b"later")
                else:
                    part.rename(folder / "set-aside")
            link(*paths, **options)

        reset(config)
        with monkeypatch.context() as patched:
            patched.setattr(os, "link", changing)
            taken = content(begin(config, source).root)
        assert taken.get(f"samples/teacher/round-0/{part.name}") in (
            None,
            str(part.relative_to(RunDir.of(source).root)).encode(),
        )
        assert taken.get(f"samples/teacher/round-0/{later.name}") in (None, b"later")
        assert "run.yaml" in taken
        later.unlink(missing_ok=True)
        if (folder / "set-aside").exists():
            (folder / "set-aside").rename(part)


def test_faults_of_the_power_at_any_call_of_a_takeover_lose_nothing(configs: tuple[Config, Config]) -> None:
    source, config = configs
    expected, before = finished(config, source), content(RunDir.of(source).root)
    record = PowerRecord(reset(config))
    with record.recording():
        begin(config, source)
        record.promise("begun")
    for loss in record.losses():
        if loss.promised:
            assert content(RunDir.of(config).root) == expected, loss
        assert finished(config, source) == expected, loss
    assert content(RunDir.of(source).root) == before, "the source is unchanged"


def test_a_takeover_that_another_command_overtakes_moves_nothing_more(
    configs: tuple[Config, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = configs
    expected = finished(config, source)
    for name in ("new_draft", "complete", "_put_in_place"):
        reset(config)
        overtaken(monkeypatch, name, lambda: begin(config, source))
        with pytest.raises(SupersededError, match="`plad run` on"):
            take_over(config, [source], "plad study")
        assert finished(config, source) == expected, name


def overtaken(monkeypatch: pytest.MonkeyPatch, name: str, other: Callable[[], object]) -> None:
    """Let another command do the whole takeover before one function of this one."""
    real = getattr(drafts, name)

    def function(*args: Any) -> Any:
        for module in (drafts, reuse):
            monkeypatch.setattr(module, name, real, raising=False)
        other()
        return real(*args)

    for module in (drafts, reuse):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)


def test_a_complete_draft_binds_the_run_to_its_config(configs: tuple[Config, Config], source: dict[str, Any]) -> None:
    """A command is killed between the moves. Then it is too late for another config."""
    first, config = configs
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            take_over(config, [first])
    other = parse_config({**source, "run": {**source["run"], "dir": config.run.dir, "seed": 6}}, "other")
    with pytest.raises(UserError, match=r"run\.seed: 5 before, 6 now"):
        check_same_run(other, RunDir.of(other))
    assert load_run(config.run.dir).config.run.seed == 5
    open_run(config)
    assert content(RunDir.of(config).root).keys() >= {"run.yaml", "prompts/manifest.json"}


def test_the_draft_of_a_superseded_command_is_never_completed(
    configs: tuple[Config, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes up after its last look at the claims, and finds its draft removed."""
    source, config = configs
    expected = finished(config, source)
    root, real = reset(config), drafts._put_in_place

    def killed_before_the_moves() -> None:
        monkeypatch.setattr(drafts, "_put_in_place", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            take_over(config, [source])
        monkeypatch.setattr(drafts, "_put_in_place", real)

    overtaken(monkeypatch, "write_into_folder", killed_before_the_moves)
    with pytest.raises(SupersededError, match="`plad run` on"):
        take_over(config, [source], "plad study")
    assert not (root / ".begun-00001").exists()
    assert finished(config, source) == expected


def test_the_draft_of_the_latest_command_is_the_one_that_counts(configs: tuple[Config, Config]) -> None:
    config = configs[1]
    for name in (".begun-00009", ".begun-00010"):
        draft = RunDir.of(config).root / name
        draft.mkdir()
        (draft / "run.yaml").write_text(name)
    assert drafts.complete_draft(RunDir.of(config).storage) == ".begun-00010"


def test_a_draft_that_is_half_removed_does_not_count_as_complete(
    configs: tuple[Config, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs[1]
    draft = RunDir.of(config).root / ".begun-00001"
    (draft / "prompts").mkdir(parents=True)
    (draft / "run.yaml").write_text("complete")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        drafts.remove_draft(draft)
    assert drafts.complete_draft(RunDir.of(config).storage) is None


def test_garbage_that_cannot_be_deleted_stops_no_command(
    configs: tuple[Config, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command removes it too, or a file server keeps a file that is still open there."""
    config = configs[1]
    for name in (".begun-00001", ".abandoned-1"):
        (RunDir.of(config).root / name / "prompts").mkdir(parents=True)

    def busy(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(os, "rmdir", busy)
    assert open_run(config).storage.read("run.yaml") is not None
    monkeypatch.undo()
    root = open_run(config).root
    assert not [file.name for file in root.iterdir() if file.name.startswith(".")]


def test_a_listing_that_fails_does_not_speak_of_products_of_another_run(
    configs: tuple[Config, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "_names", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RunFailed, match=r"cannot be listed: .*Input/output error") as caught:
        drafts.settle_drafts(RunDir.of(configs[1]).storage)
    assert "products" not in str(caught.value)
