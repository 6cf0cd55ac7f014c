"""The pool's promises: every block done once, none lost, bounded retries, the tail stolen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.errors import RunFailed
from plad_dist.sampling.pool import BlockPool


def test_an_actor_gets_no_more_than_its_window() -> None:
    pool = BlockPool(list(range(10)), window=3, max_attempts=2)
    assert [pool.take("a") for _ in range(4)] == [0, 1, 2, None]
    assert pool.done(1)
    assert pool.take("a") == 3


def test_leases_of_a_dead_actor_go_to_another() -> None:
    pool = BlockPool([0, 1], window=2, max_attempts=2)
    assert [pool.take("a"), pool.take("a")] == [0, 1]
    pool.remove("a", None)
    assert {pool.take("b"), pool.take("b")} == {0, 1}


def test_a_lost_node_does_not_count_against_its_blocks() -> None:
    pool = BlockPool([0], window=1, max_attempts=2)
    for _ in range(10):
        assert pool.take("a") == 0
        pool.remove("a", None)
    pool.take("a")
    pool.remove("a", "engine died")
    pool.take("a")
    with pytest.raises(RunFailed, match="engine died"):
        pool.remove("a", "engine died")


def test_an_idle_actor_takes_over_the_oldest_lease_at_the_tail() -> None:
    pool = BlockPool([0, 1], window=2, max_attempts=2)
    assert [pool.take("a"), pool.take("a")] == [0, 1]
    assert pool.take("b") == 0
    assert pool.take("b") is None, "one stolen lease at a time"
    assert pool.done(0)
    assert not pool.done(0), "the other attempt is late"
    pool.done(1)
    assert pool.finished


def test_a_block_that_keeps_failing_fails_the_run_with_its_reason() -> None:
    pool = BlockPool(["x"], window=1, max_attempts=2)
    pool.take("a")
    pool.fail("a", "x", "first")
    pool.take("a")
    with pytest.raises(RunFailed, match=r"block x failed 2 times, at last with: second"):
        pool.fail("a", "x", "second")


@given(st.integers(1, 30), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=300))
def test_every_block_is_done_once_whatever_happens(blocks: int, window: int, events: list[tuple[int, int]]) -> None:
    pool = BlockPool(list(range(blocks)), window=window, max_attempts=1000)
    held: dict[str, list[int]] = {str(actor): [] for actor in range(4)}
    done: list[int] = []

    def settle(actor: str) -> None:
        if held[actor]:
            block = held[actor].pop(0)
            done.extend([block] if pool.done(block) else [])

    for number, action in events:
        actor = str(number)
        if action == 0:
            pool.remove(actor, "died" if len(done) % 2 else None)
            held[actor] = []
        elif action < 5:
            settle(actor)
        elif (block := pool.take(actor)) is not None:
            held[actor].append(block)  # type: ignore[arg-type]
    while not pool.finished:
        for actor in held:
            while (block := pool.take(actor)) is not None:
                held[actor].append(block)  # type: ignore[arg-type]
            settle(actor)
    assert sorted(done) == list(range(blocks))
