"""Thoughts in the responses of servers, and the variables of their chat templates."""

from __future__ import annotations

from typing import Any

import pytest

from plad_dist.config import Endpoint, Model
from plad_dist.data.conversation import Conversation
from plad_dist.sampling.backend import Completion, RefusedPromptError
from plad_dist.sampling.endpoint.backend import EndpointBackend
from tests.fake_endpoint import DECODING, FakeServer, good, run, serving

PROMPT = Conversation([{"role": "user", "content": "2 + 2"}])


def backend_of(server: FakeServer, api: str = "chat", **settings: Any) -> EndpointBackend:
    return EndpointBackend(Model(endpoint=Endpoint(url=server.url, model="m", api=api), **settings), "m", [])


async def ask(backend: EndpointBackend) -> Completion:
    try:
        [prompt] = backend.render([PROMPT])
        return await backend.complete(prompt, DECODING, 7, "r")
    finally:
        await backend.close()


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (good("4", reasoning_content="I add."), ("4", "I add.", "stop")),
        (good("<think>I add.</think> 4"), ("4", "I add.", "stop")),
        (good("I add.</think>4"), ("4", "I add.", "stop")),
        (good("<think>I add"), ("", "I add", "length")),
        (good("4"), ("4", None, "stop")),
    ],
)
def test_answer_and_thought_of_a_server_are_stored_apart(reply: Any, expected: tuple[str, str | None, str]) -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: reply) as server:
            completion = await ask(backend_of(server))
            assert (completion.text, completion.reasoning, completion.finish_reason) == expected
            assert completion.cost == 0.0

    run(test())


def test_a_refused_thought_says_what_to_set_and_keeps_its_cost() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good("4", reasoning_content="I add.")) as server:
            endpoint = Endpoint(url=server.url, model="m", input_price=1.0, output_price=1.0)
            backend = EndpointBackend(Model(endpoint=endpoint, reasoning="refuse"), "m", [])
            with pytest.raises(RefusedPromptError, match=r"`reasoning: strip` or `keep`, .*template_kwargs") as refusal:
                await ask(backend)
            assert refusal.value.cost > 0

    run(test())


def test_template_kwargs_are_sent_to_the_chat_template_of_a_server() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good("4")) as server:
            await ask(backend_of(server, template_kwargs={"enable_thinking": False}))
            await ask(backend_of(server))
            sent = [body.get("chat_template_kwargs") for body in server.bodies]
            assert sent == [{"enable_thinking": False}, None]

    run(test())
