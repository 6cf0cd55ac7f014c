"""A thousand seeded schedules of commands that pay: the cap holds, and nothing paid is forgotten.

Replay one with ``run_schedule(SEED)``.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from plad_dist.sampling.endpoint import account as accounts
from plad_dist.sampling.endpoint import backend as backends
from plad_dist.sampling.endpoint.account import Account
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.ledger import Ledger, Spending
from tests.simulation.money_world import (
    ANSWER,
    BLOCKS,
    LIMIT_S,
    PROMPTS_IN_BLOCK,
    Faults,
    Process,
    World,
    command,
    run_to_its_end,
    simulated,
    write_earlier_part,
    write_prompts,
)
from tests.simulation.stepping import VirtualLoop

SCHEDULES = 1000
_MUTANT_SCHEDULES = 150  # within which a mutation must be found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def run_schedule(seed: int, mutation: str = "") -> World:
    """Run two to four commands at random times, then one for which nothing goes wrong."""
    rng = random.Random(seed)
    loop = VirtualLoop()
    cap = rng.randint(4, 30) * ANSWER
    world = World(rng, Faults.draw(rng), cap, loop, mutation, rng.choice([0.05, 0.5]), rng.choice([0.3, 3.0, 20.0]))
    write_prompts(world)
    if rng.random() < 0.3:
        write_earlier_part(world)
    loop.now += 100.0  # what is that old is in every listing
    loop.set_exception_handler(lambda loop, context: None)  # of tasks that belong to killed commands
    try:
        with simulated(world):
            try:
                loop.run_until_complete(asyncio.wait_for(_run(world, rng), LIMIT_S))
            finally:
                loop.run_until_complete(_end_tasks(loop))
    finally:
        loop.close()
    return world


async def _end_tasks(loop: VirtualLoop) -> None:
    """End the tasks of killed commands."""
    while tasks := asyncio.all_tasks(loop) - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1.0)


async def _run(world: World, rng: random.Random) -> None:
    claims = rng.random() < 0.5

    async def start(number: int) -> None:
        process = world.processes[f"command-{number}"] = Process(f"command-{number}")
        await asyncio.sleep(rng.choice([0.0, 0.0, rng.random() * 10, rng.random() * 60]))
        await run_to_its_end(world, process, command(world, process, world.cap, claims=claims))

    await asyncio.gather(*(start(number) for number in range(rng.randint(2, 4))))
    world.is_calm = True
    world.cap = float("inf")
    last = world.processes["last"] = Process("last")
    await run_to_its_end(world, last, command(world, last, None, claims=True))
    parts = [key for key in world.objects if key.startswith("samples/part-")]
    if len(parts) != BLOCKS:
        world.violations.append(f"{len(parts)} of {BLOCKS} blocks are committed by a command that nothing disturbs")
    if world.remembered() < world.billed - world.bound:
        world.violations.append(f"{world.billed} billed, {world.remembered()} remembered in the end")


@pytest.mark.parametrize("tenth", range(10))
def test_the_cap_holds_and_nothing_paid_is_forgotten_in_any_schedule(tenth: int) -> None:
    kills = billed = 0.0
    seeds = range(tenth, SCHEDULES, 10)
    for seed in seeds:
        world = run_schedule(seed)
        assert not world.violations, f"seed {seed}"
        kills += world.kills
        billed += world.billed
    assert kills > len(seeds) / 2
    assert billed > len(seeds) * BLOCKS * PROMPTS_IN_BLOCK * ANSWER / 2


def _reserve_later(patch: pytest.MonkeyPatch) -> None:
    """Let requests be sent before the ledger has their amount."""
    real = Account.hold

    async def hold(self: Account, worst_cost: float) -> bool:
        self._budget.granted += round(worst_cost * 1e6) + 1

        async def later() -> None:
            await asyncio.sleep(1.0)
            await real(self, worst_cost)

        self._later = asyncio.create_task(later())  # type: ignore[attr-defined]
        return True

    patch.setattr(Account, "hold", hold)


def _forget_killed_commands(patch: pytest.MonkeyPatch) -> None:
    """Let each command drop the amounts of all others when it starts."""
    real = Ledger.start

    def start(self: Ledger, spent: Callable[[], Spending]) -> None:
        real(self, spent)
        self.change(lambda state: replace(state, open={}))

    patch.setattr(Ledger, "start", start)


def _forget_lost_answers(patch: pytest.MonkeyPatch) -> None:
    """Let an answer whose cost is unknown cost nothing."""
    real = Budget.settle
    patch.setattr(Budget, "settle", lambda self, worst_cost, cost: real(self, worst_cost, cost or 0.0))


def _forget_earlier_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backends, "spent_before", lambda outputs: Spending())


def _ignore_claims(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accounts.OwnerCheck, "__call__", lambda self: None)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "overwrite": lambda patch: None,  # the ledger's objects are overwritten, not put if absent
    "reserve later": _reserve_later,
    "forget killed commands": _forget_killed_commands,
    "forget lost answers": _forget_lost_answers,
    "forget earlier runs": _forget_earlier_runs,
    "ignore claims": _ignore_claims,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_guard_of_money_that_is_taken_out_is_missed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    assert any(run_schedule(seed, mutation).violations for seed in range(_MUTANT_SCHEDULES))
