"""Problems that the user must correct: each is reported once, before money is spent if possible."""

from __future__ import annotations

import functools

import pytest
from aiohttp import web

from plad_dist.errors import UserError
from plad_dist.sampling.backend import RefusedPromptError
from tests.fake_endpoint import KEY, FakeTime, client_of, complete_all, error, good, run, serving


@pytest.mark.parametrize(
    ("status", "message", "correction"),
    [
        (401, "bad key", "TEACHER_KEY"),
        (403, "not yours", "TEACHER_KEY"),
        (404, "no such model", "endpoint.model"),
        (402, "Insufficient balance", "billing"),
        (429, "insufficient_quota", "billing"),
    ],
)
def test_a_problem_that_only_the_user_can_correct_stops_all_prompts_at_once(
    status: int, message: str, correction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)

    async def test() -> None:
        settings = {"api_key_env": "TEACHER_KEY", "concurrency": 2}
        respond = lambda prompt, count: error(status, message)  # noqa: E731
        async with serving(respond) as server, client_of(server, **settings) as client:
            outcomes = await complete_all(client, *(f"p{row}" for row in range(20)))
            assert all(isinstance(outcome, UserError) for outcome in outcomes)
            assert message in str(outcomes[0])
            assert correction in str(outcomes[0])
            assert server.requests.total() <= 2

    run(test())


@pytest.mark.parametrize("status", [200, 404, 405])
def test_a_server_that_responds_passes_the_check(status: int) -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server, client_of(server) as client:
            server.models = lambda: web.Response(status=status)
            assert await client.check() is None
            assert not server.bodies

    run(test())


def test_the_check_reports_problems_before_money_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server:
            monkeypatch.delenv("TEACHER_KEY", raising=False)
            async with client_of(server, api_key_env="TEACHER_KEY") as client:
                assert "TEACHER_KEY" in (await client.check() or "")
            monkeypatch.setenv("TEACHER_KEY", f"{KEY}\nsecond line")
            async with client_of(server, api_key_env="TEACHER_KEY") as client:
                problem = await client.check() or ""
                assert "is not a key" in problem
                assert KEY not in problem
            monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")  # mounted secrets often end with a newline
            async with client_of(server, FakeTime(), api_key_env="TEACHER_KEY") as client:
                assert await client.check() is None
                for status, fragment in ((401, "TEACHER_KEY"), (503, "Start it"), (302, "redirects")):
                    server.models = functools.partial(error, status, Location="http://elsewhere/")
                    assert fragment in (await client.check() or ""), status
            async with client_of(server, FakeTime(), url="http://127.0.0.1:9/v1") as client:
                assert "endpoint.url" in (await client.check() or "")
            assert not server.bodies

    run(test())


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_completion_tokens: N}"),
        ("Unsupported value: 'temperature' does not support 0 with this model.", "evaluation.decodings"),
    ],
)
def test_a_field_that_a_server_refuses_is_named_with_its_key(message: str, remedy: str) -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: error(400, message)) as server, client_of(server) as client:
            (outcome,) = await complete_all(client, "a")
            assert isinstance(outcome, UserError)
            assert remedy in str(outcome)
        respond = lambda prompt, count: error(400, message) if prompt == "a" else good()  # noqa: E731
        async with serving(respond) as server, client_of(server) as client:
            (outcome,) = await complete_all(client, "a")
            assert isinstance(outcome, RefusedPromptError)
            assert remedy in str(outcome)

    run(test())
