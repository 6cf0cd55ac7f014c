"""Batches: submitted once wherever the process ends, and what they answer is kept and paid once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import web

from plad_dist.config import Endpoint, Model
from plad_dist.data.claims import SupersededError
from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from plad_dist.fleet.protocol import BlockResult, Hints, StopStageError
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.endpoint import batch as batches
from plad_dist.sampling.endpoint import batch_api
from plad_dist.sampling.endpoint.backend import EndpointBackend
from plad_dist.sampling.endpoint.batch_record import BatchLedger
from plad_dist.sampling.endpoint.budget import spent_on
from plad_dist.sampling.endpoint.connection import Connection
from plad_dist.sampling.endpoint.ledger import Spending, spending_of_run
from plad_dist.sampling.job import SamplingJob
from tests.fake_batches import BatchProvider, prompt_of, providing
from tests.fake_endpoint import PRICES, error, good
from tests.unit.sampling.test_attempt import prepare

PROMPTS = ["a", "b", "c"]
PRICE = (10 * 10 + 5 * 100) / 1e6  # of one answer


class Killed(BaseException):
    """End of the process."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_POLL_S", "_LONGEST_POLL_S", "_LOOK_AGAIN_S"):
        monkeypatch.setattr(batches, name, 0.001)
    monkeypatch.setattr(batches, "backoff_s", lambda failures, jitter: 0.001)


async def process(
    storage: Storage, job: SamplingJob, provider: BatchProvider, spent: list[float] | None = None, **settings: Any
) -> BlockResult:
    """Let a new process sample the block. It ends like a killed one if something raises."""
    keys = {"url": provider.url, "model": "m", "mode": "batch"} | PRICES | settings
    outputs = [(job.dataset(storage), [0])]
    backends: list[EndpointBackend] = []

    def make_backend() -> EndpointBackend:
        backends.append(EndpointBackend(Model(endpoint=Endpoint(**keys)), "m", outputs))
        return backends[0]

    sampler = Sampler(storage, make_backend)
    assert await sampler.start() is None
    try:
        return await sampler.work(job, 0, "attempt", Hints())
    finally:
        if spent is not None:
            spent.append(backends[0]._client.spent)
        assert sampler._flusher is not None
        sampler._flusher.cancel()
        await backends[0].close()


def work(storage: Storage, job: SamplingJob, provider: BatchProvider, **settings: Any) -> BlockResult:
    async def run() -> BlockResult:
        async with providing(provider):
            return await asyncio.wait_for(process(storage, job, provider, **settings), 60)

    return asyncio.run(run())


def texts(folder: Path) -> list[str]:
    table = pa.ipc.open_file(next((folder / "samples").glob("part-*.arrow"))).read_all()
    return list(table["text"].to_pylist())


def test_a_block_is_one_batch_and_costs_what_the_provider_reports(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider, spent = BatchProvider(), list[float]()
    result = work(storage, replace(job, n=2), provider, spent=spent)
    assert texts(tmp_path) == ["a", "a", "b", "b", "c", "c"]
    assert provider.submitted_lines == [6]
    assert result.part.counts["cost_micros"] == round(6 * PRICE * 1e6)
    assert spent == [pytest.approx(6 * PRICE)]
    assert provider.calls.count("POST files") == provider.calls.count("POST batches") == 1
    body = json.loads(provider.files["file-0"].splitlines()[0])
    assert body["custom_id"] == "0-0"
    assert body["body"]["messages"] == [{"role": "user", "content": "a"}]
    assert "stream" not in body["body"]
    assert not list((tmp_path / "samples").rglob("spool/*/*")), "the records go with the spool"


@pytest.mark.parametrize("after", [False, True])
def test_nothing_is_submitted_twice_wherever_the_process_is_killed(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    deadly_step = 0

    def step() -> Iterator[None]:
        nonlocal steps
        steps += 1
        if steps == deadly_step and not after:
            raise Killed
        yield
        if steps == deadly_step and after:
            raise Killed

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = None
            for _ in step():
                result = real(*arguments, **keywords)
            return result

        return call

    def watched_call(real: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*arguments: Any, **keywords: Any) -> Any:
            result = None
            for _ in step():
                result = await real(*arguments, **keywords)
            return result

        return call

    monkeypatch.setattr(Connection, "call", watched_call(Connection.call))
    for name in ("create", "replace"):
        monkeypatch.setattr(Storage, name, watched(getattr(Storage, name)))
    is_killed = True
    while is_killed:
        deadly_step += 1
        folder = tmp_path / str(deadly_step)
        steps = -100_000
        storage, job = prepare(folder, PROMPTS)
        provider, steps = BatchProvider(), 0

        async def test(storage: Storage = storage, job: SamplingJob = job, provider: BatchProvider = provider) -> bool:
            nonlocal steps
            async with providing(provider):
                try:
                    await process(storage, job, provider)
                except Killed:
                    steps = 1_000_000
                    result = await process(storage, job, provider)
                    assert result.part.counts["cost_micros"] == round(3 * PRICE * 1e6)
                    return True
            return False

        is_killed = asyncio.run(asyncio.wait_for(test(), 60))
        assert provider.submitted_lines == [3], f"killed at step {deadly_step}"
        assert provider.answered == {"a": 1, "b": 1, "c": 1}
        assert texts(folder) == PROMPTS
    assert deadly_step > 9, "record, upload, submit, record, polls, downloads, spool, record, part"


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_an_ended_batch_has_answered_is_kept_and_the_rest_is_submitted_again(status: str, tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.ending = lambda number: status if number == 0 else "completed"
    provider.answer = lambda body: (
        None if prompt_of(body) == "b" and len(provider.batches) == 1 else (200, good(prompt_of(body)))
    )
    result = work(storage, job, provider)
    assert texts(tmp_path) == PROMPTS
    assert provider.submitted_lines == [3, 1]
    assert provider.answered == {"a": 1, "b": 1, "c": 1}
    assert result.part.counts["cost_micros"] == round(3 * PRICE * 1e6)


def test_a_submission_whose_answer_is_lost_is_found_again(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.lost_answers = {"POST batches", "POST files", "GET batches", "GET batches ID", "GET files ID"}
    work(storage, job, provider)
    assert texts(tmp_path) == PROMPTS
    assert provider.submitted_lines == [3]


def test_a_refused_prompt_is_an_error_row_and_a_failed_one_is_asked_again(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a", "bad", "flaky", "poison"])
    provider = BatchProvider()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        match prompt_of(body):
            case "bad":
                return 400, {"error": {"message": "flagged by moderation"}}
            case "flaky" if len(provider.batches) == 1:
                return 500, {"error": {"message": "oops"}}
            case "poison":
                return 500, {"error": {"message": "always"}}
        return 200, good(prompt_of(body))

    provider.answer = answer
    result = work(storage, job, provider, max_retries=2)
    assert texts(tmp_path) == ["a", "", "flaky", ""]
    assert provider.submitted_lines == [4, 2, 1]
    assert result.part.counts["errors"] == 2
    assert "flagged by moderation" in (result.first_error or "")


@pytest.mark.parametrize(
    ("refused", "fragments"),
    [
        ("every line", ["Unsupported value", "endpoint.extra_body"]),
        ("the batch", ["invalid_url", "the batch has failed"]),
        ("the key", ["rejects", "key"]),
        ("the interface", ["endpoint.mode: realtime"]),
    ],
)
def test_what_the_user_must_correct_stops_the_stage_and_makes_no_error_rows(
    refused: str, fragments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-0123456789")
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    match refused:
        case "every line":
            provider.answer = lambda body: (400, {"error": {"message": "Unsupported value"}})
        case "the batch":
            provider.ending = lambda number: "failed"
            provider.errors = [{"code": "invalid_url", "message": "no", "line": 1}]
        case "the key":
            provider.refuse = lambda call: error(401, "no sk-0123456789") if call == "POST files" else None
        case "the interface":
            provider.refuse = lambda call: web.Response(status=404) if call == "POST files" else None
    with pytest.raises(UserError) as refusal:
        work(storage, job, provider, api_key_env="TEACHER_KEY")
    for fragment in fragments:
        assert fragment in str(refusal.value)
    assert "0123456789" not in str(refusal.value)
    assert provider.answered.total() == 0


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.ending = lambda number: "failed" if number < 3 else "completed"
    provider.errors = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m"}]
    work(storage, job, provider, max_retries=0)
    assert texts(tmp_path) == PROMPTS
    assert provider.submitted_lines == [3, 3, 3, 3]


def test_batches_that_bring_nothing_stop_the_stage(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.ending = lambda number: "expired"
    provider.answer = lambda body: None
    with pytest.raises(StopStageError, match="3 batches of samples block 0 ended without a response"):
        work(storage, job, provider, max_retries=2)


def test_the_worst_cost_of_a_batch_in_flight_counts_towards_the_cap_of_the_next_process(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    dataset = job.dataset(storage)
    ledger = BatchLedger(dataset, 0, job.fingerprint)
    record = ledger.add([(0, 0), (1, 0)], 0.75)
    assert record is not None
    assert spent_on([(dataset, [0])]) == 0.75
    assert spent_on([(dataset, [1])]) == 0
    ledger.update(record, is_settled=True)
    assert spent_on([(dataset, [0])]) == 0
    spent: list[float] = []
    ledger.add([(0, 0)], 0.75)
    provider = BatchProvider()
    work(storage, job, provider, spent=spent, max_spend=1.0)
    assert spent == [pytest.approx(3 * PRICE)], "the real cost replaces it"


def test_the_cap_stops_before_a_batch_that_could_exceed_it(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(40)])
    provider, spent = BatchProvider(), list[float]()
    with pytest.raises(StopStageError, match=r"raise endpoint\.max_spend"):
        work(storage, job, provider, spent=spent, max_spend=0.05)
    assert spent[0] == pytest.approx(provider.answered.total() * PRICE)
    assert 0.02 < spent[0] <= 0.05
    work(storage, job, provider, max_spend=1.0)
    assert set(provider.answered.values()) == {1}
    assert len(provider.answered) == 40


def test_the_cap_holds_to_a_small_batch_if_reasoning_is_billed_beyond_max_tokens(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, [f"p{row}" for row in range(100)])
    provider, spent = BatchProvider(), list[float]()
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 5015}
    provider.answer = lambda body: (200, good(prompt_of(body), usage=usage))
    price = (10 * 10 + 5005 * 100) / 1e6
    with pytest.raises(StopStageError, match=r"raise endpoint\.max_spend"):
        work(storage, job, provider, spent=spent, max_spend=20.0)
    assert spent[0] == pytest.approx(provider.answered.total() * price)
    assert 20.0 - price < spent[0] <= 20.0


def test_requests_of_a_batch_in_flight_are_not_asked_in_realtime(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.polls = 3

    async def test() -> None:
        async with providing(provider):
            real = Connection.call

            async def dying(self: Connection, method: str, path: str, **keywords: Any) -> Any:
                if path.startswith("batches/") and provider.calls.count("GET batches ID") == 2:
                    raise Killed
                return await real(self, method, path, **keywords)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Connection, "call", dying)
                with pytest.raises(Killed):
                    await process(storage, job, provider)
            await process(storage, job, provider, mode="realtime")

    asyncio.run(test())
    assert provider.submitted_lines == [3]
    assert provider.answered == {"a": 1, "b": 1, "c": 1}
    assert texts(tmp_path) == PROMPTS


def test_a_provider_that_does_not_list_its_batches_is_not_guessed_about(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.refuse = lambda call: web.Response(status=405) if call == "GET batches" else None
    provider.lost_answers = {"POST batches"}
    with pytest.raises(UserError, match=r"whether the batch in samples/spool/00000/batch-0000.json was submitted"):
        work(storage, job, provider)
    (record,) = (tmp_path / "samples/spool/00000").glob("batch-*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"batch_id": "batch-0"}))
    work(storage, job, provider)
    assert provider.submitted_lines == [3]
    assert texts(tmp_path) == PROMPTS


def test_a_key_that_may_not_use_batches_is_recognized_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        provider = BatchProvider()
        provider.refuse = lambda call: error(403, "not yours") if call == "GET batches" else None
        async with providing(provider):
            endpoint = Endpoint(url=provider.url, model="m", mode="batch", api_key_env="TEACHER_KEY")
            backend = EndpointBackend(Model(endpoint=endpoint), "m", [])
            assert "rejects the key from the variable TEACHER_KEY" in (await backend.check() or "")
            await backend.close()

    monkeypatch.setenv("TEACHER_KEY", "sk-0123456789")
    asyncio.run(test())


def test_a_batch_of_another_account_is_named_with_its_record(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    ledger = BatchLedger(job.dataset(storage), 0, job.fingerprint)
    ledger.update(ledger.add([(0, 0)], 0.1), batch_id="batch-of-another")
    with pytest.raises(UserError, match=r"no batch batch-of-another, recorded in samples/spool/00000/batch-0000.json"):
        work(storage, job, BatchProvider())


def test_the_end_of_a_batch_may_be_written_in_capitals(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.ending = lambda number: "COMPLETED"
    work(storage, job, provider)
    assert texts(tmp_path) == PROMPTS


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.02, 0.05, 0.1])
def test_two_processes_at_one_block_submit_it_once(delay_s: float, tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    provider.polls = 1 << 30  # the batch does not end before the second process has begun

    async def late() -> BlockResult:
        await asyncio.sleep(delay_s)
        provider.polls = 20 + max(provider._looks.values(), default=0)
        return await process(storage, job, provider, max_spend=1.0)

    async def test() -> list[Any]:
        async with providing(provider):
            both = process(storage, job, provider, max_spend=1.0), late()
            return await asyncio.gather(*both, return_exceptions=True)

    outcomes = asyncio.run(asyncio.wait_for(test(), 60))
    assert provider.submitted_lines == [3]
    assert any(isinstance(outcome, BlockResult) for outcome in outcomes)
    reasons = [str(outcome) for outcome in outcomes if not isinstance(outcome, BlockResult)]
    assert all("another process submits" in reason for reason in reasons)
    assert texts(tmp_path) == PROMPTS
    # A batch that was reserved just before its process lost the claim stays reserved.
    assert spending_of_run(storage)["endpoint"].settled == round(3 * PRICE * 1e6)


def test_a_batch_of_a_killed_process_stays_reserved_until_its_bill_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()

    async def dying(self: batches.BatchClient, batch_id: str, record_path: str) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(batches.BatchClient, "_wait", dying)
        with pytest.raises(Killed):
            work(storage, job, provider)
    (amount,) = spending_of_run(storage)["endpoint"].open.values()
    assert amount > 3 * PRICE * 1e6
    work(storage, job, provider)
    assert spending_of_run(storage)["endpoint"] == Spending(round(3 * PRICE * 1e6))


def test_results_larger_than_a_batch_can_have_are_named_and_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    provider = BatchProvider()
    monkeypatch.setattr(batch_api, "_BASE_RESULT_BYTES", 100)
    monkeypatch.setattr(batch_api, "_RESULT_BYTES_PER_TOKEN", 0)
    with pytest.raises(UserError, match=r"batch-0000.json: its answer is too large: more than 0 MiB"):
        work(storage, job, provider)
    assert provider.calls.count("GET files ID") == 1
    monkeypatch.setattr(batch_api, "_RESULT_BYTES_PER_TOKEN", 256)
    work(storage, job, provider)
    assert provider.submitted_lines == [3], "its results are still there for a version that takes them"
    assert texts(tmp_path) == PROMPTS


def test_a_claim_with_the_same_number_is_not_that_of_another_process(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, PROMPTS)
    ledger, other = (BatchLedger(job.dataset(storage), 0, job.fingerprint) for _ in range(2))
    ledger.claim()
    ledger.check_claim()
    for claim in (tmp_path / "samples/spool/00000").iterdir():
        claim.unlink()  # the block was committed, and deleted by its user
    other.claim()
    other.check_claim()
    with pytest.raises(SupersededError, match="another process"):
        ledger.check_claim()
