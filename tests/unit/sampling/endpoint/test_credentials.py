"""Keys, headers and certificates: where they come from, and when they are read again."""

from __future__ import annotations

import logging
import pickle
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from plad_dist.config import Endpoint
from plad_dist.errors import UserError
from plad_dist.sampling.backend import Completion
from plad_dist.sampling.endpoint.credentials import Credentials
from tests.fake_endpoint import DECODING, KEY, client_of, complete_all, error, good, messages, run, serving

NEW_KEY = "sk-proj-ZyXwVu9876543210FeD"


def accepting(key: str, seen: list[str] | None = None) -> Any:
    """Return a `respond` of a server that accepts one key."""

    async def check(request: web.Request) -> Any:
        sent = request.headers.get("Authorization", "")
        if seen is not None:
            seen.append(sent)
        return good() if sent == f"Bearer {key}" else error(401, f"bad key {sent}")

    return lambda prompt, count: check


def test_the_key_comes_from_a_file_or_a_command(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")

    async def test() -> None:
        for source in ({"api_key_file": str(file)}, {"api_key_command": f"head -c 1000 {file} | cat"}):
            async with serving(accepting(KEY)) as server, client_of(server, **source) as client:
                assert await client.check() is None
                assert (await client.complete(messages("hi"), DECODING, 1)).text == "fine"

    run(test())


def test_a_replaced_key_is_read_again_once_the_server_rejects_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)

    async def test() -> None:
        seen: list[str] = []
        async with serving(accepting(NEW_KEY, seen)) as server:
            async with client_of(server, api_key_file=str(file), concurrency=4) as client:
                file.write_text(NEW_KEY)
                outcomes = await complete_all(client, *(f"p{row}" for row in range(12)))
                assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
                assert seen.count(f"Bearer {KEY}") <= 4
                assert client.retries == 0
            assert seen.count(f"Bearer {NEW_KEY}") == 12

    run(test())


def test_a_key_that_stays_rejected_is_read_once_more_and_stops_the_stage(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "key").write_text(KEY)
    command = f"echo read >> {log}; cat {tmp_path / 'key'}"

    async def test() -> None:
        seen: list[str] = []
        async with (
            serving(accepting(NEW_KEY, seen)) as server,
            client_of(server, api_key_command=command, concurrency=2) as client,
        ):
            outcomes = await complete_all(client, *(f"p{row}" for row in range(10)))
            assert all(isinstance(outcome, UserError) for outcome in outcomes)
            assert "rejects the key from the output of endpoint.api_key_command" in str(outcomes[0])
            assert "AbCdEf01" not in str(outcomes[0])
        assert log.read_text().split() == ["read", "read"], "at the start, and when it was rejected"
        assert len(seen) <= 2, "an unchanged key is not sent again"

    run(test())


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"api_key_file": "/nowhere/key"}, "/nowhere/key (endpoint.api_key_file) cannot be read"),
        ({"api_key_file": "sk-secret-in-stderr"}, "the file *** (endpoint.api_key_file) cannot be read"),
        ({"api_key_file": "{empty}"}, "is empty"),
        ({"api_key_command": "echo secret-in-stderr >&2; exit 3"}, "exited with 3"),
        ({"api_key_command": "true"}, "printed nothing"),
        ({"api_key_command": "printf 'two words'"}, "is not a key"),
        ({"headers_env": {"X-Org": "PLAD_NO_SUCH"}}, "PLAD_NO_SUCH (endpoint.headers_env.X-Org) is empty or not set"),
        ({"ca_bundle": "/nowhere/ca.pem"}, "/nowhere/ca.pem (endpoint.ca_bundle)"),
        ({"ca_bundle": "{empty}"}, "endpoint.ca_bundle"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_before_a_request(
    settings: dict[str, Any], fragment: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    settings = {
        name: value.replace("{empty}", str(tmp_path / "empty")) if isinstance(value, str) else value
        for name, value in settings.items()
    }

    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server, client_of(server, **settings) as client:
            problem = await client.check() or ""
            assert fragment in problem
            assert "secret-in-stderr" not in problem
            assert not server.bodies

    run(test())


def test_headers_come_from_the_environment_and_are_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ORG_SECRET", "org 0123-4567-89ab")
    monkeypatch.setenv("REGION", "eu")
    caplog.set_level(logging.DEBUG)

    async def echo(request: web.Request) -> web.Response:
        assert (request.headers["api-key"], request.headers["X-Region"]) == ("org 0123-4567-89ab", "eu")
        assert "Authorization" not in request.headers
        return error(400, f"got {request.headers['api-key']} in eu")

    async def test() -> None:
        headers = {"api-key": "ORG_SECRET", "X-Region": "REGION"}
        async with serving(lambda prompt, count: echo) as server, client_of(server, headers_env=headers) as client:
            (failure,) = await complete_all(client, "p")
            assert "got *** in eu" in str(failure)
            for shown in (str(failure), repr(failure), repr(client), str(pickle.dumps(failure)), caplog.text):
                assert "0123-4567" not in shown

    run(test())


def test_credentials_are_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    credentials = Credentials(Endpoint(url="http://x", model="m", api_key_env="TEACHER_KEY"))
    assert "AbCdEf01" not in repr(credentials)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(credentials)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"api_key_env": "A", "api_key_file": "/b"}, "api_key_env and api_key_file: the key can have one source"),
        ({"api_key_file": "/b", "api_key_command": "c"}, "api_key_file and api_key_command"),
        ({"api_key_env": "A", "headers_env": {"authorization": "B"}}, "headers_env.Authorization"),
        ({"headers_env": {"bad header": "B"}}, "'bad header'"),
        ({"headers_env": {"Content-Length": "B"}}, "Content-Length"),
        ({"api_key_env": "sk-a-secret!"}, "not the key itself"),
        ({"headers_env": {"X-Key": "sk-a-secret!"}}, "X-Key: expected the name of an environment variable"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(settings: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment) as refusal:
        Endpoint(url="http://x", model="m", **settings)
    assert "sk-a-secret!" not in refusal.value.errors()[0]["msg"]  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_of_ones_own_is_trusted_through_the_bundle_only(tmp_path: Path) -> None:
    key, bundle = tmp_path / "key.pem", tmp_path / "ca.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run(
        [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", bundle],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(bundle, key)

    async def test() -> None:
        async with serving(lambda prompt, count: good(), certificate=context) as server:
            async with client_of(server, ca_bundle=str(bundle)) as client:
                assert await client.check() is None
                assert (await client.complete(messages("hi"), DECODING, 1)).text == "fine"
            async with client_of(server) as client:
                problem = await client.check() or ""
                assert "certificate is not trusted" in problem
                assert "endpoint.ca_bundle" in problem

    run(test())
