"""A fake provider of batches (OpenAI's files and batches) in the test's process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.fake_endpoint import good


class BatchProvider:
    """Provider whose batches end after `polls` looks at them.

    Attributes:
        answer: returns the HTTP status and the body of the answer to a request's body, or None if
            the batch expires before the request is processed.
        refuse: returns the answer to a call instead of carrying it out, None to carry it out.
        ending: returns the status in which the n-th batch ends, from 0.
        answered: number of answers to each prompt, all of which are billed.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], tuple[int, Any] | None] = lambda body: (200, good(prompt_of(body)))
        self.refuse: Callable[[str], web.Response | None] = lambda call: None
        self.ending: Callable[[int], str] = lambda number: "completed"
        self.errors: Any = None
        self.polls = 2
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.answered: Counter[str] = Counter()
        self.calls: list[str] = []
        self.lost_answers: set[str] = set()  # calls that are carried out, but whose answer is an error
        self.submitted_lines: list[int] = []
        self._looks: Counter[str] = Counter()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        parts = request.path.removeprefix("/v1/").split("/")
        call = f"{request.method} {parts[0]}" + (" ID" if len(parts) > 1 else "")
        self.calls.append(call)
        if (refusal := self.refuse(call)) is not None:
            return refusal
        answer = await self._carry_out(request, parts)
        if call in self.lost_answers:
            self.lost_answers.remove(call)
            return web.Response(status=504, text="gateway timeout")
        return answer

    async def _carry_out(self, request: web.Request, parts: list[str]) -> web.Response:
        match request.method, parts:
            case "GET", ["models"]:
                return web.json_response({"data": []})
            case "POST", ["files"]:
                form = await request.post()
                assert form["purpose"] == "batch"
                file_id = f"file-{len(self.files)}"
                self.files[file_id] = form["file"].file.read()  # type: ignore[union-attr]
                return web.json_response({"id": file_id})
            case "GET", ["files", file_id, "content"]:
                return web.Response(body=self.files[file_id])
            case "POST", ["batches"]:
                return web.json_response(self._submit(await request.json()))
            case "GET", ["batches"]:
                return web.json_response(self._page(request.query.get("after")))
            case "GET", ["batches", batch_id]:
                if batch_id not in self.batches:
                    return web.json_response({"error": {"message": "no such batch"}}, status=404)
                return web.json_response(self._look(batch_id))
        return web.Response(status=404)

    def _submit(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["completion_window"] == "24h"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert {line["url"] for line in lines} == {body["endpoint"]}
        self.submitted_lines.append(len(lines))
        batch_id = f"batch-{len(self.batches)}"
        batch = {
            "id": batch_id,
            "status": "in_progress",
            "metadata": body["metadata"],
            "input_file_id": body["input_file_id"],
        }
        self.batches[batch_id] = batch
        return batch

    def _page(self, after: str | None) -> dict[str, Any]:
        """Return a page of one batch, newest first, like OpenAI's of up to a hundred."""
        ids = list(reversed(self.batches))
        start = ids.index(after) + 1 if after else 0
        page = ids[start : start + 1]
        return {
            "data": [self.batches[batch_id] for batch_id in page],
            "has_more": start + 1 < len(ids),
            "last_id": page[-1] if page else None,
        }

    def _look(self, batch_id: str) -> dict[str, Any]:
        batch = self.batches[batch_id]
        self._looks[batch_id] += 1
        if self._looks[batch_id] == self.polls:
            self._end(batch)
        return batch

    def _end(self, batch: dict[str, Any]) -> None:
        batch["status"] = self.ending(int(batch["id"].removeprefix("batch-")))
        if batch["status"] == "failed":
            batch["errors"] = {"data": self.errors}
            return
        output, failed = [], []
        for line in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            answer = self.answer(line["body"])
            result = {"custom_id": line["custom_id"], "response": None, "error": None}
            if answer is None:
                failed.append(result | {"error": {"code": "batch_expired", "message": "too late"}})
                continue
            status, body = answer
            self.answered[prompt_of(line["body"])] += status == 200
            result |= {"response": {"status_code": status, "request_id": "r", "body": body}}
            (output if status == 200 else failed).append(result)
        for name, lines in (("output_file_id", output), ("error_file_id", failed)):
            if lines:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


@asynccontextmanager
async def providing(provider: BatchProvider) -> AsyncIterator[BatchProvider]:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/v1/{path:.*}", provider.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield provider
    finally:
        await runner.cleanup()
