"""Checks of what a machine reaches: storage and endpoints, and the tokens in its environment."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

from plad_dist.config import Endpoint
from plad_dist.data.storage import Storage
from plad_dist.doctor.findings import Finding, fail, ok, warn
from plad_dist.doctor.node import PROBE, Node, StorageSite
from plad_dist.errors import RunFailed, UserError
from plad_dist.sampling.endpoint.connection import Connection
from plad_dist.sampling.endpoint.credentials import key_source
from plad_dist.sampling.endpoint.reply import CERTIFICATE

_VISIBLE_WITHIN_S = 5.0  # shared file systems show a new folder with a delay
_MAX_LISTED = 5


def check_storage(node: Node) -> Iterator[Finding]:
    """Check that storage can be written, refuses to overwrite, and is shared with the driver."""
    for site in node.sites:
        if node.role == "member" and (problem := _unshared(node, site)) is not None:
            yield problem
            continue
        try:
            site.probe_storage.check_writable()
        except UserError as error:
            yield fail(
                f"{site.key}: {_reason(error, site)}",
                f"give {node.name} the right to write {site.url}, or use another location",
            )
            continue
        shared = ", shared with the driver" if node.role == "member" else ""
        yield ok(f"{site.key}: {site.url} can be written, refuses to overwrite{shared}")


def _unshared(node: Node, site: StorageSite) -> Finding | None:
    """Return a failure if a node cannot read what the driver has written."""
    try:
        is_shared = _appears(PROBE, site.probe_storage)
    except (RunFailed, UserError) as error:
        return fail(f"{site.key}: {_reason(error, site)}", f"let {node.name} read and write {site.url}")
    if is_shared:
        return None
    return fail(
        f"{site.key}: {site.url} is another folder on this node: it lacks the file that the driver has written",
        f"put {site.key} on a file system that all nodes share, and mount it at the same path on {node.name}",
    )


def _appears(key: str, storage: Storage) -> bool:
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while storage.read(key) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _reason(error: Exception, site: StorageSite) -> str:
    """Return a storage's error without the advice for a run in progress, and without the name of
    the probe folder."""
    text = str(error).removeprefix("run.dir: ").partition(". What is committed")[0]
    return text.replace(f"/{site.probe}", "")


def check_endpoints(node: Node) -> Iterator[Finding]:
    """Check the servers that the run uses.

    Only their lists of models are requested, which costs nothing.
    """
    if node.role == "driver":  # the nodes use the servers, not the driver
        return
    yield from asyncio.run(_check_all_endpoints(node))


async def _check_all_endpoints(node: Node) -> list[Finding]:
    return await asyncio.gather(*(_check_endpoint(node.name, key, endpoint) for key, endpoint in node.endpoints))


async def _check_endpoint(node: str, key: str, endpoint: Endpoint) -> Finding:
    server = Connection(endpoint)
    try:
        if (problem := server.problem()) is not None:
            return fail(f"{key}: {problem}", _credentials_remedy(problem, node, endpoint))
        failure = await server.check()
        if failure is not None:
            return fail(f"{key}: {endpoint.url}: {failure.text}", _endpoint_remedy(failure.status, node, key, endpoint))
        status, names = await server.list_models()
    finally:
        await server.close()
    if names and endpoint.model not in names:
        listed = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
        return warn(
            f"{key}: {endpoint.url} answers, but lists no model {endpoint.model!r}",
            f"correct {key}.model; the server lists {listed}",
        )
    if endpoint.exposes_key:
        return warn(
            f"{key}: {endpoint.url} gets its key unencrypted", "use https, or make sure that the network is yours"
        )
    listing = f"and lists {endpoint.model}" if names else f"but does not list its models (HTTP {status})"
    return ok(f"{key}: {endpoint.url} answers {listing}")


def _credentials_remedy(problem: str, node: str, endpoint: Endpoint) -> str:
    names = [name for name in (endpoint.api_key_env, *endpoint.headers_env.values()) if name and name in problem]
    if names:
        return f"set {names[0]} in the environment of {node} before Ray starts there"
    return f"make the files and the command that {endpoint.model}'s endpoint names work on {node}"


def _endpoint_remedy(status: int, node: str, key: str, endpoint: Endpoint) -> str:
    """Return the remedy for a server that answers with a status, or not at all (0)."""
    match status:
        case 401 | 403 if endpoint.api_key_env:
            return f"the key is refused: set {endpoint.api_key_env} on {node} to a key for {endpoint.model}"
        case 401 | 403 if source := key_source(endpoint):
            return f"the key is refused: let {source} on {node} be a key for {endpoint.model}"
        case 401 | 403:
            return f"name the variable that holds the key in {key}.api_key_env, and set the variable on every node"
        case status if status == CERTIFICATE:
            return f"set {key}.ca_bundle to a file with the certificates to trust, on every node"
        case 0:
            return f"start the server, correct {key}.url, or let {node} reach it (DNS, proxy, firewall)"
        case status if 300 <= status < 400:
            return f"set {key}.url to the final address: a key is not sent on to the target of a redirect"
        case _:
            return "the server answers with an error; see its log"


def check_environment(node: Node) -> Iterator[Finding]:
    """Check the token of Ray, and report if models of the hub are fetched without a token."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        if os.environ.get("RAY_AUTH_TOKEN") or file.is_file():
            yield ok("RAY_AUTH_MODE=token, and a token is set")
        else:
            yield fail(
                "RAY_AUTH_MODE=token, but no token is set",
                f"set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token, on {node.name}",
            )
    if node.hub_models:
        from huggingface_hub import get_token

        if get_token() is None:
            yield ok(f"no HF_TOKEN: only public models can be fetched; {', '.join(node.hub_models)} come from the hub")
