"""Money: nothing exceeds the cap, and nothing that the server may bill is left out."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from plad_dist.config import Endpoint
from plad_dist.errors import UserError
from plad_dist.sampling.backend import Completion
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.errors import EndpointDownError, SpendingCapReached
from plad_dist.sampling.endpoint.request import make_request
from tests.fake_endpoint import (
    DECODING,
    PRICES,
    FakeTime,
    after,
    client_of,
    complete_all,
    error,
    good,
    messages,
    run,
    serving,
    until,
)


@pytest.mark.parametrize("spent", [0.0, 0.02])
def test_the_cap_is_never_exceeded_and_responses_in_flight_are_kept(spent: float) -> None:
    async def test() -> None:
        respond = lambda prompt, count: after(0.005, good(usage=(280, 20)))  # noqa: E731
        settings = PRICES | {"max_spend": 0.1, "concurrency": 8}
        async with serving(respond) as server, client_of(server, spent=spent, **settings) as client:
            outcomes = await complete_all(client, *(f"p{row}" for row in range(100)))
            completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
            stopped = [outcome for outcome in outcomes if isinstance(outcome, SpendingCapReached)]
            assert len(completions) == server.completed > 10
            assert len(completions) + len(stopped) == 100
            assert client.spent == pytest.approx(spent + sum(completion.cost for completion in completions))
            assert 0.08 < client.spent <= 0.1
            for fragment in (f"{client.spent:.6g} of 0.1", "endpoint.max_spend"):
                assert fragment in str(stopped[0])

    run(test())


def test_a_lost_response_counts_at_its_worst_cost() -> None:
    async def test() -> None:
        respond = lambda prompt, count: after(60, good()) if count == 1 else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), timeout_s=2.0, **PRICES) as client:
            completion = await client.complete(messages("hi"), DECODING, 1)
            regular, worst = (
                (10 * 10 + 5 * 100) / 1e6,
                (len(json.dumps(messages("hi"))) + 256) * 10 / 1e6 + 20 * 100 / 1e6,
            )
            assert completion.cost == pytest.approx(regular + worst)
            assert client.spent == pytest.approx(completion.cost)

    run(test())


def test_an_error_response_costs_nothing() -> None:
    async def test() -> None:
        respond = lambda prompt, count: error(500) if count == 1 else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, FakeTime(), **PRICES) as client:
            assert (await client.complete(messages("hi"), DECODING, 1)).cost == pytest.approx(600e-6)
            assert client.prompt_tokens == 10

    run(test())


def test_a_cancelled_request_counts_at_its_worst_cost_and_releases_its_reservation() -> None:
    async def test() -> None:
        respond = lambda prompt, count: after(60, good()) if prompt == "slow" else good()  # noqa: E731
        async with serving(respond) as server, client_of(server, max_spend=0.008, **PRICES) as client:
            slow = asyncio.create_task(client.complete(messages("slow"), DECODING, 1))
            waiting = asyncio.create_task(client.complete(messages("next"), DECODING, 1))
            await until(lambda: server.requests == {"slow": 1})
            slow.cancel()
            stopped = (await asyncio.gather(waiting, return_exceptions=True))[0]
            assert isinstance(stopped, SpendingCapReached)  # the server may bill the cancelled request
            assert client.spent > 0.004

    run(test())


def test_a_request_waits_for_the_money_that_requests_in_flight_may_not_need() -> None:
    async def test() -> None:
        respond = lambda prompt, count: after(0.05, good())  # noqa: E731
        # The cap has room for one worst cost at a time, but for many real costs.
        async with serving(respond) as server, client_of(server, max_spend=0.008, **PRICES) as client:
            outcomes = await complete_all(client, "a", "b", "c")
            assert all(isinstance(outcome, Completion) for outcome in outcomes)
            assert server.most_in_flight == 1

    run(test())


def test_a_cap_needs_a_server_that_reports_usage() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good(usage=None)) as server:
            async with client_of(server, max_spend=1.0, **PRICES) as client:
                first = await client.complete(messages("hi"), DECODING, 1)  # it may have been paid for
                assert first.cost == client.spent > 20 * 100 / 1e6, "the worst cost"
                with pytest.raises(UserError, match="no token usage"):
                    await client.complete(messages("hi"), DECODING, 1)
            async with client_of(server) as client:
                completion = await client.complete(messages("hi" * 40), DECODING, 1)
                assert client.usage_missing == 1
                assert completion.prompt_tokens > 20
                assert 1 <= completion.num_tokens <= 20

    run(test())


def test_a_cap_needs_a_limit_on_the_response() -> None:
    with pytest.raises(ValueError, match=r"extra_body\.max_tokens.*set max_completion_tokens"):
        Endpoint(url="http://x", model="m", max_spend=1.0, extra_body={"max_tokens": None}, **PRICES)
    extra = {"max_tokens": None, "max_completion_tokens": 30}
    endpoint = Endpoint(url="http://x", model="m", max_spend=1.0, extra_body=extra, **PRICES)
    assert make_request(endpoint, messages("hi"), DECODING, 1).worst_usage.completion_tokens == 30


def test_the_error_that_stops_the_stage_carries_the_cost_of_failed_tries() -> None:
    async def test() -> None:
        respond = lambda prompt, count: good() if prompt == "a" else error(504)  # noqa: E731
        async with (
            serving(respond) as server,
            client_of(server, FakeTime(), max_spend=1.0, give_up_after_s=30.0, **PRICES) as client,
        ):
            with pytest.raises(EndpointDownError) as caught:
                await client.complete(messages("b"), DECODING, 1)
            assert caught.value.cost == pytest.approx(client.spent)
            assert caught.value.cost > 0

    run(test())


def test_a_budget_without_reservations_reserves_nothing() -> None:
    for count in range(1, 50):
        endpoint = Endpoint(url="http://x", model="m", max_spend=sum([0.1] * count), input_price=1.0, output_price=1.0)
        budget = Budget(endpoint, 0.0)
        for _ in range(count):  # as many may be in flight as were paid
            assert budget.reserve(1e-300)
            budget.settle(1e-300, 1e-300)
            budget.learn(1e-300, 1e-300)
        assert all(budget.reserve(0.1) for _ in range(count))
        assert not budget.reserve(0.1)
        for _ in range(count):
            budget.settle(0.1, 0.0)
        assert budget.reserve(budget.cap or 0.0)  # to the last bit


def reasoning_outside(prompt: int, completion: int, reasoning: int) -> dict[str, int]:
    """Return the usage of a provider that counts reasoning in the total only."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion + reasoning}


def price_of(prompt: int, output: int) -> float:
    return (prompt * PRICES["input_price"] + output * PRICES["output_price"]) / 1e6


@pytest.mark.parametrize("concurrency", [1, 8, 64])
@pytest.mark.parametrize("seed", range(4))
def test_the_cap_holds_to_one_request_if_reasoning_is_billed_beyond_max_tokens(concurrency: int, seed: int) -> None:
    """No bound is known here, as the provider reasons as long as it likes."""
    rng = random.Random(seed)
    thoughts = {f"p{row}": rng.choice([500] if seed == 0 else [0, 100, 2000 * seed]) for row in range(400)}

    async def test() -> None:
        billed: list[float] = []

        def respond(prompt: str, count: int) -> Any:
            billed.append(price_of(10, 5 + thoughts[prompt]))
            return after(rng.random() * 0.005, good(usage=reasoning_outside(10, 5, thoughts[prompt])))

        settings = PRICES | {"max_spend": 8.0, "concurrency": concurrency}
        async with serving(respond) as server, client_of(server, **settings) as client:
            outcomes = await complete_all(client, *thoughts)
            completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
            assert client.spent == pytest.approx(sum(billed)), "the bill is the server's"
            assert sum(completion.cost for completion in completions) == pytest.approx(sum(billed))
            assert sum(billed) <= 8.0 + max(billed)
            if sum(price_of(10, 5 + thought) for thought in thoughts.values()) > 8.0:
                assert sum(billed) > 8.0 - 3 * max(billed), "the cap is used"
                assert any(isinstance(outcome, SpendingCapReached) for outcome in outcomes)

    run(test())


@pytest.mark.parametrize("concurrency", [8, 64])
def test_the_cap_holds_to_one_request_if_thoughts_grow_longer_and_longer(concurrency: int) -> None:
    """Each request costs more than any before it, so that the largest excess so far is no bound."""

    async def test() -> None:
        billed: list[float] = []

        def respond(prompt: str, count: int) -> Any:
            thought = 20 * len(billed)
            billed.append(price_of(10, 5 + thought))
            return after(0.005, good(usage=reasoning_outside(10, 5, thought)))

        settings = PRICES | {"max_spend": 40.0, "concurrency": concurrency}
        async with serving(respond) as server, client_of(server, **settings) as client:
            outcomes = await complete_all(client, *(f"p{row}" for row in range(400)))
            assert any(isinstance(outcome, SpendingCapReached) for outcome in outcomes)
            assert 40.0 - 3 * max(billed) < sum(billed) <= 40.0 + max(billed)

    run(test())


def test_the_cap_holds_if_cached_tokens_have_their_own_price() -> None:
    async def test() -> None:
        usage = {"prompt_tokens": 280, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 200}}
        settings = PRICES | {"cached_input_price": 1.0, "max_spend": 0.1, "concurrency": 8}
        async with (
            serving(lambda prompt, count: after(0.005, good(usage=usage))) as server,
            client_of(server, **settings) as client,
        ):
            outcomes = await complete_all(client, *(f"p{row}" for row in range(100)))
            completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
            assert client.spent == pytest.approx(len(completions) * (80 * 10 + 200 * 1 + 20 * 100) / 1e6)
            assert 0.08 < client.spent <= 0.1

    run(test())


def test_a_response_whose_tokens_the_server_reports_as_zero_does_not_pass_under_a_cap() -> None:
    async def test() -> None:
        respond = lambda prompt, count: good(usage=(10, 0))  # noqa: E731
        async with serving(respond) as server, client_of(server, max_spend=1.0, **PRICES) as client:
            assert (await client.complete(messages("hi"), DECODING, 1)).cost > 20 * 100 / 1e6, "the worst cost"
            with pytest.raises(UserError, match="no token usage"):
                await client.complete(messages("hi"), DECODING, 1)

    run(test())


@pytest.mark.parametrize("count", [-5, True, 2**31, 2**70, 1e300, float("nan"), float("inf"), "9" * 40, [5], None])
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "total_tokens"])
def test_a_count_of_tokens_that_cannot_be_true_counts_at_most_at_the_worst_cost(name: str, count: Any) -> None:
    async def test() -> None:
        sane = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        respond = lambda prompt, count_: good(usage=sane | {name: count} if prompt == "b" else sane)  # noqa: E731
        async with serving(respond) as server, client_of(server, max_spend=1.0, **PRICES) as client:
            completions = [await client.complete(messages(prompt), DECODING, 1) for prompt in "abc"]
            worst = make_request(client._endpoint, messages("b"), DECODING, 1).worst_usage
            assert 0 < completions[1].cost <= client._budget.worst_cost(worst)
            assert all(completion.num_tokens <= 20 for completion in completions)
            assert client.spent == pytest.approx(sum(completion.cost for completion in completions))

    run(test())
