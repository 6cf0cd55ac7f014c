"""The batch interface of an OpenAI-compatible provider: files of requests, batches, and results."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import aiohttp

from plad_dist.config import Endpoint
from plad_dist.sampling.backend import SampleNumber
from plad_dist.sampling.endpoint.connection import Connection
from plad_dist.sampling.endpoint.reply import Failure
from plad_dist.sampling.endpoint.request import CompletionRequest
from plad_dist.untrusted import parse_json

LABEL = "plad"  # name of the token in the metadata of a batch
_PAGE, _MOST_PAGES = 100, 1000
_LONGEST_ID = 512
# Bounds on a file of results. It is not streamed: a token comes without an event of its own.
_BASE_RESULT_BYTES, _RESULT_BYTES_PER_TOKEN = 512 << 20, 256
_UPLOAD_TIMEOUT_S = 1800.0  # the server is silent while it receives a file


class BatchApi:
    """Calls of the batch interface. Each returns its result, or the failure of the call."""

    def __init__(self, endpoint: Endpoint, connection: Connection) -> None:
        self._endpoint, self._connection = endpoint, connection
        self._target = "/v1/chat/completions" if endpoint.api == "chat" else "/v1/completions"

    def line(self, key: SampleNumber, request: CompletionRequest) -> bytes:
        """Return the line of a request in a file of requests."""
        line = {"custom_id": custom_id(key), "method": "POST", "url": self._target, "body": request.body}
        return json.dumps(line).encode() + b"\n"

    async def upload(self, name: str, data: bytes) -> str | Failure:
        """Upload a file of requests and return its id."""

        def form() -> aiohttp.FormData:
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", data, filename=name, content_type="application/jsonl")
            return form

        return _id_of(await self._connection.call("POST", "files", form=form, silence_s=_UPLOAD_TIMEOUT_S))

    async def create(self, file_id: str, token: str) -> str | Failure:
        """Submit a batch and return its id.

        After a failure with unknown usage, the server may have accepted the batch nevertheless.
        """
        body = {
            "input_file_id": file_id,
            "endpoint": self._target,
            "completion_window": self._endpoint.batch_window,
            "metadata": {LABEL: token},
        }
        return _id_of(await self._connection.call("POST", "batches", body=body))

    async def check(self) -> Failure | None:
        """Return why the provider has no batches for this key, None if it lists them."""
        answer = await self._connection.call("GET", "batches", parameters={"limit": "1"})
        return answer if isinstance(answer, Failure) else None

    async def get(self, batch_id: str) -> dict[str, Any] | Failure:
        """Return the state of a batch."""
        return _document(await self._connection.call("GET", f"batches/{batch_id}"))

    async def find(self, token: str, file_id: str) -> str | Failure | None:
        """Return the id of the batch with a token or a file, or None if there is none."""
        parameters = {"limit": str(_PAGE)}
        for _ in range(_MOST_PAGES):
            page = _document(await self._connection.call("GET", "batches", parameters=parameters))
            if isinstance(page, Failure):
                return page
            data = page.get("data")
            batches = [batch for batch in data if isinstance(batch, dict)] if isinstance(data, list) else []
            for batch in batches:
                metadata = batch.get("metadata")
                label = metadata.get(LABEL) if isinstance(metadata, dict) else None
                if label == token or batch.get("input_file_id") == file_id:
                    return _id_in(batch)
            last = page.get("last_id") or (batches[-1].get("id") if batches else None)
            if not page.get("has_more") or not isinstance(last, str) or parameters.get("after") == last:
                return None
            parameters["after"] = last
        return Failure("transient", f"a list of batches without an end: more than {_MOST_PAGES} pages", 200, usage=None)

    async def content(self, file_id: str, requests: Collection[CompletionRequest] = ()) -> bytes | Failure:
        """Return the content of a file of results.

        A file that is larger than the results of these requests can be fails for good.
        """
        tokens = sum(request.most_tokens for request in requests)
        most_bytes = _BASE_RESULT_BYTES + _RESULT_BYTES_PER_TOKEN * tokens
        name = _id_in({"id": file_id})
        if isinstance(name, Failure):
            return name
        return await self._connection.call("GET", f"files/{name}/content", max_bytes=most_bytes)


def custom_id(key: SampleNumber) -> str:
    """Return the name of a request in a batch, which is short because some providers want that."""
    return f"{key[0]}-{key[1]}"


def _document(answer: bytes | Failure) -> dict[str, Any] | Failure:
    if isinstance(answer, Failure):
        return answer
    try:
        document = parse_json(answer)
    except ValueError:
        document = None
    return document if isinstance(document, dict) else Failure("transient", "not a JSON object", 200, usage=None)


def _id_of(answer: bytes | Failure) -> str | Failure:
    document = _document(answer)
    return document if isinstance(document, Failure) else _id_in(document)


def _id_in(document: dict[str, Any]) -> str | Failure:
    """Return the id of a file or batch, which becomes a part of an address."""
    name = document.get("id")
    if (
        isinstance(name, str)
        and len(name) <= _LONGEST_ID
        and re.fullmatch(r"[A-Za-z0-9_.:/~=-]+", name)
        and ".." not in name
    ):
        return name
    return Failure("transient", "an answer without an id, or with one that is no id", 200, usage=None)
