"""Promises of the engine of transformers, with small random models on CPUs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from plad_dist.config import Decoding, Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.models import model_class
from plad_dist.errors import UserError
from plad_dist.sampling.backend import Completion, RefusedPromptError, Response
from plad_dist.sampling.generation.engine import TransformersEngine
from plad_dist.sampling.generation.model import GenerativeModel
from tests.tiny import TEMPLATE
from tests.tiny_generators import FAMILIES, POSITIONS, make_generator

PROMPTS = [[10 + number, *range(20, 20 + number * 3 % 17)] for number in range(11)]
# A third of the tokens end a response, so that rows leave their batch at all times.
ENDS = list(range(100, 220))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {family: str(make_generator(root / family, family)) for family in FAMILIES}


def with_engine(
    folder: str,
    use: Callable[[TransformersEngine], Coroutine[Any, Any, Any]],
    *,
    max_length: int | None = None,
    **engine: Any,
) -> Any:
    """Return what a coroutine returns that uses an engine in float64, or as given."""

    async def run() -> Any:
        settings = Model(path=folder, template=TEMPLATE, max_length=max_length)
        started = TransformersEngine(folder, settings, {"name": "transformers", "dtype": "float64", **engine})
        try:
            return await use(started)
        finally:
            await started.close()

    return asyncio.run(run())


async def complete_all(
    engine: TransformersEngine, decoding: Decoding, prompts: Sequence[list[int]] = PROMPTS
) -> list[Completion]:
    requests = (engine.complete(ids, decoding, seed, f"r{seed}") for seed, ids in enumerate(prompts))
    return list(await asyncio.gather(*requests))


async def complete_each(
    engine: TransformersEngine, decoding: Decoding, prompts: Sequence[list[int]] = PROMPTS
) -> list[Completion]:
    return [await engine.complete(ids, decoding, seed, f"r{seed}") for seed, ids in enumerate(prompts)]


def plain_logps(folder: str, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens at each place of a response."""
    config = AutoConfig.from_pretrained(folder)
    model = model_class(config).from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        if config.is_encoder_decoder:
            decoder_ids = torch.tensor([[config.decoder_start_token_id, *response[:-1]]])
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0].log_softmax(-1)
        logits = model(input_ids=torch.tensor([[*prompt, *response[:-1]]])).logits[0]
        return logits[len(prompt) - 1 :].log_softmax(-1)


def plain_logprob(folder: str, prompt: Sequence[int], response: Sequence[int]) -> float:
    logps = plain_logps(folder, prompt, response)
    return float(logps.gather(1, torch.tensor(response)[:, None]).sum())


def assert_equal(responses: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [replace(item, logprob=None) for item in responses] == [replace(item, logprob=None) for item in expected]
    assert [item.logprob for item in responses] == pytest.approx([item.logprob for item in expected], abs=1e-4)


# -- batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_does_not_depend_on_its_batch(folders: dict[str, str], family: str) -> None:
    decoding = Decoding(max_tokens=24, stop_token_ids=ENDS, repetition_penalty=1.2, top_p=0.98)

    async def use(engine: TransformersEngine) -> list[list[Completion]]:
        assert engine._model is not None
        assert (engine._model.mixes_lengths, engine._model._drops_rows) == (True, True)
        return [await complete_all(engine, decoding), await complete_each(engine, decoding)]

    together, alone = with_engine(folders[family], use)
    assert_equal(together, alone)
    assert len({item.num_tokens for item in together}) > 4, "they end at different times"
    assert_equal(with_engine(folders[family], lambda engine: complete_all(engine, decoding), max_num_seqs=3), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logprob_of_a_response_is_that_of_a_forward_pass_and_of_its_score(
    folders: dict[str, str], family: str
) -> None:
    decoding = Decoding(max_tokens=12, temperature=0.6, presence_penalty=0.5, stop_token_ids=ENDS)

    async def use(engine: TransformersEngine) -> list[list[Completion]]:
        drawn = await complete_all(engine, decoding)
        stored = [Response(item.text, item.token_ids, item.finish_reason) for item in drawn]
        pairs = zip(PROMPTS, stored, strict=True)
        return [drawn, await asyncio.gather(*(engine.score(ids, item, "s") for ids, item in pairs))]

    drawn, scored = with_engine(folders[family], use)
    expected = [plain_logprob(folders[family], ids, item.token_ids) for ids, item in zip(PROMPTS, drawn, strict=True)]
    assert [item.logprob for item in drawn] == pytest.approx(expected, abs=1e-3)
    assert [item.logprob for item in scored] == pytest.approx(expected, abs=1e-5)
    assert [item.token_ids for item in scored] == [item.token_ids for item in drawn]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_are_the_likeliest_tokens_whatever_the_generation_config_asks(
    folders: dict[str, str], family: str
) -> None:
    decoding = Decoding(temperature=0.0, max_tokens=10)
    for ids, item in zip(
        PROMPTS, with_engine(folders[family], lambda engine: complete_all(engine, decoding)), strict=True
    ):
        assert plain_logps(folders[family], ids, item.token_ids).argmax(-1).tolist() == item.token_ids


def test_requests_with_other_decodings_have_batches_of_their_own(folders: dict[str, str]) -> None:
    short, long = Decoding(max_tokens=3), Decoding(max_tokens=9, temperature=0.0)

    async def use(engine: TransformersEngine) -> list[Completion]:
        [first, second] = await asyncio.gather(complete_all(engine, short), complete_all(engine, long))
        assert {item.num_tokens for item in first} == {3}
        return second

    expected = with_engine(folders["t5"], lambda engine: complete_all(engine, long))
    assert_equal(with_engine(folders["t5"], use), expected)


def test_a_model_that_cannot_pad_its_prompts_gets_batches_of_equal_lengths(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[set[int]] = []
    generate = GenerativeModel.generate

    def record(self: GenerativeModel, choice: Any, ends: Any) -> None:
        lengths.append({len(row.prompt_ids) for row in choice.rows})
        generate(self, choice, ends)

    # What padding does to a model that does not mask it.
    inputs = GenerativeModel._inputs

    def without_mask(self: GenerativeModel, prompts: Any) -> dict[str, Any]:
        arguments = inputs(self, prompts)
        return arguments | {"attention_mask": torch.ones_like(arguments["attention_mask"])}

    monkeypatch.setattr(GenerativeModel, "generate", record)
    monkeypatch.setattr(GenerativeModel, "_inputs", without_mask)
    decoding = Decoding(max_tokens=12, stop_token_ids=ENDS)

    async def use(engine: TransformersEngine) -> list[list[Completion]]:
        together = await complete_all(engine, decoding, PROMPTS * 2)
        assert all(len(batch) == 1 for batch in lengths)
        assert len(lengths) == len({len(ids) for ids in PROMPTS})
        return [together, await complete_each(engine, decoding, PROMPTS * 2)]

    assert_equal(*with_engine(folders["llama"], use))


def test_rows_stay_in_their_batch_if_the_cache_of_the_model_cannot_drop_them(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(max_tokens=24, stop_token_ids=ENDS)
    expected = with_engine(folders["t5"], lambda engine: complete_all(engine, decoding))

    def refuse(*_: Any) -> dict[str, Any]:
        raise NotImplementedError

    monkeypatch.setattr(GenerativeModel, "_continued", refuse)
    assert_equal(with_engine(folders["t5"], lambda engine: complete_all(engine, decoding)), expected)


# -- the end of a response


def test_a_response_ends_at_an_end_token_which_it_keeps(folders: dict[str, str]) -> None:
    decoding = Decoding(max_tokens=60, stop_token_ids=ENDS, min_tokens=4)
    for item in with_engine(folders["llama"], lambda engine: complete_all(engine, decoding)):
        is_end = [token in ENDS or token == 2 for token in item.token_ids]
        assert not any(is_end[:-1])
        assert len(item.token_ids) > 4
        assert item.finish_reason == ("stop" if is_end[-1] else "length")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_stop_string_ends_a_response_and_is_cut_from_its_text(folders: dict[str, str], family: str) -> None:
    free = Decoding(max_tokens=40)

    async def use(engine: TransformersEngine) -> None:
        [item] = await complete_all(engine, free, PROMPTS[:1])
        at = next(at for at in range(5, len(item.text)) if item.text[at] not in item.text[:at])
        stop = item.text[at - 1 : at + 1]
        [ended] = await complete_all(engine, free.model_copy(update={"stop": ["never", stop]}), PROMPTS[:1])
        assert (ended.text, ended.finish_reason) == (item.text[: at - 1], "stop")
        assert ended.token_ids == item.token_ids[: ended.num_tokens]
        assert ended.logprob == pytest.approx(plain_logprob(folders[family], PROMPTS[0], ended.token_ids), abs=1e-3)
        later = free.model_copy(update={"stop": [stop], "min_tokens": ended.num_tokens})
        [ignored] = await complete_all(engine, later, PROMPTS[:1])
        assert ignored.num_tokens > ended.num_tokens, "it was in the tokens before the least length"

    with_engine(folders[family], use)


def test_a_response_is_cut_where_the_context_ends(folders: dict[str, str]) -> None:
    prompts = [[5] * 90, [5] * 20]
    decoding = Decoding(max_tokens=200, min_tokens=150)
    long, short = with_engine(folders["bart"], lambda engine: complete_all(engine, decoding, prompts))
    assert (long.num_tokens, long.finish_reason) == (POSITIONS - 90, "length")
    assert (short.num_tokens, short.finish_reason) == (POSITIONS - 20, "length")


def test_a_prompt_that_leaves_no_room_is_refused(folders: dict[str, str]) -> None:
    async def use(engine: TransformersEngine) -> None:
        with pytest.raises(RefusedPromptError, match=r"prompt has 30 tokens, which leave no room .* of 30"):
            await engine.complete([5] * 30, Decoding(), 0, "r")
        with pytest.raises(RefusedPromptError, match="no tokens"):
            await engine.complete([], Decoding(), 0, "r")
        stored = Response("", [6] * 11, "stop")
        assert (await engine.score([5] * 20, stored, "s")).logprob is None
        assert (await engine.score([5] * 19, stored, "s")).logprob is not None

    with_engine(folders["t5"], use, max_length=30)


def test_the_text_of_a_response_follows_the_prompt_as_in_vllm(folders: dict[str, str]) -> None:
    async def use(engine: TransformersEngine) -> None:
        [ids] = engine.render([Conversation([{"role": "user", "content": "larger of 1 and 2"}])])
        assert isinstance(ids, list)
        # As the decoder of a tokenizer that marks the beginning of words, such as Llama 2's.
        decode = engine._texts.renderer.decode
        engine._texts.renderer.decode = lambda batch: [text.lstrip() for text in decode(batch)]  # type: ignore[method-assign]
        spaces = engine._texts.renderer.text_ids([" larger"])[0]
        assert decode([spaces]) == [" larger"]
        assert engine._text_of(ids, spaces) == " larger"

    with_engine(folders["llama"], use)


# -- the life of an engine


def test_closing_the_engine_ends_a_running_batch_and_refuses_what_waits(folders: dict[str, str]) -> None:
    decoding = Decoding(max_tokens=100_000, min_tokens=100_000)

    async def use(engine: TransformersEngine) -> None:
        requests = [asyncio.create_task(engine.complete(ids, decoding, 0, "r")) for ids in PROMPTS]
        while not engine.tokens:
            await asyncio.sleep(0.01)
        await engine.close()
        assert engine.dead
        for outcome in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(outcome, RuntimeError)
        with pytest.raises(RuntimeError, match="closed"):
            await engine.complete([5], decoding, 0, "r")

    with_engine(folders["t5"], use, max_num_seqs=4)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("generate")]


def test_a_cancelled_request_leaves_its_batch(folders: dict[str, str]) -> None:
    endless, short = Decoding(max_tokens=100_000, min_tokens=100_000), Decoding(max_tokens=3)

    async def use(engine: TransformersEngine) -> None:
        request = asyncio.create_task(engine.complete([5], endless, 0, "r"))
        while not engine.tokens:
            await asyncio.sleep(0.01)
        request.cancel()
        assert (await engine.complete([6], short, 0, "r")).num_tokens <= 3, "the batch has ended"
        assert engine.tokens == 0

    with_engine(folders["t5"], use)


def test_a_batch_that_lacks_memory_is_generated_in_halves(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, sizes = GenerativeModel.generate, list[int]()
    decoding = Decoding(max_tokens=12, stop_token_ids=ENDS)
    expected = with_engine(folders["llama"], lambda engine: complete_all(engine, decoding))

    def lack_memory(self: GenerativeModel, choice: Any, ends: Any) -> None:
        sizes.append(len(choice.rows))
        if len(choice.rows) > 3:
            raise torch.OutOfMemoryError("too large")
        generate(self, choice, ends)

    monkeypatch.setattr(GenerativeModel, "generate", lack_memory)
    assert_equal(with_engine(folders["llama"], lambda engine: complete_all(engine, decoding)), expected)
    assert sizes[:3] == [11, 6, 3]
    assert sum(size for size in sizes if size <= 3) == 11


def test_an_error_of_the_model_ends_the_engine_with_all_requests(folders: dict[str, str]) -> None:
    async def use(engine: TransformersEngine) -> None:
        beyond = engine.complete([100_000], Decoding(), 0, "r")  # the model has no such token
        other = engine.complete([5], Decoding(temperature=0.5), 0, "r")
        outcomes = await asyncio.gather(beyond, other, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [IndexError, IndexError]
        assert engine.dead

    with_engine(folders["llama"], use)


def test_weights_are_exchanged_by_loading_the_other_folder(folders: dict[str, str], tmp_path: Path) -> None:
    other = str(make_generator(tmp_path / "other", "t5", seed=1))
    decoding = Decoding(max_tokens=8)
    first, second = (
        with_engine(folder, lambda engine: complete_all(engine, decoding)) for folder in (folders["t5"], other)
    )

    async def use(engine: TransformersEngine) -> None:
        assert_equal(await complete_all(engine, decoding), first)
        change = asyncio.create_task(engine.load_weights(other))
        await asyncio.sleep(0)
        assert engine.path is None
        await change
        assert engine.path == other
        assert_equal(await complete_all(engine, decoding), second)
        change = asyncio.create_task(engine.load_weights(folders["t5"]))
        await asyncio.sleep(0)
        change.cancel()
        await engine.load_weights(other)
        assert engine.path == other
        assert_equal(await complete_all(engine, decoding), second)

    with_engine(folders["t5"], use)


def test_a_model_that_scores_with_other_likelihoods_than_it_generates_with_is_refused(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a mixture whose experts take a bounded number of tokens of a forward pass."""
    plain = GenerativeModel._logprobs
    monkeypatch.setattr(GenerativeModel, "_logprobs", lambda self, pairs: [0.9 * p for p in plain(self, pairs)])
    with pytest.raises(UserError, match="cannot be sampled by transformers: a response has the log-likelihood"):
        with_engine(folders["llama"], lambda engine: complete_all(engine, Decoding(max_tokens=2)))


def test_scores_of_a_model_that_sees_padding_have_batches_of_equal_lengths(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sizes = GenerativeModel._logprobs, list[int]()

    def sees_padding(self: GenerativeModel, pairs: Any) -> list[float]:
        sizes.append(len(pairs))
        longest = max(len(prompt) + len(response) for prompt, response in pairs)
        logprobs = zip(pairs, plain(self, pairs), strict=True)
        return [logprob - (longest - len(prompt) - len(response)) for (prompt, response), logprob in logprobs]

    async def use(engine: TransformersEngine) -> list[Completion]:
        sizes.clear()
        responses = [Response("", [5, 6, 7][:length], "length") for length in (1, 2, 3, 2)]
        return list(await asyncio.gather(*(engine.score([5, 6], response, "r") for response in responses)))

    expected = with_engine(folders["llama"], use)
    monkeypatch.setattr(GenerativeModel, "_logprobs", sees_padding)
    assert_equal(with_engine(folders["llama"], use), expected)
    assert sorted(sizes) == [1, 1, 2]


def test_a_score_after_an_empty_prompt_is_refused(folders: dict[str, str]) -> None:
    async def use(engine: TransformersEngine) -> None:
        with pytest.raises(RefusedPromptError, match="no tokens"):
            await engine.score([], Response("", [5], "length"), "r")
        assert not engine.dead

    with_engine(folders["llama"], use)


def test_requests_during_a_change_of_weights_wait_for_it(folders: dict[str, str], tmp_path: Path) -> None:
    other = str(make_generator(tmp_path / "other", "llama", seed=1))

    async def use(engine: TransformersEngine) -> Completion:
        change = asyncio.create_task(engine.load_weights(other))
        while engine._model is not None:
            await asyncio.sleep(0)
        response = await engine.complete([5, 6], Decoding(temperature=0, max_tokens=4), 0, "r")
        await change
        return response

    async def alone(engine: TransformersEngine) -> Completion:
        return await engine.complete([5, 6], Decoding(temperature=0, max_tokens=4), 0, "r")

    assert_equal([with_engine(folders["llama"], use)], [with_engine(other, alone)])


def test_each_token_of_a_long_response_decodes_only_the_end_of_it(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, lengths = TransformersEngine._text_of, list[int]()

    def record(self: TransformersEngine, prompt_ids: Any, token_ids: Any) -> str:
        lengths.append(len(token_ids))
        return plain(self, prompt_ids, token_ids)

    monkeypatch.setattr(TransformersEngine, "_text_of", record)
    decoding = Decoding(max_tokens=60, stop=["never"])
    with_engine(folders["t5"], lambda engine: complete_all(engine, decoding, PROMPTS[:1]))
    assert max(lengths[:-1]) <= len("never") + 8
