"""Faults of endpoints and tokens are found, and keys are never shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from plad_dist.config import Endpoint
from plad_dist.doctor.findings import Finding
from plad_dist.doctor.node import Node
from plad_dist.doctor.reach_checks import check_endpoints, check_environment
from tests.conftest import write_config
from tests.fake_endpoint import error, good, serving
from tests.unit.doctor.findings import KEY, failures, only


def finding_about(models: Callable[[], web.Response], **settings: Any) -> Finding:
    """Return the finding about a server that answers requests for its list of models like this."""

    async def check() -> Finding:
        async with serving(lambda prompt, count: good()) as server:
            server.models = models
            endpoint = Endpoint(url=server.url, model="big", timeout_s=5, **settings)
            node = Node("node-3", endpoints=(("teacher.endpoint", endpoint),))
            (finding,) = await asyncio.to_thread(lambda: list(check_endpoints(node)))
            assert not server.bodies, "no request costs money"
            return finding

    return asyncio.run(check())


def listing(*names: str) -> web.Response:
    return web.json_response({"data": [{"id": name} for name in names]})


def test_a_dead_server_exits_with_1_and_names_the_reason(
    run: tuple[Path, dict[str, Any]], doctor: Callable[..., tuple[int, str]], closed_port: int
) -> None:
    folder, raw = run
    raw["teacher"] = {"endpoint": {"url": f"http://127.0.0.1:{closed_port}/v1", "model": "big"}}
    code, printed = doctor(str(write_config(folder, raw)), "--json")
    (failure,) = failures(printed)
    assert (code, failure["check"]) == (1, "endpoints")
    assert f"127.0.0.1:{closed_port}" in failure["found"]
    assert "teacher.endpoint.url" in failure["remedy"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_fails_with_its_variable_and_is_never_shown(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("PLAD_TEST_KEY", KEY)
    finding = finding_about(lambda: error(status, f"the key {KEY} is not valid"), api_key_env="PLAD_TEST_KEY")
    assert finding.state == "fail"
    assert "set PLAD_TEST_KEY on node-3" in finding.remedy
    assert KEY not in json.dumps(asdict(finding))


def test_the_remedy_for_a_server_that_requires_a_key_is_where_to_name_it() -> None:
    assert "teacher.endpoint.api_key_env" in finding_about(lambda: error(401)).remedy


def test_a_missing_key_fails_with_variable_and_node() -> None:
    finding = finding_about(lambda: listing("big"), api_key_env="PLAD_TEST_KEY")
    assert finding.state == "fail"
    assert "PLAD_TEST_KEY" in finding.text
    assert "node-3" in finding.remedy


@pytest.mark.parametrize(
    ("settings", "fragment", "remedy"),
    [
        ({"api_key_file": "/nowhere/key"}, "/nowhere/key", "work on node-3"),
        ({"api_key_command": "exit 3"}, "exited with 3", "work on node-3"),
        ({"headers_env": {"X-Org": "PLAD_NO_SUCH"}}, "PLAD_NO_SUCH", "set PLAD_NO_SUCH"),
        ({"ca_bundle": "/nowhere/ca.pem"}, "/nowhere/ca.pem", "work on node-3"),
    ],
)
def test_a_source_of_credentials_that_cannot_be_read_fails(
    settings: dict[str, Any], fragment: str, remedy: str
) -> None:
    finding = finding_about(lambda: listing("big"), **settings)
    assert (finding.state, fragment in finding.text, remedy in finding.remedy) == ("fail", True, True)


def test_a_model_that_the_server_does_not_list_is_a_warning() -> None:
    finding = finding_about(lambda: listing("small", "other"))
    assert (finding.state, "'big'" in finding.text, "small, other" in finding.remedy) == ("warn", True, True)


@pytest.mark.parametrize("answer", [lambda: listing("big"), lambda: error(404), lambda: web.Response(text="hello")])
def test_a_server_that_answers_is_ok_even_if_it_does_not_list_its_models(answer: Callable[[], web.Response]) -> None:
    assert finding_about(answer).state == "ok"


@pytest.mark.parametrize("status", [500, 302])
def test_a_server_that_answers_with_an_error_or_redirects_fails(status: int) -> None:
    assert finding_about(lambda: error(status)).state == "fail"


def test_servers_are_checked_by_the_nodes_of_a_cluster_and_not_by_the_driver(closed_port: int) -> None:
    endpoint = Endpoint(url=f"http://127.0.0.1:{closed_port}/v1", model="big")
    assert list(check_endpoints(Node("n", "driver", endpoints=(("teacher.endpoint", endpoint),)))) == []


def test_token_authentication_without_a_token_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert "RAY_AUTH_TOKEN" in only(check_environment(Node("n")), "fail").remedy
    monkeypatch.setenv("RAY_AUTH_TOKEN", KEY)
    assert KEY not in only(check_environment(Node("n")), "ok").text


def test_a_missing_hub_token_is_reported_but_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    text = only(check_environment(Node("n", hub_models=("org/model",))), "ok").text
    assert "org/model" in text
    monkeypatch.setattr("huggingface_hub.get_token", lambda: KEY)
    assert list(check_environment(Node("n", hub_models=("org/model",)))) == []
