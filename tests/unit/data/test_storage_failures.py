"""Storage that fails: only "not found" means absent, and no reply is taken for an answer."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.data import local_files
from plad_dist.data import storage as storage_module
from plad_dist.data.dataset import Dataset
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed

FAILURES = [errno.ESTALE, errno.EIO, errno.EACCES, errno.ELOOP, errno.ETIMEDOUT]
ABSENT = [errno.ENOENT, errno.ENOTDIR]
READS: dict[str, tuple[Callable[[Storage], Any], Any]] = {
    "read": (lambda storage: storage.read("a/x"), None),
    "read_with_checksum": (lambda storage: storage.read_with_checksum("a/x"), None),
    "view": (lambda storage: storage.view("a/x"), None),
    "checksum": (lambda storage: storage.checksum("a/x"), None),
    "exists": (lambda storage: storage.exists("a/x"), False),
    "sizes": (lambda storage: storage.sizes("a"), {}),
    "delete": (lambda storage: storage.delete("a/x"), None),
    "delete_folder": (lambda storage: storage.delete_folder("a"), None),
    "move": (lambda storage: storage.move("a/x", "a/y"), False),
}


@contextmanager
def failing(code: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every call of the file system on `a` fail."""

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def fail(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and Path(str(path)).name in ("a", "x"):
                raise OSError(code, os.strerror(code), str(path))
            return call(path, *arguments, **options)

        return fail

    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "scandir", "unlink", "open", "rename", "rmdir"):
            patch.setattr(os, name, wrapped(getattr(os, name)))
        patch.setattr(io, "open", wrapped(io.open))
        patch.setattr(pa, "memory_map", wrapped(pa.memory_map))
        yield


@pytest.mark.parametrize("name", READS)
def test_faults_of_the_storage_are_never_taken_for_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    storage = Storage(str(tmp_path))
    storage.replace("a/x", b"1")
    call, absent = READS[name]
    for code in FAILURES:
        with failing(code, monkeypatch), pytest.raises(RunFailed, match=rf"{tmp_path}/a.*: cannot be .*is kept"):
            call(storage)
        assert storage.read("a/x") == b"1"
    for code in ABSENT if name != "move" else ():  # the folder of its target exists
        with failing(code, monkeypatch):
            assert call(storage) == absent


def test_faults_in_the_middle_of_a_listing_are_no_end_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    for name in "abc":
        storage.replace(f"d/{name}", b"1")

    class Broken:
        def __init__(self, path: Any) -> None:
            self._entries = real(path)

        def __enter__(self) -> Iterator[Any]:
            yield next(self._entries)
            raise OSError(errno.ESTALE, "Stale file handle")

        def __exit__(self, *_: object) -> None:
            self._entries.close()

    real = os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Broken)
        with pytest.raises(RunFailed, match=r"d: cannot be listed: .*Stale file handle"):
            storage.sizes("d")
    assert storage.sizes("d") == {"a": 1, "b": 1, "c": 1}


def test_a_file_or_a_broken_link_on_the_way_is_absence(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.replace("file", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for key in ("file/x", "none/x", "link"):
        assert (storage.read(key), storage.exists(key), storage.checksum(key)) == (None, False, None)
    assert (storage.sizes("file"), storage.sizes("none")) == ({}, {})
    assert storage.sizes("") == {"file": 1}
    storage.delete("file/x")
    storage.delete_folder("none")


@pytest.mark.parametrize("command", ["create", "replace", "upload"])
@pytest.mark.parametrize("step", ["make the folder", "name a temporary file", "flush", "put"])
def test_a_write_does_not_fail_when_another_process_deletes_its_folder(
    command: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has lost a block may write into its folder while the winner deletes that."""
    storage, folder, source = Storage(str(tmp_path / "run")), tmp_path / "run/a/b", tmp_path / "source"
    storage.replace("a/b/other", b"1")
    source.write_bytes(b"2")
    deleted = []
    owner, name = {
        "make the folder": (local_files, "make_folders"),
        "name a temporary file": (uuid, "uuid4"),
        "flush": (local_files, "fsync"),
        "put": (os, "link" if command == "create" else "replace"),
    }[step]
    original = getattr(owner, name)

    def delete_after(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not deleted:
            deleted.append(True)
            shutil.rmtree(folder)
        return result

    monkeypatch.setattr(owner, name, delete_after)
    if command == "upload":
        storage.upload("a/b/x", source)
    else:
        getattr(storage, command)("a/b/x", b"2")
    assert deleted
    assert storage.read("a/b/x") == b"2"


def test_a_folder_is_deleted_although_another_process_writes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, rmdir, late = Storage(str(tmp_path)), os.rmdir, []
    storage.replace("a/x", b"1")

    def after_a_write(path: Any, **kwargs: Any) -> None:
        if not late:
            late.append(True)
            storage.replace("a/y", b"1")
        rmdir(path, **kwargs)

    monkeypatch.setattr(os, "rmdir", after_a_write)
    storage.delete_folder("a")
    assert late
    assert not storage.exists("a")


def test_a_link_that_was_made_although_its_reply_was_lost_is_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server repeats a request whose reply was lost, and then finds the first link."""
    storage, link = Storage(str(tmp_path)), os.link

    def twice(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert storage.create("a/x", b"1")
    assert not storage.create("a/x", b"1"), "another writer's, though of the same bytes"
    assert storage.sizes("a") == {"x": 1}


def test_every_name_that_a_write_makes_is_synced_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsynced: set[Path] = set()
    opened: dict[int, Path] = {}
    calls = {name: getattr(os, name) for name in ("mkdir", "link", "replace", "rename", "open", "fsync")}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = calls[name](*arguments, **options)
            if name == "open":
                opened[result] = Path(arguments[0])
            elif name == "fsync":
                unsynced.difference_update([made for made in unsynced if made.parent == opened[arguments[0]]])
            else:
                unsynced.add(Path(arguments[0 if name == "mkdir" else 1]))
            return result

        return call

    for name in calls:
        monkeypatch.setattr(os, name, recorded(name))
    source = tmp_path / "file"
    source.write_bytes(b"1")
    storage = Storage(str(tmp_path / "new/run"))
    data = Dataset(storage, "samples/teacher/round-0", pa.schema([("x", pa.string())]))
    part, _ = data.commit(0, pa.table({"x": ["a"]}), fingerprint="f", attempt="a")
    data.finish(1, fingerprint="f", facts={}, known_parts=[part])
    storage.upload("checkpoints/round-0/step-1/attempt-1/z.pt", source)
    storage.move("samples/teacher/round-0/part-00000.arrow", "samples/damaged/part")
    assert opened
    assert unsynced == set()


# -- conditional puts to an object store


class ScriptedStore:
    """Server of one bucket whose replies to puts follow a script."""

    def __init__(self) -> None:
        self.script: list[str] = []  # next replies; "ok" when it is over
        self.objects: dict[str, bytes] = {}
        self.puts = 0
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: ScriptedStore
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        store, data = self.store, self.rfile.read(int(self.headers["Content-Length"]))
        store.puts += 1
        match store.script.pop(0) if store.script else "ok":
            case "conflict":  # with a put that is given up later
                return self._reply(409)
            case "fails":
                return self._reply(500)
            case "stored, reply lost":
                store.objects.setdefault(self.path, data)
                self.close_connection = True
                return None
            case "stored, 500":
                store.objects.setdefault(self.path, data)
                return self._reply(500)
            case "lost to another":
                store.objects.setdefault(self.path, b"other")
                return self._reply(500)
        if self.path in store.objects:
            return self._reply(412)
        store.objects[self.path] = data
        return self._reply(200)

    def do_GET(self) -> None:
        data = self.store.objects.get(self.path)
        self._reply(404 if data is None else 200, data or b"")

    def _reply(self, status: int, data: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 05:00:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedStore]:
    server = ScriptedStore()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name, value in {
        "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage_module, "_LONGEST_PAUSE_S", 0.01)
    yield server
    server.close()


@pytest.mark.parametrize(
    "script",
    [
        [], ["conflict"], ["fails"], ["stored, reply lost"], ["stored, 500"], ["fails", "conflict", "stored, 500"],
        ["conflict", "stored, reply lost", "conflict"],
    ],
)  # fmt: skip
def test_a_put_with_an_unknown_outcome_is_tried_again_and_recognised(store: ScriptedStore, script: list[str]) -> None:
    storage = Storage("s3://bucket/run")
    store.script = list(script)
    assert storage.create("a", b"ours")
    assert storage.read("a") == b"ours"
    assert not storage.create("a", b"ours"), "an object of the same bytes that this call did not make"
    assert not storage.create("a", b"late")
    assert storage.read("a") == b"ours"


@pytest.mark.parametrize("script", [["lost to another"], ["fails", "lost to another", "conflict"]])
def test_a_put_that_lost_while_its_outcome_was_unknown_has_lost(store: ScriptedStore, script: list[str]) -> None:
    store.script = list(script)
    assert not Storage("s3://bucket/run").create("a", b"ours")
    assert store.objects["/bucket/run/a"] == b"other"


@pytest.mark.parametrize("reply", ["fails", "conflict"])
def test_the_tries_of_a_put_are_bounded(store: ScriptedStore, reply: str) -> None:
    store.script = [reply] * 1000
    with pytest.raises(RunFailed, match=r"s3://bucket/run/a: cannot be written: .*is kept"):
        Storage("s3://bucket/run").create("a", b"ours")
    assert store.puts == 10


def test_the_timeout_of_a_put_grows_with_its_bytes(store: ScriptedStore) -> None:
    storage = Storage("s3://bucket/run")
    seconds = [storage._store_for(size, retried=False).client_options["timeout"] for size in (0, 29 << 20, 100 << 20)]
    assert seconds == ["30s", "30s", "120s"]
    assert storage._store_for(1 << 30, retried=False).client_options["timeout"] == "1920s"
