"""The key: it reaches no message, no log, no pickle and no other server."""

from __future__ import annotations

import logging
import pickle

import pytest
from aiohttp import web

from plad_dist.errors import UserError
from plad_dist.sampling.endpoint.redaction import redacted
from tests.fake_endpoint import DECODING, KEY, FakeTime, client_of, complete_all, error, good, messages, run, serving


def test_the_key_appears_in_no_message_log_or_pickle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    async def echo(request: web.Request, status: int) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        text = f"got {request.headers['Authorization']}, that is {KEY} or {KEY[:20]} or {KEY[4:]}"
        return error(status, text) if status != 500 else web.Response(status=500, text=text)

    async def test() -> None:
        for status in (400, 401, 500):
            respond = lambda prompt, count, status=status: lambda request: echo(request, status)  # noqa: E731
            async with serving(respond) as server, client_of(server, FakeTime(), api_key_env="TEACHER_KEY") as client:
                failure = (await complete_all(client, "p"))[0]
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


def test_a_redirect_does_not_carry_the_key_to_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)

    async def test() -> None:
        async with serving(lambda prompt, count: good()) as other:
            target = f"{other.url}/{KEY}/chat/completions?key={KEY}"
            respond = lambda prompt, count: web.Response(status=307, headers={"Location": target})  # noqa: E731
            async with serving(respond) as server, client_of(server, api_key_env="TEACHER_KEY") as client:
                with pytest.raises(UserError, match="redirects") as failure:
                    await client.complete(messages("hi"), DECODING, 1)
                assert other.url in str(failure.value)
                assert "AbCdEf01" not in str(failure.value)
            assert not other.bodies

    run(test())
