"""The promises of a teacher behind a server: nothing paid twice, no outage turned into error rows, no key shown."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from plad_dist.config import Decoding, Endpoint
from plad_dist.errors import UserError
from plad_dist.sampling.backend import RefusedPromptError
from plad_dist.sampling.endpoint.client import (
    ClientClosedError,
    EndpointAnswer,
    EndpointClient,
    EndpointDownError,
    SpendingCapReached,
)
from plad_dist.sampling.endpoint.reply import redacted
from tests.fake_endpoint import (
    DECODING,
    FakeTime,
    after,
    ask,
    asking,
    assert_rate,
    cut,
    error,
    good,
    messages,
    run,
    serving,
    until,
)

KEY = "sk-proj-AbCdEf0123456789XyZ"

# ------------------------------------------------------------------------------------------------------- one request


def test_an_answer_comes_with_its_tokens_and_its_cost() -> None:
    async def test() -> None:
        async with (
            serving(lambda prompt, nth: after(0.05, good("héllo"))) as server,
            asking(server, input_price=1.0, output_price=10.0, spent=3.0) as client,
        ):
            answer = await client.complete(messages("hi"), DECODING, 7)
            assert answer == EndpointAnswer("héllo", "stop", 10, 5, 60e-6)
            assert (client.requests, client.retries, client.prompt_tokens, client.completion_tokens) == (1, 0, 10, 5)
            assert client.spent == pytest.approx(3.0 + 60e-6)

    run(test())


def test_the_request_says_how_to_draw_and_no_more_than_it_must() -> None:
    async def test() -> None:
        async with serving(lambda prompt, nth: good()) as server:
            async with asking(server) as client:
                await client.complete(messages("hi"), Decoding(temperature=0.5, max_tokens=9), 7)
            assert server.bodies[0] == {
                "model": "m",
                "messages": messages("hi"),
                "max_tokens": 9,
                "temperature": 0.5,
                "top_p": 1.0,
                "n": 1,
                "seed": 7,
            }
            extra = {"seed": None, "max_tokens": None, "max_completion_tokens": 30, "reasoning": {"effort": "low"}}
            async with asking(server, extra_body=extra) as client:
                await client.complete(messages("hi"), Decoding(top_k=5, min_p=0.1, stop=["\n"]), 7)
            body = server.bodies[1]
            assert body.keys().isdisjoint({"seed", "max_tokens"})
            assert (body["top_k"], body["min_p"], body["stop"], body["reasoning"]) == (
                5,
                0.1,
                ["\n"],
                {"effort": "low"},
            )

    run(test())


def test_a_rendered_prompt_goes_to_completions() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: {"choices": [{"text": f"{prompt}!", "finish_reason": "length"}]}  # noqa: E731
        async with serving(behave) as server, asking(server, api="completions") as client:
            answer = await client.complete("to render", DECODING, 1)
            assert (answer.text, answer.finish_reason) == ("to render!", "length")

    run(test())


@pytest.mark.parametrize("name", ["model", "messages", "prompt", "stream", "n"])
def test_extra_fields_cannot_replace_what_the_run_sets(name: str) -> None:
    with pytest.raises(UserError, match=rf"extra_body\.{name}"):
        EndpointClient(Endpoint(url="http://x", model="m", extra_body={name: 1}))


@pytest.mark.parametrize(
    ("reason", "tokens", "expected"),
    [("stop", 5, "stop"), ("length", 20, "length"), (None, 5, "stop"), (None, 20, "length"), ("eos_token", 5, "stop")],
)
def test_a_response_is_finished_or_cut(reason: str | None, tokens: int, expected: str) -> None:
    async def test() -> None:
        behave = lambda prompt, nth: good(finish_reason=reason, usage=(10, tokens))  # noqa: E731
        async with serving(behave) as server, asking(server) as client:
            assert (await client.complete(messages("hi"), DECODING, 1)).finish_reason == expected

    run(test())


def test_half_a_character_at_the_end_of_a_response_can_be_stored() -> None:
    async def test() -> None:
        async with serving(lambda prompt, nth: good("cut \ud83d")) as server, asking(server) as client:
            answer = await client.complete(messages("hi"), DECODING, 1)
            assert answer.text.encode() == "cut \ufffd".encode()

    run(test())


# ----------------------------------------------------------------------------------------------------------- retries

_PASSING = {
    "500": error(500),
    "408": error(408),
    "409": error(409),
    "425": error(425),
    "502 in HTML": web.Response(status=502, text="<html>Bad gateway</html>"),
    "hang": after(60, good()),
    "cut": cut,
    "malformed": web.Response(text='{"choices": [', content_type="application/json"),
    "no object": web.json_response([]),
    "no choices": {"usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    "empty choices": {"choices": []},
    "null content": {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
    "aborted": good("half", finish_reason="abort"),
    "error in 200": {"error": {"code": 503, "message": "overloaded"}},
}


@pytest.mark.parametrize("kind", _PASSING)
def test_what_passes_is_tried_again(kind: str) -> None:
    async def test() -> None:
        behave = lambda prompt, nth: _PASSING[kind] if nth == 1 else good()  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), timeout_s=2.0) as client:
            answer = await client.complete(messages("hi"), DECODING, 1)
            assert (answer.text, client.requests, client.retries) == ("fine", 2, 1)

    # A response object is sent once; every test runs in a loop of its own.
    run(test())


@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_a_pause_gets_it_from_all_requests(form: str, status: int) -> None:
    async def test() -> None:
        def behave(prompt: str, nth: int) -> Any:
            date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
            pause = "30" if form == "seconds" else date
            return error(status, Retry_After=pause) if (prompt, nth) == ("a", 1) else good()

        fake = FakeTime()
        async with serving(behave, fake.clock) as server, asking(server, fake, concurrency=1) as client:
            assert [answer.text for answer in await ask(client, "a", "b", "c")] == ["fine"] * 3
            assert server.at[0] == 0
            assert all(28 <= at <= 40 for at in server.at[1:]), server.at

    run(test())


def test_too_many_requests_are_no_failure_of_a_row() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: error(429) if prompt == "a" and nth <= 30 else good()  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), max_retries=0, give_up_after_s=1e6) as client:
            answers = await ask(client, *("a" if row == 0 else f"b{row}" for row in range(12)))
            assert [answer.text for answer in answers] == ["fine"] * 12

    run(test())


def test_a_pause_longer_than_anyone_would_wait_ends_the_stage_at_once() -> None:
    async def test() -> None:
        fake = FakeTime()
        async with (
            serving(lambda prompt, nth: error(429, Retry_After="86400")) as server,
            asking(server, fake) as client,
        ):
            with pytest.raises(EndpointDownError, match="pause of 86400 s"):
                await client.complete(messages("hi"), DECODING, 1)
            assert fake.now == 0

    run(test())


# ------------------------------------------------------------------------------------- refused prompts and outages


@pytest.mark.parametrize(
    "refusal",
    [
        lambda: error(400, "too long"),
        lambda: error(413),
        lambda: error(422),
        lambda: error(403, "Your input was flagged by moderation"),
        lambda: error(429, "Request too large for m: limit 100 tokens"),
        lambda: good("I", finish_reason="content_filter"),
        lambda: good("", finish_reason="tool_calls"),
        lambda: good(None, refusal="I will not"),  # type: ignore[arg-type]
    ],
)
def test_a_prompt_refused_for_good_is_asked_once_and_spoils_no_other(refusal: Callable[[], Any]) -> None:
    async def test() -> None:
        behave = lambda prompt, nth: refusal() if prompt == "bad" else good()  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime()) as client:
            outcomes = await ask(client, "bad", *(f"good{row}" for row in range(9)))
            assert isinstance(outcomes[0], RefusedPromptError)
            assert all(isinstance(outcome, EndpointAnswer) for outcome in outcomes[1:])
            assert server.asked["bad"] == 1

    run(test())


def test_a_server_that_refuses_everything_makes_no_error_rows() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: error(400, "Unsupported parameter: 'max_tokens'")  # noqa: E731
        async with serving(behave) as server, asking(server) as client:
            outcomes = await ask(client, *(f"p{row}" for row in range(30)))
            assert all(isinstance(outcome, UserError) for outcome in outcomes)
            assert "Unsupported parameter" in str(outcomes[0])

    run(test())


def test_one_poison_prompt_among_good_ones_is_the_only_one_given_up() -> None:
    async def test() -> None:
        fake = FakeTime()
        behave = lambda prompt, nth: error(500, "CUDA error") if prompt == "poison" else good()  # noqa: E731
        async with serving(behave) as server, asking(server, fake, max_retries=3, concurrency=2) as client:
            outcomes = await ask(client, "poison", *(f"good{row}" for row in range(30)))
            assert isinstance(outcomes[0], RefusedPromptError)
            assert "4 tries" in str(outcomes[0])
            assert "CUDA error" in str(outcomes[0])
            assert all(isinstance(outcome, EndpointAnswer) for outcome in outcomes[1:])
            assert server.asked["poison"] == 4
            assert fake.now < 60

    run(test())


def test_a_poison_prompt_that_is_the_last_one_left_does_not_stop_the_stage() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: error(500) if prompt == "poison" else good()  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), max_retries=3) as client:
            with pytest.raises(RefusedPromptError):
                await client.complete(messages("poison"), DECODING, 1)
            assert server.asked.total() == 5  # a short question besides, which says that the server is well

    run(test())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("how", ["500", "429", "refused connection"])
def test_an_outage_stops_the_stage_and_makes_no_error_rows(rows: int, how: str) -> None:
    async def test() -> None:
        fake = FakeTime()
        behave = lambda prompt, nth: error(int(how), "overloaded")  # noqa: E731
        async with serving(behave) as server:
            url = "http://127.0.0.1:9/v1" if how == "refused connection" else server.url
            async with asking(server, fake, url=url, max_retries=1, concurrency=4) as client:
                outcomes = await ask(client, *(f"p{row}" for row in range(rows)))
                assert all(isinstance(outcome, EndpointDownError) for outcome in outcomes), outcomes
                assert 900 <= fake.now < 1000
                for said in ("nothing answered since", "900 s", "give_up_after_s", "run again"):
                    assert said in str(outcomes[0])
                assert ("overloaded" if how != "refused connection" else "no connection") in str(outcomes[0])

    run(test())


def test_a_server_that_answers_only_short_questions_is_an_outage() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: good() if prompt == "Say ok." else error(504)  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), max_retries=1, concurrency=4) as client:
            outcomes = await ask(client, *(f"p{row}" for row in range(20)))
            assert all(isinstance(outcome, EndpointDownError) for outcome in outcomes)

    run(test())


def test_requests_go_on_after_an_outage_that_ends_in_time() -> None:
    async def test() -> None:
        fake = FakeTime()
        behave = lambda prompt, nth: error(503) if fake.now < 800 else good()  # noqa: E731
        async with serving(behave) as server, asking(server, fake, max_retries=0, concurrency=4) as client:
            outcomes = await ask(client, *(f"p{row}" for row in range(20)))
            assert all(isinstance(outcome, EndpointAnswer) for outcome in outcomes), outcomes

    run(test())


def test_idle_time_is_no_outage() -> None:
    async def test() -> None:
        fake = FakeTime()
        behave = lambda prompt, nth: error(500) if prompt == "bad" or nth == 1 else good()  # noqa: E731
        async with serving(behave) as server, asking(server, fake, max_retries=100) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.complete(messages("bad"), DECODING, 1), 0.05)
            fake.now += 10_000
            assert isinstance((await ask(client, "fine"))[0], EndpointAnswer)

    run(test())


# ----------------------------------------------------------------------------------------------------- what to mend


@pytest.mark.parametrize(
    ("status", "message", "todo"),
    [
        (401, "bad key", "TEACHER_KEY"),
        (403, "not yours", "TEACHER_KEY"),
        (404, "no such model", "endpoint.model"),
        (402, "Insufficient balance", "billing"),
        (429, "insufficient_quota", "billing"),
    ],
)
def test_what_only_the_user_can_mend_is_asked_for_once(
    status: int, message: str, todo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)

    async def test() -> None:
        settings = {"api_key_env": "TEACHER_KEY", "concurrency": 2}
        async with serving(lambda prompt, nth: error(status, message)) as server, asking(server, **settings) as client:
            outcomes = await ask(client, *(f"p{row}" for row in range(20)))
            assert all(isinstance(outcome, UserError) for outcome in outcomes)
            assert message in str(outcomes[0])
            assert todo in str(outcomes[0])
            assert server.asked.total() <= 2

    run(test())


@pytest.mark.parametrize("status", [200, 404, 405])
def test_a_server_that_is_there_passes_the_check(status: int) -> None:
    async def test() -> None:
        async with serving(lambda prompt, nth: good()) as server, asking(server) as client:
            server.models = lambda: web.Response(status=status)
            assert await client.check() is None
            assert not server.bodies

    run(test())


def test_the_check_says_what_is_wrong_before_anything_is_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving(lambda prompt, nth: good()) as server:
            monkeypatch.delenv("TEACHER_KEY", raising=False)
            async with asking(server, api_key_env="TEACHER_KEY") as client:
                assert "TEACHER_KEY" in (await client.check() or "")
            monkeypatch.setenv("TEACHER_KEY", f"{KEY}\nsecond line")
            async with asking(server, api_key_env="TEACHER_KEY") as client:
                problem = await client.check() or ""
                assert "is no key" in problem
                assert KEY not in problem
            monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")  # as secrets that are files often end
            async with asking(server, FakeTime(), api_key_env="TEACHER_KEY") as client:
                assert await client.check() is None
                for status, said in ((401, "TEACHER_KEY"), (503, "Start it"), (302, "redirects")):
                    server.models = functools.partial(error, status, Location="http://elsewhere/")
                    assert said in (await client.check() or ""), status
            async with asking(server, FakeTime(), url="http://127.0.0.1:9/v1") as client:
                assert "endpoint.url" in (await client.check() or "")
            assert not server.bodies

    run(test())


# ------------------------------------------------------------------------------------------------------------- secrets


def test_the_key_is_nowhere_to_be_read(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    async def echo(request: web.Request, status: int) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        text = f"got {request.headers['Authorization']}, that is {KEY} or {KEY[:20]} or {KEY[4:]}"
        return error(status, text) if status != 500 else web.Response(status=500, text=text)

    async def test() -> None:
        for status in (400, 401, 500):
            behave = lambda prompt, nth, status=status: lambda request: echo(request, status)  # noqa: E731
            async with serving(behave) as server, asking(server, FakeTime(), api_key_env="TEACHER_KEY") as client:
                failure = (await ask(client, "p"))[0]
                assert isinstance(failure, Exception)
                assert "got Bearer ***" in str(failure)
                for shown in (str(failure), repr(failure), repr(client), str(pickle.dumps(failure)), caplog.text):
                    assert "AbCdEf01" not in shown
                    assert "0123456789" not in shown
                with pytest.raises(TypeError, match="not pickled"):
                    pickle.dumps(client)

    run(test())


def test_texts_of_a_server_are_redacted_before_they_are_cut() -> None:
    text = redacted("x" * 290 + " " + KEY, KEY)
    assert text.endswith("***")
    assert len(redacted("y " * 1000, KEY)) < 310
    assert (
        redacted("Bearer abc.def and sk-12345678 at http://me:pw@host", None) == "Bearer *** and *** at http://***host"
    )


def test_a_redirect_does_not_carry_the_key_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)

    async def test() -> None:
        async with serving(lambda prompt, nth: good()) as other:
            target = f"{other.url}/{KEY}/chat/completions?key={KEY}"
            behave = lambda prompt, nth: web.Response(status=307, headers={"Location": target})  # noqa: E731
            async with serving(behave) as server, asking(server, api_key_env="TEACHER_KEY") as client:
                with pytest.raises(UserError, match="redirects") as failure:
                    await client.complete(messages("hi"), DECODING, 1)
                assert other.url in str(failure.value)
                assert "AbCdEf01" not in str(failure.value)
            assert not other.bodies

    run(test())


# --------------------------------------------------------------------------------------------------- bounds and rates


def test_no_more_requests_are_under_way_than_allowed() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: after(0.01, error(500) if nth == 1 else good())  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), concurrency=5) as client:
            answers = await ask(client, *(f"p{row}" for row in range(40)))
            assert all(isinstance(answer, EndpointAnswer) for answer in answers)
            assert server.most_in_flight == 5

    run(test())


def test_requests_keep_to_their_rate() -> None:
    async def test() -> None:
        fake = FakeTime()
        async with (
            serving(lambda prompt, nth: good(), fake.clock) as server,
            asking(server, fake, requests_per_minute=30, concurrency=1) as client,
        ):
            await ask(client, *(f"p{row}" for row in range(60)))
            assert_rate(server.at, [1.0] * 60, 30)
            assert fake.now == pytest.approx(60 * 2, rel=0.05)

    run(test())


def test_tokens_keep_to_their_rate_by_what_the_server_reports() -> None:
    async def test() -> None:
        fake = FakeTime()
        async with (
            serving(lambda prompt, nth: good(usage=(30, 2)), fake.clock) as server,
            asking(server, fake, tokens_per_minute=600, concurrency=1) as client,
        ):
            await ask(client, *(f"p{row}" for row in range(60)))
            # 32 tokens each: 60 of them are more than three minutes' worth; by `max_tokens` it would be five.
            assert 180 <= fake.now <= 230

    run(test())


# ----------------------------------------------------------------------------------------------------------- spending

_PRICES = {"input_price": 10.0, "output_price": 100.0}


@pytest.mark.parametrize("spent", [0.0, 0.02])
def test_the_cap_is_never_exceeded_and_answers_under_way_are_kept(spent: float) -> None:
    async def test() -> None:
        behave = lambda prompt, nth: after(0.005, good(usage=(280, 20)))  # noqa: E731
        settings = _PRICES | {"max_spend": 0.1, "concurrency": 8}
        async with serving(behave) as server, asking(server, spent=spent, **settings) as client:
            outcomes = await ask(client, *(f"p{row}" for row in range(100)))
            answers = [outcome for outcome in outcomes if isinstance(outcome, EndpointAnswer)]
            stopped = [outcome for outcome in outcomes if isinstance(outcome, SpendingCapReached)]
            assert len(answers) == server.answered > 10
            assert len(answers) + len(stopped) == 100
            assert client.spent == pytest.approx(spent + sum(answer.cost for answer in answers))
            assert 0.08 < client.spent <= 0.1
            for said in (f"{client.spent:.6g} of 0.1", "endpoint.max_spend"):
                assert said in str(stopped[0])

    run(test())


def test_an_answer_that_was_lost_counts_at_its_worst() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: after(60, good()) if nth == 1 else good()  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), timeout_s=2.0, **_PRICES) as client:
            answer = await client.complete(messages("hi"), DECODING, 1)
            regular, worst = (
                (10 * 10 + 5 * 100) / 1e6,
                (len(json.dumps(messages("hi"))) + 256) * 10 / 1e6 + 20 * 100 / 1e6,
            )
            assert answer.cost == pytest.approx(regular + worst)
            assert client.spent == pytest.approx(answer.cost)

    run(test())


def test_what_a_server_did_not_do_costs_nothing() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: error(500) if nth == 1 else good()  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), **_PRICES) as client:
            assert (await client.complete(messages("hi"), DECODING, 1)).cost == pytest.approx(600e-6)
            assert client.prompt_tokens == 10

    run(test())


def test_a_request_that_is_cancelled_counts_at_its_worst_and_holds_nothing_back() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: after(60, good()) if prompt == "slow" else good()  # noqa: E731
        async with serving(behave) as server, asking(server, max_spend=0.008, **_PRICES) as client:
            slow = asyncio.create_task(client.complete(messages("slow"), DECODING, 1))
            waiting = asyncio.create_task(client.complete(messages("next"), DECODING, 1))
            await until(lambda: server.asked == {"slow": 1})
            slow.cancel()
            stopped = (await asyncio.gather(waiting, return_exceptions=True))[0]
            assert isinstance(stopped, SpendingCapReached)  # the server may bill for the one that was cancelled
            assert client.spent > 0.004

    run(test())


def test_a_request_waits_for_the_room_that_others_may_leave() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: after(0.05, good())  # noqa: E731
        # Room for one worst case at a time, but for many real costs.
        async with serving(behave) as server, asking(server, max_spend=0.008, **_PRICES) as client:
            outcomes = await ask(client, "a", "b", "c")
            assert all(isinstance(outcome, EndpointAnswer) for outcome in outcomes)
            assert server.most_in_flight == 1

    run(test())


def test_a_cap_needs_a_server_that_reports_usage() -> None:
    async def test() -> None:
        async with serving(lambda prompt, nth: good(usage=None)) as server:
            async with asking(server, max_spend=1.0, **_PRICES) as client:
                with pytest.raises(UserError, match="no token usage"):
                    await client.complete(messages("hi"), DECODING, 1)
            async with asking(server) as client:
                answer = await client.complete(messages("hi" * 40), DECODING, 1)
                assert client.usage_missing == 1
                assert answer.prompt_tokens > 20
                assert 1 <= answer.completion_tokens <= 20

    run(test())


def test_a_cap_needs_a_bound_on_the_response() -> None:
    endpoint = Endpoint(url="http://x", model="m", max_spend=1.0, extra_body={"max_tokens": None}, **_PRICES)
    with pytest.raises(UserError, match="max_tokens"):
        EndpointClient(endpoint)


def test_closing_waits_for_answers_under_way_and_asks_nothing_more() -> None:
    async def test() -> None:
        async with serving(lambda prompt, nth: after(0.3, good(prompt))) as server:
            async with asking(server, concurrency=2) as client:
                asked = asyncio.create_task(ask(client, "a", "b", "c", "d"))
                await until(lambda: server.asked == {"a": 1, "b": 1})
                await client.close(60.0)
                outcomes = await asked
            assert [answer.text for answer in outcomes[:2]] == ["a", "b"]
            assert all(isinstance(outcome, ClientClosedError) for outcome in outcomes[2:])
            assert server.asked == {"a": 1, "b": 1}

    run(test())


def test_closing_does_not_wait_for_ever() -> None:
    async def test() -> None:
        async with serving(lambda prompt, nth: after(60, good())) as server, asking(server) as client:
            asked = asyncio.create_task(ask(client, "slow"))
            await until(lambda: server.asked == {"slow": 1})
            await client.close(0.2)
            assert isinstance((await asked)[0], ClientClosedError)
            assert server.asked == {"slow": 1}

    run(test())


@pytest.mark.parametrize("status", [403, 404])
def test_a_prompt_that_a_firewall_refuses_is_an_error_row_once_others_were_answered(status: int) -> None:
    async def test() -> None:
        behave = lambda prompt, nth: error(status, "blocked") if "DROP TABLE" in prompt else good()  # noqa: E731
        async with serving(behave) as server, asking(server) as client:
            assert isinstance((await ask(client, "a"))[0], EndpointAnswer)
            outcomes = await ask(client, "b", "DROP TABLE x", "c")
            assert [type(outcome) for outcome in outcomes] == [EndpointAnswer, RefusedPromptError, EndpointAnswer]
            assert isinstance((await ask(client, "d"))[0], EndpointAnswer)

    run(test())


def test_a_key_that_is_revoked_on_the_way_is_not_the_prompts_fault() -> None:
    async def test() -> None:
        revoked = False
        behave = lambda prompt, nth: error(403, "revoked") if revoked else good()  # noqa: E731
        async with serving(behave) as server, asking(server) as client:
            await ask(client, "a")
            revoked = True
            outcomes = await ask(client, "b", "c", "d")
            assert all(isinstance(outcome, UserError) for outcome in outcomes)

    run(test())


def test_a_prompt_that_is_throttled_for_ever_is_given_up_while_others_are_answered() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: error(429, "slow down") if prompt == "bad" else good()  # noqa: E731
        async with serving(behave) as server, asking(server, FakeTime(), give_up_after_s=100.0) as client:
            bad = asyncio.create_task(client.complete(messages("bad"), DECODING, 1))
            while not bad.done():
                assert isinstance((await ask(client, "good"))[0], EndpointAnswer)
            with pytest.raises(RefusedPromptError, match=r"while others had one; the last: .*slow down"):
                await bad

    run(test())


def test_what_failed_tries_cost_is_told_with_the_error_that_ends_the_stage() -> None:
    async def test() -> None:
        behave = lambda prompt, nth: good() if prompt == "a" else error(504)  # noqa: E731
        async with (
            serving(behave) as server,
            asking(server, FakeTime(), max_spend=1.0, give_up_after_s=30.0, **_PRICES) as client,
        ):
            with pytest.raises(EndpointDownError) as caught:
                await client.complete(messages("b"), DECODING, 1)
            assert caught.value.cost == pytest.approx(client.spent)
            assert caught.value.cost > 0

    run(test())
