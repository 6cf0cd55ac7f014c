"""Attempts that fail one after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from plad_dist.errors import RunFailed
from plad_dist.fleet import leases
from plad_dist.fleet.fleet import Task
from plad_dist.fleet.leases import LeaseManager
from plad_dist.fleet.pool import BlockPool, Lease, Limits

FULL = RunFailed("/run/part-00001.arrow: cannot be written: No space left on device. What is committed is kept")
BLOCKS = 1000


@pytest.mark.parametrize(("pause_s", "most"), [(20.0, 6), (0.1, 301)])
def test_a_full_disk_ends_a_stage_before_every_block_has_failed(
    monkeypatch: pytest.MonkeyPatch, pause_s: float, most: int
) -> None:
    """Neither a short outage nor a few failures end it."""
    now, failures = 0.0, 0
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now))
    pool = BlockPool([Task(0, block, "samples") for block in range(BLOCKS)], Limits(window=2, max_attempts=3))
    pool.join("a", 0.0)
    fleet: Any = SimpleNamespace(
        name="teacher",
        pool=pool,
        metrics=SimpleNamespace(block_retried=lambda: None, block_committed=lambda result: None),
        max_actors=1,
        failing_since=None,
    )
    outputs: Any = SimpleNamespace(add=lambda *_: 1, check_errors=lambda _: None, finish_complete=lambda: None)
    progress: Any = SimpleNamespace(advance=lambda *_, **__: None)
    result: Any = SimpleNamespace(part=SimpleNamespace(counts={}))
    manager = LeaseManager(SimpleNamespace(), outputs, progress)  # type: ignore[arg-type]

    def take() -> Lease[Task]:
        lease = pool.take("a", 0.0)
        assert lease is not None
        return lease

    def fail(times: int) -> None:
        nonlocal now, failures
        for _ in range(times):
            now, failures = now + pause_s, failures + 1
            manager.fail(fleet, take(), FULL)

    fail(5)
    manager.commit(fleet, take(), result)
    fail(5)
    manager.commit(fleet, take(), result)
    failures = 0
    with pytest.raises(RunFailed, match=r"teacher: \d+ attempts have failed .*No space left on device.*is kept"):
        fail(BLOCKS)
    assert failures == most
