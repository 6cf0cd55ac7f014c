"""What `plad doctor` looks at beyond a machine: storage, servers, and the environment that opens them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from plad_dist.config import Endpoint
from plad_dist.data.storage import Storage
from plad_dist.doctor.node_checks import PROBE, Finding, Node, StorageSite, fail, ok, warn
from plad_dist.errors import RunFailed, UserError
from plad_dist.sampling.endpoint.connection import Connection

_SEEN_WITHIN_S = 5.0  # file systems that nodes share show a new folder after a while
_SHOWN = 5


def storage(node: Node) -> Iterator[Finding]:
    """Whether the run's storage can be written, refuses to overwrite, and is the one that the driver sees."""
    for place in node.places:
        if node.role == "member":
            try:
                is_seen = _is_seen(place.probes)
            except (RunFailed, UserError) as error:
                yield fail(f"{place.key}: {_cause(error, place)}", f"let {node.name} read and write {place.url}")
                continue
            if not is_seen:
                yield fail(
                    f"{place.key}: {place.url} is another folder here: what the driver has written is not in it",
                    f"put {place.key} on a file system that all nodes share, and mount it at the same path on {node.name}",
                )
                continue
        try:
            place.probes.check_writable()
        except UserError as error:
            yield fail(f"{place.key}: {_cause(error, place)}", f"give {node.name} the right to write {place.url}, or use another place")  # fmt: skip
            continue
        shared = ", shared with the driver" if node.role == "member" else ""
        yield ok(f"{place.key}: {place.url} can be written, refuses to overwrite{shared}")


def _is_seen(probes: Storage) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while probes.read(PROBE) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _cause(error: Exception, place: StorageSite) -> str:
    """A storage's message without the advice that fits a run, and without the folder that it was tried in."""
    text = str(error).removeprefix("run.dir: ").partition(". What is committed")[0]
    return text.replace(f"/{place.probe}", "")


def endpoints(node: Node) -> Iterator[Finding]:
    """Servers that the run asks. Costs nothing: they are asked for their models alone."""
    if node.role == "driver":  # the nodes ask them
        return
    yield from asyncio.run(_ask_all(node))


async def _ask_all(node: Node) -> list[Finding]:
    return await asyncio.gather(*(_ask(node.name, key, endpoint) for key, endpoint in node.endpoints))


class _Server(Connection):
    async def models(self) -> tuple[int, list[str]]:
        """The status of the answer, and the names in it."""
        url = f"{self._endpoint.url}/models"
        async with self._connected().get(url, allow_redirects=False) as response:
            raw, status = await response.read(), response.status
        with contextlib.suppress(ValueError, TypeError, LookupError):
            return status, [self._clean(str(model["id"])) for model in json.loads(raw)["data"]]
        return status, []


async def _ask(node: str, key: str, endpoint: Endpoint) -> Finding:
    server, variable = _Server(endpoint), endpoint.api_key_env
    try:
        if (problem := server.key_problem()) is not None:
            return fail(f"{key}: {problem}", f"set {variable} in the environment of {node}, before Ray starts there")
        failure = await server.look()
        if failure is None:
            status, names = await server.models()
    finally:
        await server.close()
    if failure is not None:
        what = f"{key}: {endpoint.url}: {failure.text}"
        match failure.status:
            case 401 | 403 if variable:
                return fail(what, f"the key is refused: set {variable} on {node} to one that may use {endpoint.model}")
            case 401 | 403:
                return fail(
                    what, f"name the variable that holds the key in {key}.api_key_env, and set it on every node"
                )
            case 0:
                return fail(what, f"start the server, correct {key}.url, or let {node} reach it (DNS, proxy, firewall)")
            case status if 300 <= status < 400:
                return fail(what, f"give the final address in {key}.url: a key does not follow a redirect")
            case _:
                return fail(what, "the server is there and fails: look at its log")
    if names and endpoint.model not in names:
        return warn(
            f"{key}: {endpoint.url} answers, but lists no model {endpoint.model!r}",
            f"correct {key}.model; it lists {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}",
        )
    listed = f"and lists {endpoint.model}" if names else f"but does not list its models (HTTP {status})"
    return ok(f"{key}: {endpoint.url} answers {listed}")


def environment(node: Node) -> Iterator[Finding]:
    """Variables that contradict one another, or are missed."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        if os.environ.get("RAY_AUTH_TOKEN") or file.is_file():
            yield ok("RAY_AUTH_MODE=token, and there is a token")
        else:
            yield fail(
                "RAY_AUTH_MODE=token, but there is no token",
                f"set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token, on {node.name}",
            )
    if node.hub_models:
        from huggingface_hub import get_token

        if get_token() is None:
            yield ok(f"no HF_TOKEN: only public models can be fetched; {', '.join(node.hub_models)} come from the hub")
