"""The journal of an incomplete dataset: its committed parts as the manifest will list them.

The journal is a folder of small pages beside the parts. It lets a writer resume after a hundred
thousand parts by reading a few pages and no part. It only saves work: a part that it lacks is read,
so a damaged page is harmless.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from plad_dist.data.parts import Part
from plad_dist.data.sealed import sealed_json, unsealed_json
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed

logger = logging.getLogger("plad")

JOURNAL = "journal"
_READ_THREADS = 16
_PAGE_PARTS, _PAGE_SECONDS = 2048, 30.0


class Journal:
    """Writer of a dataset's journal.

    Each writer of a dataset creates its own journal. If its last pages are lost, only their parts
    have to be read.
    """

    def __init__(self, storage: Storage, folder: str, fingerprint: str) -> None:
        self._storage, self._folder, self._fingerprint = storage, folder, fingerprint
        # Pages sort by time: the latest entry of a part is the valid one.
        self._prefix = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._unwritten: list[Part] = []
        self._pages, self._last_flush = 0, time.monotonic()

    def add(self, part: Part) -> None:
        """Record a committed part, and write a page if one is due."""
        self._unwritten.append(part)
        if len(self._unwritten) >= _PAGE_PARTS or time.monotonic() - self._last_flush >= _PAGE_SECONDS:
            self.try_flush()

    def try_flush(self) -> None:
        """Write the unwritten parts, and log a failure instead of raising it.

        No committed part depends on the journal, so a failure does not stop the stage.
        """
        try:
            self.flush()
        except RunFailed as error:
            logger.warning("the journal cannot be written now and will be retried: %s", error)
            self._last_flush = time.monotonic()

    def flush(self) -> None:
        """Write the unwritten parts.

        Raises:
            RunFailed: the page cannot be written. Its parts are kept for the next flush.
        """
        if self._unwritten:
            rows = [[part.name, part.rows, part.bytes, part.xxh3_128, part.counts] for part in self._unwritten]
            key = f"{self._folder}/{self._prefix}-{self._pages:06d}.json"
            page = {"fingerprint": self._fingerprint, "parts": rows}
            self._pages += 1
            self._storage.replace(key, sealed_json(json.dumps(page)))
            self._unwritten = []
        self._last_flush = time.monotonic()


def read_journal(storage: Storage, folder: str, fingerprint: str | None) -> Iterator[Part]:
    """Yield the journaled parts, the latest entry of a part last. Skip damaged pages.

    Args:
        fingerprint: skip pages of other fingerprints; None reads all pages.
    """
    for name, data in _pages(storage, folder):
        try:
            page_fingerprint, parts = _parse_page(data)
        except (ValueError, LookupError, TypeError) as error:
            logger.warning("%s/%s/%s: ignored, its parts are read instead: %s", storage.url, folder, name, error)
            continue
        if fingerprint in (None, page_fingerprint):
            yield from parts


def damaged_pages(storage: Storage, folder: str) -> Iterator[tuple[str, str]]:
    """Yield name and problem of every damaged page."""
    for name, data in _pages(storage, folder):
        try:
            _parse_page(data)
        except (ValueError, LookupError, TypeError) as error:
            yield name, str(error)


def _pages(storage: Storage, folder: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every page, sorted by time."""
    names = sorted(name for name in storage.sizes(folder) if name.endswith(".json"))
    with ThreadPoolExecutor(_READ_THREADS) as threads:
        for name, data in zip(names, threads.map(lambda name: storage.read(f"{folder}/{name}"), names), strict=True):
            if data is not None:  # deleted meanwhile
                yield name, data


def _parse_page(data: bytes) -> tuple[str, list[Part]]:
    """Return fingerprint and parts of a page."""
    page = unsealed_json(data)
    return str(page["fingerprint"]), [Part(*row) for row in page["parts"]]


def rewrite_journal(storage: Storage, folder: str, fingerprint: str, parts: Iterable[Part]) -> None:
    """Replace the whole journal by the given parts.

    The new pages are written before the old ones are deleted.
    """
    old_pages = storage.sizes(folder)
    journal = Journal(storage, folder, fingerprint)
    for part in parts:
        journal.add(part)
    journal.flush()
    for name in old_pages:
        storage.delete(f"{folder}/{name}")


def delete_journal(storage: Storage, folder: str) -> None:
    """Delete all pages."""
    for name in storage.sizes(folder):
        storage.delete(f"{folder}/{name}")
