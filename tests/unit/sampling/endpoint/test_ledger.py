"""The ledger: the cap holds for all processes together, and what was paid is never forgotten."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config import Decoding, Endpoint, Model
from plad_dist.data.claims import claim_run
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.evaluation.report.page import SamplingCost
from plad_dist.evaluation.report.stage import _lost_money
from plad_dist.fleet.protocol import Hints, StopStageError
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.endpoint import account as accounts
from plad_dist.sampling.endpoint.account import Account
from plad_dist.sampling.endpoint.backend import EndpointBackend
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.errors import SpendingStoppedError
from plad_dist.sampling.endpoint.ledger import Ledger, Spending, ledger_problems, spending_of_run
from plad_dist.sampling.job import SamplingJob
from plad_dist.status import _money_rows
from tests.fake_endpoint import PRICES, after, good, run, serving, until
from tests.unit.sampling.test_attempt import prepare

ANSWER = 0.02  # cost of each answer, which is also the worst one
ANSWER_PRICES = {"input_price": 0.0, "output_price": 4000.0}


def sampler_of(storage: Storage, job: SamplingJob, url: str, **settings: Any) -> tuple[Sampler, list[EndpointBackend]]:
    """Return an actor whose teacher is a paid server, and its backend once it has started."""
    backends: list[EndpointBackend] = []
    endpoint = Endpoint(**({"url": url, "model": "m", "concurrency": 4} | ANSWER_PRICES | settings))

    def make() -> EndpointBackend:
        backends.append(
            EndpointBackend(Model(endpoint=endpoint), "m", [(job.dataset(storage), [0])], "teacher-teacher")
        )
        return backends[0]

    return Sampler(storage, make), backends


def paid_job(job: SamplingJob) -> SamplingJob:
    return replace(job, decoding=Decoding(max_tokens=5))


async def drive(storage: Storage, job: SamplingJob, url: str, attempt: str, **settings: Any) -> str:
    """Let a command sample the block, and return why it stopped, or an empty text."""
    sampler, _ = sampler_of(storage, job, url, **settings)
    assert await sampler.start() is None
    try:
        await sampler.work(job, 0, attempt, Hints())
    except StopStageError as stop:
        return str(stop)
    finally:
        await sampler.stop()
    return ""


def test_two_commands_at_once_share_the_cap_and_what_both_have_paid_is_remembered(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(40)])
    job = paid_job(job)

    async def test() -> None:
        async with serving(lambda prompt, count: after(0.01, good(usage=(10, 5)))) as server:
            reasons = await asyncio.gather(
                *(drive(storage, job, server.url, name, max_spend=1.0) for name in ("A", "B"))
            )
            assert server.completed <= 50, "both together stay under the cap"
            assert any("1 of 1 spent" in reason or "raise endpoint.max_spend" in reason for reason in reasons)
            spent = spending_of_run(storage)["teacher-teacher"]
            assert spent.total == round(server.completed * ANSWER * 1e6)
            assert spent.open == {}
            assert not await drive(storage, job, server.url, "C", max_spend=2.0)
            assert spending_of_run(storage)["teacher-teacher"].total == round(server.completed * ANSWER * 1e6)

    run(test())


def test_commands_that_are_killed_with_requests_in_flight_never_exceed_the_cap_together(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(200)])
    job = paid_job(job)

    async def test() -> None:
        billed = 0

        def respond(prompt: str, count: int) -> Any:
            nonlocal billed
            billed += 1
            return after(60, good(usage=(10, 5))) if count_of_first and billed > count_of_first else good(usage=(10, 5))

        async with serving(respond) as server:
            for _ in range(8):
                count_of_first, enough = billed + 20, billed + 30
                sampler, _ = sampler_of(storage, job, server.url, max_spend=1.0, concurrency=20)
                assert await sampler.start() is None
                work = asyncio.create_task(sampler.work(job, 0, "attempt", Hints()))
                while billed < enough and not work.done():
                    await asyncio.sleep(0.005)
                # The process is gone: nothing is flushed, closed or settled.
                assert sampler._flusher is not None
                sampler._flusher.cancel()
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                assert billed * ANSWER <= 1.0 + 1e-9
                assert spending_of_run(storage)["teacher-teacher"].total >= round(billed * ANSWER * 1e6)
            assert billed >= 40, "the cap is used"

    run(test())


def test_a_command_that_was_taken_over_sends_nothing_more(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(100)])
    job = paid_job(job)

    async def test() -> None:
        async with serving(lambda prompt, count: after(0.1, good(usage=(10, 5)))) as server:
            owned = replace(storage, claim=claim_run(storage, "plad run"))
            first = asyncio.create_task(drive(owned, job, server.url, "A", concurrency=1))
            await until(lambda: server.completed >= 3)
            claim_run(storage, "plad sample")
            reason = await first
            assert "`plad sample`" in reason
            assert "has taken over the run" in reason
            assert server.completed < 60
            assert spending_of_run(storage)["teacher-teacher"].total == round(server.completed * ANSWER * 1e6)

    run(test())


def test_a_short_fault_of_storage_in_the_look_at_the_claims_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "_CHECK_S", 0.0)
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(10)])
    job, real, faults = paid_job(job), Storage.read, 0
    owned = replace(storage, claim=claim_run(storage, "plad run"))

    def failing(self: Storage, key: str) -> bytes | None:
        nonlocal faults
        if key.startswith("claims/") and faults < 5:
            faults += 1
            raise RunFailed(f"{key}: Stale file handle (ESTALE)")
        return real(self, key)

    monkeypatch.setattr(Storage, "read", failing)

    async def test() -> None:
        async with serving(lambda prompt, count: good(usage=(10, 5))) as server:
            reason = await drive(owned, job, server.url, "A")
            assert faults == 5
            assert "ESTALE" not in reason

    run(test())


def test_a_client_that_was_taken_over_stops_for_good(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    owned = replace(storage, claim=claim_run(storage, "plad run"))
    claim_run(storage, "plad sample")

    async def test() -> None:
        account, _ = account_of(Ledger(owned, "p"), 1.0, clock=lambda: 0.0)
        for _ in range(3):
            with pytest.raises(SpendingStoppedError, match="plad sample"):
                await account.check_owned()

    asyncio.run(test())


async def spent_at_start(storage: Storage, job: SamplingJob, url: str) -> float:
    """Return what the next command counts as spent before it sends a request."""
    sampler, backends = sampler_of(storage, job, url, max_spend=1.0)
    assert await sampler.start() is None
    spent = backends[0]._client.spent
    await sampler.stop()
    return spent


def test_money_whose_parts_and_spools_were_deleted_stays_paid(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(10)])
    job = paid_job(job)

    async def test() -> None:
        async with serving(lambda prompt, count: good(usage=(10, 5))) as server:
            assert not await drive(storage, job, server.url, "A", max_spend=1.0)
            for part in (tmp_path / "samples").glob("part-*"):
                part.unlink()
            assert await spent_at_start(storage, job, server.url) == pytest.approx(10 * ANSWER)

    run(test())


def test_what_was_paid_before_there_was_a_ledger_is_its_first_entry(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(10)])
    job = paid_job(job)

    async def test() -> None:
        async with serving(lambda prompt, count: good(usage=(10, 5))) as server:
            assert not await drive(storage, job, server.url, "A")
            for entry in (tmp_path / "spending" / "teacher-teacher").iterdir():
                entry.unlink()
            assert await spent_at_start(storage, job, server.url) == pytest.approx(10 * ANSWER)

    run(test())


@pytest.mark.parametrize("operation", ["create", "read", "sizes"])
def test_faults_of_storage_stop_spending_and_the_next_command_finishes(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(10)])
    job, calls, faulty = paid_job(job), 0, 0
    real = getattr(Storage, operation)

    def failing(self: Storage, key: str, *arguments: Any) -> Any:
        nonlocal calls
        if "spending" in key:
            calls += 1
            if calls == faulty:
                raise RunFailed(f"{key}: Stale file handle (ESTALE)")
        return real(self, key, *arguments)

    monkeypatch.setattr(Storage, operation, failing)

    async def test() -> None:
        nonlocal faulty, calls
        async with serving(lambda prompt, count: good(usage=(10, 5))) as server:
            for number in range(1, 8):
                faulty, calls = number, 0
                try:
                    reason = await drive(storage, job, server.url, "A", max_spend=1.0)
                except RunFailed as error:
                    reason = str(error)
                assert not reason or "ESTALE" in reason
                faulty = 0
                spent = spending_of_run(storage).get("teacher-teacher", Spending())
                assert spent.total >= round(server.completed * ANSWER * 1e6)
            assert not await drive(storage, job, server.url, "B", max_spend=1.0)
            assert server.completed == 10

    run(test())


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"settled": 0, "open": {}, "excess": 0, "xxh3_128": "0"}'])
def test_a_damaged_ledger_stops_spending_by_name(damage: bytes, tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a"])
    storage.create("spending/teacher-teacher/00000001.json", damage)

    async def test() -> None:
        async with serving(lambda prompt, count: good(usage=(10, 5))) as server:
            with pytest.raises(RunFailed, match=r"00000001\.json: missing, or not a ledger of money"):
                await drive(storage, paid_job(job), server.url, "A")
            assert server.completed == 0

    run(test())
    (problem,) = ledger_problems(storage)
    assert "teacher-teacher/00000001.json" in problem
    assert _money_rows(storage) == [("spending", "damaged", problem)]


def test_the_status_shows_what_the_ledger_counts(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    Ledger(storage, "teacher-big").start(lambda: Spending(12_340_000, {"client-a": 500_000}))
    Ledger(storage, "judge-j").start(lambda: Spending(1_000_000))
    assert ledger_problems(storage) == []
    note = "12.84 spent, 0.50 of it reserved by commands and batches at work, or killed"
    assert _money_rows(storage) == [("spending/judge-j", "-", "1.00 spent"), ("spending/teacher-big", "-", note)]


def test_the_report_shows_the_money_of_responses_that_were_lost(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    Ledger(storage, "teacher-big").start(lambda: Spending(12_340_000, {"client-a": 500_000}))
    costs = {"Teacher, for pairs": SamplingCost(10, 10, 10, 11.0), "Judge j": SamplingCost(10, 10, 10, 5.0)}
    assert _lost_money(storage, costs) == pytest.approx(1.84)
    assert _lost_money(Storage(str(tmp_path / "other")), costs) == 0.0


def test_every_flipped_bit_of_a_ledger_is_found(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    Ledger(storage, "p").start(lambda: Spending(1234, {"client-a": 56}))
    data = bytearray(storage.read("spending/p/00000001.json") or b"")
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        storage.replace("spending/p/00000001.json", bytes(flipped))
        try:
            assert Ledger(storage, "p").read() == Spending(1234, {"client-a": 56}), "only white space"
        except RunFailed:
            continue


def test_a_writer_with_an_old_listing_or_an_old_state_finds_the_latest_one(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    frozen, other = Ledger(storage, "p"), Ledger(storage, "p")
    frozen.start(Spending)
    for amount in range(1, 50):
        other.change(lambda state, amount=amount: state.with_amount("other", amount))  # type: ignore[misc]
    assert frozen.change(lambda state: state.with_amount("frozen", 7)).open == {"other": 49, "frozen": 7}

    class Stale(Storage):
        def sizes(self, folder: str) -> dict[str, int]:
            return dict(sorted(super().sizes(folder).items())[:3])

    assert Ledger(Stale(str(tmp_path)), "p").read().open == {"other": 49, "frozen": 7}


def account_of(ledger: Ledger, cap: float | None, **settings: Any) -> tuple[Account, Budget]:
    endpoint = Endpoint(url="http://x", model="m", max_spend=cap, **PRICES)
    budget = Budget(endpoint)
    return Account(endpoint, budget, ledger, **settings), budget


def test_a_fast_client_writes_few_objects(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    async def test(cap: float | None, payer: str) -> int:
        ledger = Ledger(storage, payer)
        ledger.start(Spending)
        account, budget = account_of(ledger, cap, clock=lambda: 0.0)
        budget.learn(1.0, 1.0)
        for _ in range(20_000):
            while not budget.reserve(0.01):
                assert await account.hold(0.01)
            budget.settle(0.01, 0.005)
            budget.learn(0.01, 0.005)
            await account.adjust()
        await account.close()
        assert ledger.read() == Spending(100_000_000)
        return len(storage.sizes(f"spending/{payer}"))

    assert asyncio.run(test(101.0, "capped")) < 60
    assert asyncio.run(test(None, "uncapped")) < 600


def test_an_amount_is_lowered_when_fewer_requests_are_in_flight(tmp_path: Path) -> None:
    ledger = Ledger(Storage(str(tmp_path)), "p")
    ledger.start(Spending)

    async def test() -> None:
        now = 0.0
        account, budget = account_of(ledger, 100.0, clock=lambda: now)
        budget._known = 100
        for _ in range(20):
            while not budget.reserve(1.0):
                assert await account.hold(1.0)
        now = 10.0
        for _ in range(20):
            budget.settle(1.0, 0.1)
            await account.adjust()
        assert ledger.read().total <= 5_000_000

    asyncio.run(test())


def test_a_raise_whose_reply_was_lost_is_not_spent_and_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(Storage(str(tmp_path)), "p")
    ledger.start(Spending)
    real = Storage.create

    async def test() -> None:
        account, budget = account_of(ledger, 10.0)

        def lost(self: Storage, key: str, data: bytes) -> bool:
            real(self, key, data)
            raise RunFailed("the reply was lost")

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "create", lost)
            with pytest.raises(SpendingStoppedError):
                await account.hold(1.0)
        assert not budget.reserve(1.0)
        assert json.loads((tmp_path / "spending/p/00000002.json").read_bytes())["open"] != {}
        assert await account.hold(1.0)
        assert budget.reserve(1.0)
        budget.settle(1.0, 0.5)
        await account.close()
        assert ledger.read() == Spending(500_000)

    asyncio.run(test())
