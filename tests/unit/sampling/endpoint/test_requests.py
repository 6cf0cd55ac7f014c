"""The promises of a single request: its body, its completion, its tokens and its cost."""

from __future__ import annotations

from typing import Any

import pytest

from plad_dist.config import Decoding, Endpoint, Model
from plad_dist.data.conversation import Conversation
from plad_dist.sampling.backend import Completion
from plad_dist.sampling.endpoint.backend import EndpointBackend
from tests.fake_endpoint import DECODING, after, client_of, good, messages, run, serving


def test_a_completion_has_its_tokens_and_its_cost() -> None:
    async def test() -> None:
        async with (
            serving(lambda prompt, count: after(0.05, good("héllo"))) as server,
            client_of(server, input_price=1.0, output_price=10.0, spent=3.0) as client,
        ):
            completion = await client.complete(messages("hi"), DECODING, 7)
            assert completion == Completion("héllo", [], 5, None, "stop", prompt_tokens=10, cost=60e-6)
            assert (client.requests, client.retries, client.prompt_tokens, client.completion_tokens) == (1, 0, 10, 5)
            assert client.spent == pytest.approx(3.0 + 60e-6)

    run(test())


def test_a_request_sends_the_decoding_and_no_optional_field_that_is_not_set() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server:
            async with client_of(server) as client:
                await client.complete(messages("hi"), Decoding(temperature=0.5, max_tokens=9), 7)
            assert server.bodies[0] == {
                "model": "m",
                "messages": messages("hi"),
                "max_tokens": 9,
                "temperature": 0.5,
                "top_p": 1.0,
                "n": 1,
                "seed": 7,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            extra = {"seed": None, "max_tokens": None, "max_completion_tokens": 30, "reasoning": {"effort": "low"}}
            async with client_of(server, extra_body=extra) as client:
                await client.complete(messages("hi"), Decoding(top_k=5, min_p=0.1, stop=["\n"]), 7)
            body = server.bodies[1]
            assert body.keys().isdisjoint({"seed", "max_tokens"})
            assert (body["top_k"], body["min_p"], body["stop"], body["reasoning"]) == (
                5,
                0.1,
                ["\n"],
                {"effort": "low"},
            )

    run(test())


def test_a_value_that_the_config_sets_is_sent_even_if_it_is_the_default() -> None:
    """A server applies the generation config of its model to every key that a request lacks."""
    decoding = Decoding(
        top_k=0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.5, repetition_penalty=1.0, min_tokens=2,
        stop_token_ids=[7],
    )  # fmt: skip

    async def test() -> None:
        async with serving(lambda prompt, count: good()) as server, client_of(server) as client:
            await client.complete(messages("hi"), decoding, 7)
            body = server.bodies[0]
            names = ("top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens")
            assert [body[name] for name in names] == [0, 0.0, 0.0, 0.5, 1.0, 2]
            assert body["stop_token_ids"] == [7]

    run(test())


def test_a_rendered_prompt_goes_to_completions() -> None:
    async def test() -> None:
        respond = lambda prompt, count: {"choices": [{"text": f"{prompt}!", "finish_reason": "length"}]}  # noqa: E731
        async with serving(respond) as server, client_of(server, api="completions") as client:
            completion = await client.complete("to render", DECODING, 1)
            assert (completion.text, completion.finish_reason) == ("to render!", "length")

    run(test())


@pytest.mark.parametrize(
    ("reason", "tokens", "expected"),
    [("stop", 5, "stop"), ("length", 20, "length"), (None, 5, "stop"), (None, 20, "length"), ("eos_token", 5, "stop")],
)
def test_a_response_is_either_finished_or_cut(reason: str | None, tokens: int, expected: str) -> None:
    async def test() -> None:
        respond = lambda prompt, count: good(finish_reason=reason, usage=(10, tokens))  # noqa: E731
        async with serving(respond) as server, client_of(server) as client:
            assert (await client.complete(messages("hi"), DECODING, 1)).finish_reason == expected

    run(test())


def test_half_a_character_at_the_end_of_a_response_can_be_stored() -> None:
    async def test() -> None:
        async with serving(lambda prompt, count: good("cut \ud83d")) as server, client_of(server) as client:
            completion = await client.complete(messages("hi"), DECODING, 1)
            assert completion.text.encode() == "cut \ufffd".encode()

    run(test())


@pytest.mark.parametrize("choice", [{"message": {"content": None}}, {"message": {"content": ""}}, {"message": {}}, {}])
@pytest.mark.parametrize(("reason", "expected"), [("stop", "stop"), ("length", "length")])
def test_an_answer_without_text_is_an_answer_and_is_paid_for_once(
    choice: dict[str, Any], reason: str, expected: str
) -> None:
    async def test() -> None:
        usage = {"prompt_tokens": 10, "completion_tokens": 4}
        respond = lambda prompt, count: {"choices": [choice | {"finish_reason": reason}], "usage": usage}  # noqa: E731
        async with serving(respond) as server, client_of(server, input_price=1.0, output_price=10.0) as client:
            completion = await client.complete(messages("hi"), DECODING, 7)
            assert (completion.text, completion.finish_reason, completion.num_tokens) == ("", expected, 4)
            assert completion.cost == pytest.approx(50e-6)
            assert (client.requests, client.retries) == (1, 0)

    run(test())


def test_a_content_in_parts_is_read() -> None:
    async def test() -> None:
        parts = [
            {"type": "thinking", "thinking": [{"type": "text", "text": "let me "}, {"type": "text", "text": "see"}]},
            {"type": "text", "text": "It is "},
            {"type": "output_text", "text": "4."},
        ]
        async with serving(lambda prompt, count: good(parts)) as server, client_of(server) as client:
            completion = await client.complete(messages("hi"), DECODING, 7)
            assert (completion.text, completion.reasoning) == ("It is 4.", "let me see")

    run(test())


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_the_thought_that_a_server_sends_beside_the_answer_is_kept_apart(name: str) -> None:
    async def test() -> None:
        async with (
            serving(lambda prompt, count: good("4", **{name: "2 + 2"})) as server,
            client_of(server) as client,
        ):
            completion = await client.complete(messages("hi"), DECODING, 7)
            assert (completion.text, completion.reasoning) == ("4", "2 + 2")

    run(test())


def test_a_server_gets_calls_with_ids_and_the_arguments_as_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"town": "Graz"}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call, {"function": {"name": "other"}}]}
    settings = Model(endpoint=Endpoint(url="http://host/v1", model="m"))
    answers = [{"role": "tool", "content": "ok"}, {"role": "tool", "content": "grey", "tool_call_id": "c"}]
    ((sent, *sent_answers),) = EndpointBackend(settings, "m", []).render([Conversation([turn, *answers])])
    as_text = {"name": "weather", "arguments": '{"town": "Graz"}'}
    other = {"id": "call_0", "type": "function", "function": {"name": "other", "arguments": "{}"}}
    assert sent == turn | {"tool_calls": [call | {"function": as_text}, other]}
    assert [answer["tool_call_id"] for answer in sent_answers] == ["call_0", "c"]
    assert turn["tool_calls"][0]["function"]["arguments"] == {"town": "Graz"}, "the prompt is unchanged"
