"""An S3 server of this process, and a bucket for each test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest


def environment(server: str) -> dict[str, str]:
    """What a process needs to reach the server."""
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    found = ThreadedMotoServer(port=0)
    found.start()
    found._server.app = _one_at_a_time(found._server.app)
    host, port = found.get_host_and_port()
    yield f"http://{host}:{port}"
    found.stop()


def _one_at_a_time(app: Any) -> Any:
    """A conditional put is atomic on a real store; moto looks and writes in two steps."""
    lock = threading.Lock()

    def locked(environ: Any, respond: Any) -> Any:
        with lock:
            return app(environ, respond)

    return locked


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A URI in a new bucket."""
    import boto3

    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    boto3.client("s3", endpoint_url=server, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}/runs/one"
