"""The pool's single promises; tests/simulation drives it through whole nights."""

from __future__ import annotations

import pytest

from plad_dist.errors import RunFailed
from plad_dist.fleet.pool import BlockPool, Lease, Limits


def pool_of(blocks: int, actors: str = "ab", **limits: float) -> BlockPool:
    pool = BlockPool(range(blocks), Limits(**{"window": 2} | limits))  # type: ignore[arg-type]
    for actor in actors:
        pool.join(actor, 0.0)
    return pool


def take(pool: BlockPool, actor: str, now: float = 0.0) -> Lease:
    lease = pool.take(actor, now)
    assert lease is not None
    return lease


def test_an_actor_gets_no_more_than_its_window_and_is_refilled_across_blocks() -> None:
    pool = pool_of(10, window=3)
    assert [take(pool, "a").block for _ in range(3)] == [0, 1, 2]
    assert pool.take("a", 0.0) is None
    pool.committed(1)
    assert take(pool, "a").block == 3


def test_leases_of_a_lost_actor_go_to_another_first() -> None:
    pool = pool_of(4)
    assert [take(pool, "a").block, take(pool, "a").block] == [0, 1]
    pool.leave("a")
    assert [take(pool, "b").block, take(pool, "b").block] == [0, 1]


def test_an_idle_actor_takes_over_the_oldest_lease_at_the_tail() -> None:
    pool = pool_of(2, actors="abc")
    take(pool, "a"), take(pool, "a")
    stolen = take(pool, "b")
    assert stolen.block == 0
    assert pool.take("b", 0.0) is None, "one stolen lease at a time"
    assert take(pool, "c").block == 1
    assert [lease.actor for lease in pool.committed(0)] == ["a", "b"], "one of the attempts is futile now"
    pool.committed(1)
    assert pool.finished


def test_a_silent_actor_is_given_up_and_one_that_is_heard_is_not() -> None:
    pool = pool_of(2, heartbeat_timeout_s=10, stall_timeout_s=100)
    take(pool, "a")
    pool.heartbeat("b", False, 8.0)
    assert [name for name, _ in pool.silent(11.0)] == ["a"]


def test_an_actor_that_is_heard_but_finishes_nothing_is_given_up() -> None:
    pool = pool_of(2, actors="a", heartbeat_timeout_s=10, stall_timeout_s=50)
    take(pool, "a")
    pool.heartbeat("a", True, 20.0)
    pool.heartbeat("a", False, 69.0)
    assert pool.stalled(69.0) == []
    pool.heartbeat("a", False, 71.0)
    assert pool.stalled(71.0) == [("a", "alive, but nothing done for 51 s")]


def test_a_lease_that_ran_out_is_given_anew() -> None:
    pool = pool_of(1, actors="ab", lease_timeout_s=10)
    lease = take(pool, "a")
    assert pool.overdue(9.0) == []
    assert pool.overdue(11.0) == [lease]
    assert take(pool, "b", 11.0).block == 0


def test_a_commit_in_time_after_all_is_accepted() -> None:
    pool = pool_of(1, actors="a", lease_timeout_s=10)
    take(pool, "a")
    pool.overdue(11.0)
    pool.committed(0)
    assert pool.finished
    assert pool.take("a", 12.0) is None


def test_a_block_that_keeps_failing_fails_the_run_with_its_reason() -> None:
    pool = pool_of(1, actors="a", max_attempts=2)
    pool.fail(take(pool, "a"), "first")
    with pytest.raises(RunFailed, match=r"block 0 failed 2 times, at last with: second"):
        pool.fail(take(pool, "a"), "second")


def test_a_lost_node_does_not_count_against_its_blocks() -> None:
    pool = pool_of(1, actors="", max_attempts=2)
    for number in range(4):
        pool.join(str(number), 0.0)
        take(pool, str(number))
        pool.leave(str(number))
    assert pool.unfinished == 1


def test_a_block_whose_actors_vanish_again_and_again_is_blamed_in_the_end() -> None:
    pool = pool_of(1, actors="", max_attempts=2)

    def lose() -> None:
        pool.join("a", 0.0)
        take(pool, "a")
        pool.leave("a")

    for _ in range(9):
        lose()
    with pytest.raises(RunFailed, match="5 actors that held it were lost"):
        lose()


def test_a_poison_row_is_found_by_halving_and_is_not_tried_again() -> None:
    """Row 300 of 512 kills every engine that meets it."""
    pool, deaths = pool_of(2, actors="", max_attempts=3), 0
    while not pool.finished:
        name = f"actor-{deaths}"
        pool.join(name, 0.0)
        leases = [lease for lease in (pool.take(name, 0.0), pool.take(name, 0.0)) if lease is not None]
        for lease in leases:
            suspects = {row for piece in lease.hints.pieces for row in piece}
            others = tuple(row for row in range(512) if row not in suspects and row not in lease.hints.poison)
            deadly = next((piece for piece in (others, *lease.hints.pieces) if 300 in piece), None)
            if lease.block == 1 and deadly is not None:
                deaths += 1
                pool.died(name, "boom", {lease.block: deadly})
                break
            if lease.block == 1:
                assert list(lease.hints.poison) == [300]
                assert "boom" in lease.hints.poison[300]
            pool.committed(lease.block)
    assert deaths <= 6


def test_what_hangs_whatever_it_is_given_ends_the_run_after_a_dozen_hangs() -> None:
    """Each costs the stall timeout, so that fewer are tried than deaths."""
    pool, hangs = pool_of(1, actors="", max_attempts=3), 0

    def night() -> None:
        nonlocal hangs
        while hangs < 100:
            name = f"actor-{hangs}"
            pool.join(name, 0.0)
            lease = take(pool, name)
            suspects = {row for piece in lease.hints.pieces for row in piece}
            others = tuple(row for row in range(512) if row not in suspects and row not in lease.hints.poison)
            hangs += 1
            pool.died(name, "hangs", {lease.block: next(filter(None, (others, *lease.hints.pieces)))}, hung=True)

    with pytest.raises(RunFailed, match="failed 3 times, at last with: hangs"):
        night()
    assert hangs <= 16
