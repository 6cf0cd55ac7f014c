"""A command that trains ends when another command takes over its run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plad_dist.data import claims
from plad_dist.data.claims import SupersededError, claim_run
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.training import agreement
from plad_dist.training.agreement import StoppedError
from plad_dist.training.checkpoints.attempts import claim
from plad_dist.training.driver import owner_watch
from plad_dist.training.driver.owner_watch import stopped_if_superseded
from plad_dist.training.worker import attempt_guard
from plad_dist.training.worker.attempt_guard import stop_if_superseded


@pytest.fixture
def owned(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path))
    return replace(storage, claim=claim_run(storage, "plad run"))


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Workers of pytest-xdist ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_driver_that_waits_for_its_workers_is_interrupted(owned: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_watch.OwnerWatch.__init__, "__defaults__", (0.05,))
    started = time.monotonic()

    def train() -> None:
        with stopped_if_superseded(owned):
            claim_run(owned, "plad train")
            time.sleep(30)

    with pytest.raises(SupersededError, match=r"`plad train` on .* has taken over the run"):
        train()
    assert time.monotonic() - started < 20


def test_ctrl_c_stays_ctrl_c(owned: Storage) -> None:
    with pytest.raises(KeyboardInterrupt), stopped_if_superseded(owned):
        raise KeyboardInterrupt


def test_nothing_interrupts_a_driver_that_owns_its_run(owned: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_watch.OwnerWatch.__init__, "__defaults__", (0.01,))
    with stopped_if_superseded(owned):
        time.sleep(0.2)


def test_a_storage_that_fails_for_long_does_not_interrupt_the_training(
    owned: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it end the watch, which sees a later claim when the storage is back."""
    monkeypatch.setattr(owner_watch.OwnerWatch.__init__, "__defaults__", (0.01,))
    monkeypatch.setattr(claims, "_LONGEST_FAILURE_S", 0.0)

    def fails(self: Storage, key: str) -> None:
        raise RunFailed("Stale file handle")

    def train() -> None:
        with stopped_if_superseded(owned):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Storage, "read", fails)
                time.sleep(0.2)
            claim_run(owned, "plad train")
            time.sleep(30)

    with pytest.raises(SupersededError, match="has taken over the run"):
        train()


def test_a_worker_group_ends_when_a_later_command_has_claimed_the_run(
    owned: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (agreement, attempt_guard):
        monkeypatch.setattr(module, "from_rank_zero", lambda compute: compute())
    attempt = claim(owned, "events/round-0/attempts", "ours")
    assert attempt.superseded() is None
    claim_run(owned, "plad train")
    launch = attempt.superseded()
    assert launch not in (None, "ours")
    job: Any = SimpleNamespace(name="round-0", launch="ours", storage=owned)
    with pytest.raises(StoppedError, match=r"phase round-0: .*`plad train` on .* has taken over the run"):
        stop_if_superseded(job, attempt, SimpleNamespace(superseded=launch))  # type: ignore[arg-type]
