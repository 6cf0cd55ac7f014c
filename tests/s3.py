"""Fixtures: an S3 server in this process, and a bucket for each test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest


def environment(server: str) -> dict[str, str]:
    """Return the environment variables with which a process reaches the server."""
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Yield the URL of the server."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(port=0)
    moto.start()
    moto._server.app = _serialised(moto._server.app)
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


def _serialised(app: Any) -> Any:
    """Return an app that handles one request at a time.

    A conditional put is atomic on a real store, but moto checks and writes in two steps.
    """
    lock = threading.Lock()

    def locked(environ: Any, respond: Any) -> Any:
        with lock:
            return app(environ, respond)

    return locked


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return a URI in a new bucket."""
    import boto3

    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    boto3.client("s3", endpoint_url=server, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}/runs/one"
