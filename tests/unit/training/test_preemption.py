"""Preemption notices: when nodes leave, and when the last checkpoint before that is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from plad_dist.training.worker import preemption
from plad_dist.training.worker.preemption import PreemptionNotices


class Clock:
    """Both clocks of a module, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now, sleep=lambda seconds: None)
        monkeypatch.setattr(preemption, "time", fake)


class QuietMailbox:
    """Mailbox of a driver that never asks the group to yield."""

    def wants_yield(self) -> int:
        return 0


@pytest.fixture
def notices_and_clock(monkeypatch: pytest.MonkeyPatch) -> tuple[PreemptionNotices, Clock]:
    clock = Clock(monkeypatch)
    return PreemptionNotices(QuietMailbox()), clock


def test_a_notice_asks_for_a_checkpoint_now_and_for_the_last_one_in_time(
    notices_and_clock: tuple[PreemptionNotices, Clock],
) -> None:
    """In time: two steps and three commits before the node leaves, and a margin."""
    notices, clock = notices_and_clock
    assert not notices.record([], None, None)
    assert notices.record(["a"], 1300.0, None)
    assert not notices.record(["a"], 1300.0, None), "it is the same notice"
    clock.now = 1300.0 - (15 + 3 * 5 + 2 * 40) - 1
    assert not notices.poll(5.0, 40.0).leave
    clock.now += 1
    assert notices.poll(5.0, 40.0).leave


def test_a_second_node_that_leaves_sooner_counts(notices_and_clock: tuple[PreemptionNotices, Clock]) -> None:
    notices, _ = notices_and_clock
    assert notices.record(["a"], 3000.0, None)
    assert not notices.poll(0.0, 0.0).leave
    assert notices.record(["b"], 1010.0, None)
    assert notices.poll(0.0, 0.0).leave


def test_a_deadline_that_moves_forward_counts(notices_and_clock: tuple[PreemptionNotices, Clock]) -> None:
    notices, _ = notices_and_clock
    assert notices.record(["a"], 3000.0, None)
    assert not notices.record(["a"], 1010.0, None), "no other node leaves"
    assert notices.poll(0.0, 0.0).leave


def test_a_node_without_a_deadline_is_taken_to_leave_at_once(
    notices_and_clock: tuple[PreemptionNotices, Clock],
) -> None:
    notices, _ = notices_and_clock
    assert notices.record(["a"], None, None)
    assert notices.poll(0.0, 0.0).leave


def test_notices_are_checked_once_a_second(notices_and_clock: tuple[PreemptionNotices, Clock]) -> None:
    notices, clock = notices_and_clock
    assert not notices.poll(0.0, 0.0).check_preemption
    clock.now += 1
    assert notices.poll(0.0, 0.0).check_preemption
    assert not notices.poll(0.0, 0.0).check_preemption
