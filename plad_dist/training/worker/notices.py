"""What a worker group is told while it trains: nodes that are about to leave, or that it will be started anew at another size."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from plad_dist.errors import RunFailed
from plad_dist.training.worker.metrics import MetricsLog

_LOOK_EVERY_S = 1.0
_MARGIN_S = 15.0  # before a node leaves, beside what a checkpoint takes
_GRACE_S = 180.0  # that Ray Train waits for nodes which do not say when they leave, and some more


class PreemptionNotices:
    """Heeded on every rank; the first one's clock says when to look.

    Args:
        mailbox: of the driver, None where nothing is to be heeded.
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._looked = time.monotonic()
        self._asked: Any = None
        self._leaving: set[str] = set()  # nodes
        self._leaves_at: float | None = None  # seconds since the epoch; None while nobody leaves, or at once
        self._group = 0  # of workers that the controller asks to yield

    def wishes(self, commit_seconds: float, step_seconds: float) -> dict[str, bool]:
        """What the first rank wants of all ranks after the step that it is in, given how long such things take."""
        if self._mailbox is None:
            return {}
        look = time.monotonic() - self._looked >= _LOOK_EVERY_S
        if look:
            self._looked = time.monotonic()
            self._ask_whether_to_yield()
        margin = _MARGIN_S + 3 * commit_seconds + 2 * step_seconds
        soon = bool(self._leaving) and (self._leaves_at is None or time.time() >= self._leaves_at - margin)
        return {"look": look, "leave": soon or bool(self._group)}

    def look(self, log: MetricsLog | None) -> bool:
        """Ask Ray whether nodes of this group are about to leave; true when it are others than before. All ranks call it alike."""
        from ray.train import get_preemption_info

        return self.heed(get_preemption_info(), log)

    def heed(self, info: Any, log: MetricsLog | None) -> bool:
        """Take note of what Ray says. True where more nodes are about to leave than were."""
        nodes = set() if info is None else set(info.preempted_node_to_ranks)
        if info is None or not nodes:
            return False
        at = None if info.deadline_ms is None else info.deadline_ms / 1000
        self._leaves_at = min(at, self._leaves_at) if self._leaving and at and self._leaves_at else at
        if nodes <= self._leaving:  # it may be sooner than it was said first
            return False
        self._leaving |= nodes
        if log is not None:
            when = "soon" if self._leaves_at is None else f"in {self._leaves_at - time.time():.0f} s"
            log.say(
                f"a node is about to leave {when} ({', '.join(sorted(nodes))}): a checkpoint is written now, and again before it "
                "leaves"
            )
        return True

    def wait(self, log: MetricsLog | None, step: int) -> None:
        """Stand still until Ray ends this group."""
        why = "a node is about to leave" if self._leaving else "the number of workers changes"
        if log is not None:
            log.say(f"{why}: the checkpoint of step {step} is committed; the workers wait to be started anew")
            self._mailbox.yielded.remote(self._group)
        until = (self._leaves_at or time.time()) + _GRACE_S
        while time.time() < until:
            time.sleep(0.5)
        raise RunFailed(f"{why}, but the workers were not started anew")

    def _ask_whether_to_yield(self) -> None:
        """Read the answer of the last time and ask again; training does not wait for it, nor depend on it."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
                asked, self._asked = self._asked, None
                self._group = int(ray.get(asked))
            if self._asked is None:
                self._asked = self._mailbox.wants_yield.remote()
