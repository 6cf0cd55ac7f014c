"""Power losses: every state in which a file system may come back, from a record of the calls.

A file keeps the bytes of its last flush. A name that was made or removed is kept once its folder
was flushed. Of the names that were not flushed, a journaling file system keeps those up to some
point, in the order in which they were made, and drops all later ones. A rename is never halved.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest


@dataclass(eq=False)
class Node:
    """File or folder.

    Attributes:
        entries: current entries of a folder by name; None for a file.
        flushes: bytes of a file at each flush, with the time, oldest first.
    """

    entries: dict[str, Node] | None
    flushes: list[tuple[int, bytes]] = field(default_factory=list)

    def bytes_at(self, time: int) -> bytes:
        """Return the bytes that the disk has at a time."""
        return next((data for at, data in reversed(self.flushes) if at <= time), b"")


@dataclass
class Change:
    """Entry of a folder that was set, or removed if there is no node."""

    folder: Node
    name: str
    node: Node | None
    time: int
    flushed: float = float("inf")


class Loss(NamedTuple):
    """State after a power loss: the time of the loss, and what was promised before."""

    time: int
    promised: frozenset[str]


class PowerRecord:
    """Records what is done below a folder. Time is the number of calls so far."""

    def __init__(self, root: Path) -> None:
        self._root_path, self._root = root, Node({})
        self._changes: list[Change] = []
        self._time = 0
        self._promises: list[tuple[int, str]] = []
        self._handles: dict[int, Node] = {}
        self._add_existing(root, self._root)
        for change in self._changes:
            change.flushed = 0
        for node in self._nodes():
            node.flushes = [(0, data) for _, data in node.flushes]
        self._time = 0

    def promise(self, what: str) -> None:
        """Note that something was acknowledged: no later loss may undo it."""
        self._promises.append((self._time, what))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Patch the calls of the file system."""
        calls: dict[str, Callable[..., Any]] = {
            "link": self._link, "replace": self._rename, "rename": self._rename, "unlink": self._remove,
            "rmdir": self._remove, "mkdir": self._mkdir, "open": self._os_open, "close": self._close,
            "fsync": self._fsync,
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for name, note in calls.items():
                patch.setattr(os, name, self._noted(getattr(os, name), note))
            opened = self._noted(io.open, self._open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            yield

    def losses(self) -> Iterator[Loss]:
        """Write each distinct state after a power loss into the folder, and yield it."""
        seen = set()
        for time in range(self._time + 1):
            done = [change for change in self._changes if change.time <= time]
            cuts = {0} | {change.time for change in done if change.flushed > time}
            promised = frozenset(what for at, what in self._promises if at <= time)
            for cut in sorted(cuts):
                state = self._state([change for change in done if change.time <= cut or change.flushed <= time], time)
                key = (promised, tuple(state))
                if key not in seen:
                    seen.add(key)
                    self._write(state)
                    yield Loss(time, promised)

    def _state(self, changes: list[Change], time: int) -> list[tuple[str, Node, bytes | None]]:
        """Return path, node and bytes (None for a folder) of everything that is left."""
        entries: dict[Node, dict[str, Node]] = {}
        for change in changes:
            folder = entries.setdefault(change.folder, {})
            if change.node is None:
                folder.pop(change.name, None)
            else:
                folder[change.name] = change.node

        def below(node: Node, path: str) -> Iterator[tuple[str, Node, bytes | None]]:
            for name, child in sorted(entries.get(node, {}).items()):
                if child.entries is None:
                    yield f"{path}{name}", child, child.bytes_at(time)
                else:
                    yield f"{path}{name}", child, None
                    yield from below(child, f"{path}{name}/")

        return list(below(self._root, ""))

    def _write(self, state: list[tuple[str, Node, bytes | None]]) -> None:
        for child in self._root_path.iterdir():
            if child.is_dir():
                _delete_tree(child)
            else:
                child.unlink()
        written: dict[Node, Path] = {}
        for relative, node, data in state:
            path = self._root_path / relative
            if data is None:
                path.mkdir()
            elif node in written:
                os.link(written[node], path)
            else:
                path.write_bytes(data)
                written[node] = path

    # The record. Each method gets the arguments of a call that has been carried out.

    def _noted(self, call: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            self._time += 1
            note(result, *arguments, **options)
            return result

        return noted

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[Node, str] | None:
        """Return the folder and the name of a path below the root; None for any other."""
        if isinstance(path, int):
            return None
        node = self._root if dir_fd is None else self._handles.get(dir_fd)
        if dir_fd is None:
            absolute = Path(path).absolute()
            if not absolute.is_relative_to(self._root_path) or absolute == self._root_path:
                return None
            *parents, name = absolute.relative_to(self._root_path).parts
        else:
            *parents, name = Path(path).parts
        for parent in parents:
            assert node is not None
            assert node.entries is not None
            node = node.entries[parent]
        return None if node is None else (node, name)

    def _node(self, path: Any, dir_fd: int | None = None) -> Node | None:
        if not isinstance(path, int) and Path(path).absolute() == self._root_path:
            return self._root
        place = self._place(path, dir_fd)
        return None if place is None else (place[0].entries or {}).get(place[1])

    def _set(self, place: tuple[Node, str] | None, node: Node | None) -> None:
        if place is None:
            return
        folder, name = place
        assert folder.entries is not None
        if node is None:
            folder.entries.pop(name, None)
        else:
            folder.entries[name] = node
        self._changes.append(Change(folder, name, node, self._time))

    def _link(self, _: None, source: Any, target: Any, **__: Any) -> None:
        node = self._node(source)
        if node is None:  # elsewhere, and committed there
            node = Node(None, [(self._time, Path(source).read_bytes())])
        self._set(self._place(target), node)

    def _rename(self, _: None, source: Any, target: Any, **__: Any) -> None:
        self._set(self._place(target), self._node(source))
        self._set(self._place(source), None)

    def _remove(self, _: None, path: Any, *, dir_fd: int | None = None) -> None:
        self._set(self._place(path, dir_fd), None)

    def _mkdir(self, _: None, path: Any, *__: Any, **___: Any) -> None:
        self._set(self._place(path), Node({}))

    def _os_open(self, handle: int, path: Any, flags: int, *_: Any, dir_fd: int | None = None, **__: Any) -> None:
        if flags & os.O_CREAT:
            self._created(self._place(path, dir_fd), is_cleared=bool(flags & os.O_TRUNC))
        node = self._node_or_new(path, dir_fd)
        if node is not None:
            self._handles[handle] = node

    def _open(self, stream: Any, file: Any, mode: str = "r", *_: Any, **__: Any) -> None:
        if set(mode) & set("wxa"):
            self._created(self._place(file), is_cleared="w" in mode)
        node = self._node_or_new(file)
        if node is not None:
            self._handles[stream.fileno()] = node

    def _close(self, _: None, handle: int) -> None:
        self._handles.pop(handle, None)

    def _fsync(self, _: None, handle: int) -> None:
        node = self._handles.get(handle)
        if node is None:
            return
        if node.entries is None:
            with io.FileIO(f"/proc/self/fd/{handle}") as file:
                node.flushes.append((self._time, file.readall()))
            return
        calls = {change.time for change in self._changes if change.folder is node}
        for change in self._changes:
            if change.time in calls:
                change.flushed = min(change.flushed, self._time)

    def _created(self, place: tuple[Node, str] | None, *, is_cleared: bool) -> None:
        if place is None:
            return
        node = (place[0].entries or {}).get(place[1])
        if node is None:
            self._set(place, Node(None))
        elif is_cleared:
            node.flushes.append((self._time, b""))

    def _node_or_new(self, path: Any, dir_fd: int | None = None) -> Node | None:
        """Return the node of a path, which another language's library may have written."""
        node = self._node(path, dir_fd)
        place = self._place(path, dir_fd)
        if node is None and place is not None:
            node = Node({} if Path(path).is_dir() else None)
            self._set(place, node)
        return node

    def _add_existing(self, path: Path, node: Node) -> None:
        for child in sorted(path.iterdir()):
            made = Node({}) if child.is_dir() else Node(None)
            self._set((node, child.name), made)
            if child.is_dir():
                self._add_existing(child, made)
            else:
                made.flushes.append((0, child.read_bytes()))

    def _nodes(self) -> Iterator[Node]:
        for change in self._changes:
            if change.node is not None:
                yield change.node


def _delete_tree(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir():
            _delete_tree(child)
        else:
            child.unlink()
    folder.rmdir()
