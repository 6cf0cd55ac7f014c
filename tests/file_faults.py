"""Faults of a file system: the n-th call fails with an error, or the process dies at it."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE]
KILL = 0
_CALLS = ("open", "close", "link", "replace", "rename", "unlink", "mkdir", "rmdir", "scandir", "stat", "lstat")


class Kill(BaseException):
    """Death of the process. No call after it has an effect."""


class Faults:
    """Counts the calls on files below a folder, and lets one of them fail.

    Flushes to the disk are counted but not carried out, which makes the tests fast.

    Args:
        at: number of the call that fails, from 1; 0 for none.
        code: its error number, or `KILL`.

    Attributes:
        hit: name of the call that failed, None before.
    """

    def __init__(self, root: Path, at: int, code: int) -> None:
        self._root, self._at, self._code = str(root), at, code
        self._count, self._is_dead = 0, False
        self._handles: set[int] = set()
        self.hit: str | None = None

    @contextmanager
    def injected(self) -> Iterator[None]:
        """Patch the calls of the file system."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            patch.setattr(os, "fsync", self._flush)
            opened = self._opened(io.open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            yield

    def _tick(self, name: str) -> None:
        if self._is_dead:
            raise Kill
        self._count += 1
        if self._count == self._at:
            self.hit = name
            if self._code == KILL:
                self._is_dead = True
                raise Kill
            raise OSError(self._code, os.strerror(self._code), name)

    def _is_ours(self, path: Any, options: dict[str, Any]) -> bool:
        if isinstance(path, int):
            return path in self._handles
        return options.get("dir_fd") in self._handles or str(path).startswith(self._root)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *arguments: Any, **options: Any) -> Any:
            is_ours = self._is_ours(path, options)
            if is_ours and name != "close":  # the failure of a close changes nothing here
                self._tick(name)
            result = call(path, *arguments, **options)
            if name == "open" and is_ours:
                self._handles.add(result)
            elif name == "close":
                self._handles.discard(path)
            return result

        return counted

    def _flush(self, handle: int) -> None:
        if handle in self._handles:
            self._tick("fsync")

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not self._is_ours(file, {}):
                return call(file, mode, *arguments, **options)
            self._tick("open")
            stream = call(file, mode, *arguments, **options)
            return _HalfWritten(stream, self._tick) if set(mode) & set("xwa") else stream

        return counted


class _HalfWritten:
    """File whose writes can fail after half of their bytes."""

    def __init__(self, stream: Any, tick: Callable[[str], None]) -> None:
        self._stream, self._tick = stream, tick

    def __enter__(self) -> _HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._stream.write(data[:half])
        self._stream.flush()
        self._tick("write")
        self._stream.write(data[half:])
        return len(data)


def each_fault(root: Path, codes: list[int] | None = None) -> Iterator[Faults]:
    """Yield faults at the first call, at the second, and so on, until no call is hit.

    The caller runs its command under each of them.
    """
    for code in [KILL, *CODES] if codes is None else codes:
        for at in itertools.count(1):
            faults = Faults(root, at, code)
            yield faults
            if faults.hit is None:
                assert at > 2, "no call was counted"
                break


def temporaries(root: Path) -> list[str]:
    """Return the hidden files and folders below a folder, which are temporary ones."""
    return sorted(str(path.relative_to(root)) for path in root.rglob(".*"))
