"""Mailbox between the workers, the controller and the driver."""

from __future__ import annotations

import math

from plad_dist.training.driver.mailbox import ProgressMailbox
from plad_dist.training.messages import Began, Said, StepDone


def test_a_late_reply_of_an_earlier_group_is_ignored() -> None:
    mailbox = ProgressMailbox("round-0", 100)
    mailbox.new_group(2)
    mailbox.ask_to_yield()
    earlier_group = mailbox.wants_yield()
    mailbox.new_group(2)
    assert mailbox.wants_yield() == 0
    mailbox.yielded(earlier_group)
    mailbox.ask_to_yield()
    assert not mailbox.has_yielded()
    mailbox.yielded(mailbox.wants_yield())
    assert mailbox.has_yielded()


def test_a_group_takes_steps_from_its_first_step_until_the_next_group_starts() -> None:
    mailbox = ProgressMailbox("round-0", 100)
    mailbox.new_group(2)
    mailbox.post(Began("round-0", 10, "starts"))
    mailbox.post(Said("round-0", "a line"))
    assert not mailbox.takes_steps()
    mailbox.post(StepDone("round-0", 1, 8, 100, 2, {"loss": 1.0, "seconds": 1.0}))
    assert mailbox.takes_steps()
    mailbox.new_group(2)
    assert not mailbox.takes_steps()


def test_messages_are_drained_once_and_in_order() -> None:
    mailbox = ProgressMailbox("round-0", 100)
    messages = [Said("round-0", "first"), Said("round-0", "second")]
    for message in messages:
        mailbox.post(message)
    assert mailbox.drain() == messages
    assert mailbox.drain() == []


def test_the_time_left_is_known_only_in_the_last_phase() -> None:
    mailbox = ProgressMailbox("seqkd", 100)
    mailbox.new_group(2)
    for phase in ("round-0", "seqkd"):
        mailbox.post(Began(phase, 10, "starts"))
    mailbox.post(StepDone("round-0", 4, 8, 100, 2, {"loss": 1.0, "seconds": 3.0}))
    assert mailbox.outlook().left_s == math.inf
    mailbox.post(StepDone("seqkd", 4, 8, 100, 2, {"loss": 1.0, "seconds": 3.0}))
    assert mailbox.outlook().left_s == 6 * 3.0
