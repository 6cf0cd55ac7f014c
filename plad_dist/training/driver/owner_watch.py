"""Watch of a run's claim while Ray Train trains: a superseded command stops its worker group."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from plad_dist.data.claims import CHECK_INTERVAL_S, SupersededError, check_owned
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed

logger = logging.getLogger("plad")


class OwnerWatch:
    """Watch of one command's claim.

    Ray Train blocks the driver until its workers end. When a later command has claimed the run, the
    watch interrupts the driver as Ctrl-C does, whereupon Ray Train stops the workers. A storage
    that fails for a while interrupts nothing. Whatever is committed is checked again.

    Attributes:
        problem: why the driver was interrupted; None if the watch has not interrupted it.
        ended: set to end the watch.
    """

    def __init__(self, storage: Storage, interval_s: float = CHECK_INTERVAL_S) -> None:
        self._storage, self._interval_s = storage, interval_s
        self.problem: SupersededError | None = None
        self.ended = threading.Event()

    def follow(self) -> None:
        """Look at the claim every few seconds until the watch is ended."""
        while not self.ended.wait(self._interval_s):
            try:
                check_owned(self._storage)
            except SupersededError as error:
                self.problem = error
                main = threading.main_thread().ident
                if not self.ended.is_set() and main is not None:
                    signal.pthread_kill(main, signal.SIGINT)
                return
            except RunFailed as error:
                logger.warning("cannot look at the claims now, training continues: %s", error)


@contextmanager
def stopped_if_superseded(storage: Storage) -> Iterator[None]:
    """End the block with :class:`~plad_dist.data.claims.SupersededError` if the run is taken over.

    The block must let a KeyboardInterrupt through.
    """
    watch = OwnerWatch(storage)
    thread = threading.Thread(target=watch.follow, daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            watch.ended.set()
            thread.join()
    except KeyboardInterrupt:
        if watch.problem is not None:
            raise watch.problem from None
        raise
