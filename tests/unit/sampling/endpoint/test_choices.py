"""Several responses from one request: one prompt is billed, and nothing is lost or paid twice."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from plad_dist.sampling.backend import Completion, RefusedPromptError
from tests.fake_endpoint import DECODING, PRICES, FakeServer, client_of, error, good, messages, run, serving, streamed

SEEDS = [11, 22, 33, 44]


def several(*texts: str, usage: Any = (10, 40)) -> dict[str, Any]:
    body = good(usage=usage)
    body["choices"] = [{"index": i, "message": {"content": t}, "finish_reason": "stop"} for i, t in enumerate(texts)]
    return body


@pytest.mark.parametrize("streams", [False, True])
def test_the_responses_of_one_request_share_its_bill_exactly(streams: bool) -> None:
    async def test() -> None:
        body = several("a", "bb" * 20, "", "dddd", usage=(10, 37))
        respond = lambda prompt, count: streamed(body) if streams else body  # noqa: E731
        async with serving(respond) as server, client_of(server, **PRICES) as client:
            outcomes, lost_cost = await client.complete_many(messages("hi"), DECODING, SEEDS)
            completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
            assert [completion.text for completion in completions] == ["a", "bb" * 20, "", "dddd"]
            assert sum(completion.num_tokens for completion in completions) == 37
            assert [completion.prompt_tokens for completion in completions] == [10, 0, 0, 0]
            assert sum(completion.cost for completion in completions) == pytest.approx(client.spent, rel=1e-15)
            assert client.spent == pytest.approx((10 * 10 + 37 * 100) / 1e6)
            assert lost_cost == 0
            assert [(body["n"], body["seed"]) for body in server.bodies] == [(4, 11)]

    run(test())


def test_a_server_that_returns_one_choice_is_asked_one_by_one_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server, client_of(server) as client:
            outcomes, _ = await client.complete_many(messages("hi"), DECODING, SEEDS)
            assert isinstance(outcomes[0], Completion)
            assert outcomes[1:] == [None, None, None]
            assert not client.takes_n
            assert "returns one of 4 responses" in caplog.text

    caplog.set_level(logging.WARNING)
    run(test())


def test_a_server_that_returns_fewer_choices_is_asked_for_the_others() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: several("a", "b")) as server, client_of(server) as client:
            outcomes, _ = await client.complete_many(messages("hi"), DECODING, SEEDS)
            assert [getattr(outcome, "text", None) for outcome in outcomes] == ["a", "b", None, None]
            assert client.takes_n

    run(test())


def test_a_server_that_refuses_n_is_told_from_one_that_refuses_a_prompt() -> None:
    async def test() -> None:
        def respond_of(server: FakeServer, takes_n: bool) -> Any:
            def respond(prompt: str, count: int) -> Any:
                n = server.bodies[-1]["n"]
                return error(400, "no") if prompt == "bad" or (n > 1 and not takes_n) else several(*"abcd"[:n])

            return respond

        for takes_n in (True, False):
            async with serving(lambda prompt, count: good()) as server, client_of(server) as client:
                server._respond = respond_of(server, takes_n)
                outcomes, lost_cost = await client.complete_many(messages("bad"), DECODING, SEEDS)
                assert (outcomes, lost_cost) == ([None] * 4, 0)
                with pytest.raises(RefusedPromptError):
                    await client.complete(messages("bad"), DECODING, 1)
                outcomes, _ = await client.complete_many(messages("good"), DECODING, SEEDS)
                assert all(isinstance(outcome, Completion) for outcome in outcomes) is takes_n
                await client.complete(messages("good"), DECODING, 1)
                assert client.takes_n is takes_n

    run(test())


def test_one_refused_choice_does_not_affect_the_others() -> None:
    async def test() -> None:
        body = several("a", "b", "c", "d")
        body["choices"][1]["finish_reason"] = "content_filter"
        body["choices"][2]["finish_reason"] = "abort"
        async with serving(lambda prompt, count: body) as server, client_of(server, **PRICES) as client:
            outcomes, _ = await client.complete_many(messages("hi"), DECODING, SEEDS)
            assert [type(outcome) for outcome in outcomes] == [Completion, RefusedPromptError, type(None), Completion]
            costs = [outcome.cost for outcome in outcomes if outcome is not None]
            assert sum(costs) == pytest.approx(client.spent)

    run(test())


def test_the_worst_cost_is_that_of_all_responses() -> None:
    async def test() -> None:
        async with (
            serving(lambda prompt, count: several(*"abcd", usage=(10, 80))) as server,
            client_of(server, max_spend=0.0115, **PRICES) as client,  # room for 80 tokens, and for their prompt
        ):
            await client.complete_many(messages("hi"), DECODING, SEEDS)
            with pytest.raises(Exception, match=r"may cost up to 0\.01"):
                await client.complete_many(messages("hi"), DECODING, SEEDS)

    run(test())
