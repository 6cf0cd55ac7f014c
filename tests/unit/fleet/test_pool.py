"""Single promises of the block pool; tests/simulation drives it through whole schedules."""

from __future__ import annotations

import pytest

from plad_dist.errors import RunFailed
from plad_dist.fleet.pool import BlockPool, Lease, Limits

ROWS = 512


def pool_of(blocks: int, actors: str = "ab", **limits: float) -> BlockPool[int]:
    """Return a pool that actors named by single letters have joined at time 0."""
    pool = BlockPool(range(blocks), Limits(**{"window": 2} | limits))  # type: ignore[arg-type]
    for actor in actors:
        pool.join(actor, 0.0)
    return pool


def take(pool: BlockPool[int], actor: str, now: float = 0.0) -> Lease[int]:
    lease = pool.take(actor, now)
    assert lease is not None
    return lease


def pieces_in_order(lease: Lease[int]) -> list[tuple[int, ...]]:
    """Return the rows of a block in the groups that an actor processes one after the other."""
    suspects = {row for piece in lease.hints.pieces for row in piece}
    unsuspected = tuple(row for row in range(ROWS) if row not in suspects and row not in lease.hints.poison)
    return [unsuspected, *lease.hints.pieces]


def test_an_actor_gets_no_more_than_its_window_and_is_refilled_across_blocks() -> None:
    pool = pool_of(10, window=3)
    assert [take(pool, "a").block for _ in range(3)] == [0, 1, 2]
    assert pool.take("a", 0.0) is None
    pool.committed(1)
    assert take(pool, "a").block == 3


def test_leases_of_a_lost_actor_go_to_another_actor_first() -> None:
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


def test_a_silent_actor_is_given_up_and_one_with_heartbeats_is_not() -> None:
    pool = pool_of(2, heartbeat_timeout_s=10, stall_timeout_s=100)
    take(pool, "a")
    pool.heartbeat("b", False, 8.0)
    assert pool.silent(11.0) == [("a", "no heartbeat for 11 s")]


def test_an_actor_with_heartbeats_but_without_progress_is_given_up() -> None:
    pool = pool_of(2, actors="a", heartbeat_timeout_s=10, stall_timeout_s=50)
    take(pool, "a")
    pool.heartbeat("a", True, 20.0)
    pool.heartbeat("a", False, 69.0)
    assert pool.stalled(69.0) == []
    pool.heartbeat("a", False, 71.0)
    assert pool.stalled(71.0) == [("a", "alive, but without progress for 51 s")]


def test_a_block_whose_lease_expired_is_leased_again() -> None:
    pool = pool_of(1, actors="ab", lease_timeout_s=10)
    lease = take(pool, "a")
    assert pool.expire(9.0) == []
    assert pool.expire(11.0) == [lease]
    assert take(pool, "b", 11.0).block == 0


def test_an_actor_whose_leases_expire_without_progress_is_given_up() -> None:
    pool = pool_of(2, actors="a", heartbeat_timeout_s=100, lease_timeout_s=10)
    take(pool, "a"), take(pool, "a")
    pool.expire(11.0)
    assert pool.silent(11.0) == [("a", "alive, but 2 leases expired without progress")]
    pool.heartbeat("a", True, 12.0)
    assert pool.silent(12.0) == []


def test_time_for_which_the_driver_was_delayed_does_not_count() -> None:
    pool = pool_of(1, actors="a", heartbeat_timeout_s=10, stall_timeout_s=20, lease_timeout_s=30)
    take(pool, "a")
    pool.excuse(100.0)
    assert (pool.silent(105.0), pool.stalled(115.0), pool.expire(125.0)) == ([], [], [])


def test_a_commit_after_the_lease_expired_is_accepted() -> None:
    pool = pool_of(1, actors="a", lease_timeout_s=10)
    take(pool, "a")
    pool.expire(11.0)
    pool.committed(0)
    assert pool.finished
    assert pool.take("a", 12.0) is None


def test_a_block_that_keeps_failing_fails_the_run_with_its_reason() -> None:
    pool = pool_of(1, actors="a", max_attempts=2)
    pool.failed(take(pool, "a"), "first")
    with pytest.raises(RunFailed, match=r"block 0 failed 2 times, at last with: second"):
        pool.failed(take(pool, "a"), "second")


def test_a_lost_node_does_not_count_against_its_blocks() -> None:
    pool = pool_of(1, actors="", max_attempts=2)
    for number in range(4):
        pool.join(str(number), 0.0)
        take(pool, str(number))
        pool.leave(str(number))
    assert pool.unfinished == 1


def test_a_block_that_loses_actor_after_actor_fails_the_run_in_the_end() -> None:
    pool = pool_of(1, actors="", max_attempts=2)

    def lose_an_actor() -> None:
        pool.join("a", 0.0)
        take(pool, "a")
        pool.leave("a")

    for _ in range(9):
        lose_an_actor()
    with pytest.raises(RunFailed, match="5 actors that held it were lost"):
        lose_an_actor()


def test_a_suspect_block_is_leased_to_an_actor_that_holds_nothing_else() -> None:
    pool = pool_of(3, actors="abc")
    take(pool, "a")
    pool.engine_died("a", "boom", {0: (1, 2)})
    assert [take(pool, "b").block, take(pool, "b").block] == [1, 2], "pending blocks come first"
    lease = take(pool, "c")
    assert (lease.block, lease.is_exclusive, lease.hints.pieces) == (0, True, ((1,), (2,)))
    pool.committed(1), pool.committed(2)
    assert pool.take("c", 0.0) is None, "nothing beside an exclusive lease"


def test_a_poison_row_is_found_by_splitting_and_is_not_tried_again() -> None:
    """Row 300 of 512 kills every engine that meets it."""
    pool, deaths = pool_of(2, actors="", max_attempts=3), 0
    while not pool.finished:
        name = f"actor-{deaths}"
        pool.join(name, 0.0)
        leases = [lease for lease in (pool.take(name, 0.0), pool.take(name, 0.0)) if lease is not None]
        for lease in leases:
            deadly = next((piece for piece in pieces_in_order(lease) if 300 in piece), None)
            if lease.block == 1 and deadly is not None:
                deaths += 1
                pool.engine_died(name, "boom", {lease.block: deadly})
                break
            if lease.block == 1:
                assert list(lease.hints.poison) == [300]
                assert "boom" in lease.hints.poison[300]
            pool.committed(lease.block)
    assert deaths <= 6


def test_a_block_that_hangs_on_all_its_rows_ends_the_run_after_a_dozen_hangs() -> None:
    """Each hang costs the stall timeout, so fewer hangs than deaths are tried."""
    pool, hangs = pool_of(1, actors="", max_attempts=3), 0

    def hang_until_the_run_ends() -> None:
        nonlocal hangs
        while hangs < 100:
            name = f"actor-{hangs}"
            pool.join(name, 0.0)
            lease = take(pool, name)
            hangs += 1
            rows = next(filter(None, pieces_in_order(lease)))
            pool.engine_died(name, "hangs", {lease.block: rows}, is_hang=True)

    with pytest.raises(RunFailed, match="failed 3 times, at last with: hangs"):
        hang_until_the_run_ends()
    assert hangs <= 16
