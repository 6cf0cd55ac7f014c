"""Count of the bytes that a process reads from files, in whatever way."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

_INTERVAL_S = 0.005


class BytesRead:
    """Bytes that this process reads during a context.

    The kernel counts what system calls read (`rchar` of `/proc/self/io`), whether or not the bytes
    were in memory already. It does not count what is read through a memory map. So a thread looks
    for maps of the files in a folder again and again, and adds the most bytes that each had in
    memory (`Rss` of `/proc/self/smaps`).

    Attributes:
        by_calls, by_maps: the two counts, after the context.
    """

    def __init__(self, folder: Path) -> None:
        self._map = re.compile(rf"^([0-9a-f]+-[0-9a-f]+) .* ({re.escape(str(folder))}/.*)\n(?:.*\n)*?Rss: +(\d+)", re.M)
        self._ended, self._watch = threading.Event(), threading.Thread(target=self._watch_maps)
        self._resident: dict[tuple[str, str], int] = {}
        self._read_by_watch = 0
        self.by_calls, self.by_maps = 0, 0

    def __enter__(self) -> BytesRead:
        self._watch.start()
        self._before = _bytes_by_calls()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        self._watch.join()
        self.by_calls = _bytes_by_calls() - self._before - self._read_by_watch
        self.by_maps = sum(self._resident.values())

    def _watch_maps(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            text = Path("/proc/self/smaps").read_text()
            self._read_by_watch += len(text)
            for place, file, kilobytes in self._map.findall(text):
                resident = int(kilobytes) << 10
                self._resident[place, file] = max(resident, self._resident.get((place, file), 0))


def _bytes_by_calls() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]
