"""`plad push` against a hub that this test serves: uploaded files, and messages about errors."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from plad_dist.config_file import parse_config
from plad_dist.data.models import commit_model
from plad_dist.rundir import RunDir, open_run
from tests.conftest import plad
from tests.tiny import make_random_model, sampling_config

TOKEN = "hf_secret"  # the token that the hub below accepts


class Hub(BaseHTTPRequestHandler):
    """The endpoints of a hub that an upload of small files needs.

    Keeps the files and the created repositories.
    """

    repositories: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._respond(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            return self._respond(
                200, {"url": f"http://{self.headers['Host']}/owner/student", "name": "owner/student", "id": "1"}
            )
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._respond(
                200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._respond(
                200,
                {
                    "success": True,
                    "commitOid": "a" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/owner/student/commit/{'a' * 40}",
                },
            )
        return self._respond(200, {})

    def do_GET(self) -> None:
        self._respond(200, {"name": "owner", "type": "user", "orgs": [], "sha": "b" * 40, "id": "owner/student"})

    def _respond(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with one finished model, which no training has produced."""
    folder = tmp_path_factory.mktemp("push")
    raw = sampling_config(folder, 4)
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    run = open_run(parse_config(raw, "test"))
    model = make_random_model(folder / "model")
    (model / "README.md").write_text("# A student\n")
    run.model("round-0").parent.mkdir()
    commit_model(model, run.model("round-0"), "f", {"step": 3})
    return run


def push(hub: str, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    return plad("push", *arguments, env=os.environ | environment)


def test_a_finished_model_is_uploaded_with_its_card(run: RunDir, hub: str) -> None:
    result = push(hub, str(run.root), "owner/student")
    assert result.returncode == 0, result.stderr
    assert f"Pushed: {hub}/owner/student" in result.stdout
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= Hub.files.keys()
    assert Hub.files["model.safetensors"] == (run.model("round-0") / "model.safetensors").read_bytes()
    assert Hub.repositories[-1]["visibility"] == "private"
    assert TOKEN not in result.stdout + result.stderr


def test_a_token_that_the_hub_refuses_is_named_but_not_shown(run: RunDir, hub: str) -> None:
    result = push(hub, str(run.root), "owner/student", token="hf_wrong")
    assert result.returncode == 2, result.stderr
    assert "check the token that is set" in result.stderr
    assert "hf_wrong" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["owner/student", "--phase", "seqkd"], 2, "the run has round-0"),
        (["owner/not a name!"], 2, "owner/not a name!"),
        (["student"], 2, "student: expected OWNER/NAME"),
    ],
)
def test_bad_arguments_are_named(run: RunDir, hub: str, arguments: list[str], code: int, message: str) -> None:
    result = push(hub, str(run.root), *arguments)
    assert (result.returncode, message in result.stderr, "Traceback" in result.stderr) == (code, True, False), (
        result.stderr
    )


def test_a_hub_that_does_not_respond_is_reported(run: RunDir) -> None:
    result = push("http://127.0.0.1:9", str(run.root), "owner/student")
    assert result.returncode == 1, result.stderr
    assert "cannot be reached" in result.stderr


def test_an_invalid_address_of_a_hub_is_named(run: RunDir) -> None:
    result = push("hub.example", str(run.root), "owner/student")
    assert (result.returncode, "HF_ENDPOINT: hub.example: expected" in result.stderr) == (2, True), result.stderr


def test_a_damaged_model_is_not_uploaded(run: RunDir, hub: str, tmp_path: Path) -> None:
    weights = run.model("round-0") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    try:
        result = push(hub, str(run.root), "owner/student")
    finally:
        weights.write_bytes(whole)
    assert result.returncode == 2
    assert "plad verify" in result.stderr
