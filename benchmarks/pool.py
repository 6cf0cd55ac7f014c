"""Leases per second of the sampling pool, and its share of a core at the size of a large cluster.

The pool runs alone, without Ray. 1,000 simulated actors process 1,000,000 blocks, with four blocks
in flight each. Actors send a heartbeat every five simulated seconds, and one actor in a hundred is
lost during the run. The pool checks the deadlines of all leases every simulated second. A block
takes 20 to 100 simulated seconds, like 512 prompts of a 7B model on one GPU.

`leases_per_s_1000_actors` is the number of leases over the CPU seconds of all decisions.
`driver_cpu_share` is the CPU seconds of all decisions over the simulated duration: the share of one
core that the decisions take in a working driver. There is no peer to compare with. The lease rate
is an upper bound for the driver, far above the rate of Ray's own calls.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time

from plad_dist.fleet.pool import BlockPool, Limits

ACTORS, BLOCKS, WINDOW = 1_000, 1_000_000, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--actors", type=int, default=ACTORS)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.actors, arguments.blocks)))


def measure(actors: int, blocks: int) -> dict[str, float]:
    """Drive the pool through all blocks and return the cost of its decisions."""
    rng = random.Random(0)
    decided = 0.0  # CPU seconds inside the pool

    def timed(decision, *arguments):  # type: ignore[no-untyped-def]
        nonlocal decided
        started = time.process_time_ns()
        result = decision(*arguments)
        decided += (time.process_time_ns() - started) * 1e-9
        return result

    started = time.process_time()
    pool = BlockPool(range(blocks), Limits(window=WINDOW, stall_timeout_s=1e6))
    decided += time.process_time() - started
    names = [f"actor-{number}" for number in range(actors)]
    progressed: set[str] = set()  # actors that finished a block since their latest heartbeat
    events: list[tuple[float, int, str, object]] = []
    order = leases = 0

    def lease_all(actor: str, now: float) -> None:
        nonlocal order, leases
        while (lease := timed(pool.take, actor, now)) is not None:
            leases += 1
            order += 1
            heapq.heappush(events, (now + rng.uniform(20, 100), order, actor, lease.block))

    for actor in names:
        timed(pool.join, actor, 0.0)
        lease_all(actor, 0.0)
    now = next_tick = next_heartbeat = 0.0
    while not pool.finished:
        now, _, actor, block = heapq.heappop(events)
        if now >= next_tick:
            next_tick = now + 1
            if now >= next_heartbeat:
                next_heartbeat = now + 5
                for name in names:
                    timed(pool.heartbeat, name, name in progressed, now)
                progressed.clear()
            timed(pool.silent, now)
            timed(pool.expire, now)
        if rng.random() < actors / blocks / 100:
            timed(pool.leave, actor)
            timed(pool.join, actor, now)
        progressed.add(actor)
        timed(pool.committed, block)
        lease_all(actor, now)
    return {
        "actors": actors,
        "blocks": blocks,
        "leases": leases,
        "leases_per_s_1000_actors": round(leases / decided),
        "driver_cpu_share": round(decided / now, 4),
        "cpu_seconds": round(decided, 2),
        "simulated_seconds": round(now),
    }


if __name__ == "__main__":
    main()
