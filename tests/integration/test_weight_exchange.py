"""Other weights in a running vLLM engine: right, or found to be wrong before a response is kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from plad_dist.config import Decoding, Model
from plad_dist.data.conversation import Conversation
from plad_dist.sampling import engine as engine_module
from plad_dist.sampling.backend import Completion
from plad_dist.sampling.engine import Engine
from tests.tiny import TEMPLATE, make_random_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = [f"larger of {row} and {row * 7 % 31} is one of the two, which are " * 6 for row in range(4)]


async def greedy_responses(engine: Engine, purpose: str) -> Sequence[Completion]:
    prompts = engine.render([Conversation([{"role": "user", "content": prompt}]) for prompt in PROMPTS])
    decoding = Decoding(temperature=0.0, max_tokens=12)
    requests = (engine.complete(ids, decoding, 0, f"{purpose}-{row}") for row, ids in enumerate(prompts))
    return await asyncio.gather(*requests)


def assert_equal(responses: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [list(response.token_ids) for response in responses] == [list(response.token_ids) for response in expected]
    logprobs = [response.logprob for response in expected]
    assert [response.logprob for response in responses] == pytest.approx(logprobs, rel=1e-5)


def copy_with_one_matrix_of(source: Path, other: Path, folder: Path) -> Path:
    """Write a model with a single matrix of another one."""
    model, donor = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source, other))
    model.model.layers[0].mlp.down_proj.weight.data.copy_(donor.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(folder)
    return folder


async def reload_as_vllm_does(llm: Any, path: str) -> None:
    await llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    await llm.reset_prefix_cache()


def test_exchanged_weights_respond_as_in_a_new_engine_and_wrong_ones_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The output layer is tied to the embeddings, and all prompts are in the prefix cache."""
    first, second = (
        make_random_model(tmp_path / str(seed), seed, num_hidden_layers=2, max_position_embeddings=256)
        for seed in (1, 2)
    )
    mixed = copy_with_one_matrix_of(second, first, tmp_path / "mixed")

    async def change_weights() -> None:
        settings = Model(path=str(first), template=TEMPLATE)
        engine = Engine(str(first), settings, {"kv_cache_memory_bytes": 1 << 27, "max_num_seqs": 8}, 0)
        running = engine._llm
        of_first = await greedy_responses(engine, "first")
        await engine.load_weights(str(second))
        exchanged = await greedy_responses(engine, "second")
        await engine.load_weights(str(first))
        assert_equal(await greedy_responses(engine, "first again"), of_first)
        assert engine._llm is running
        assert warnings_of_ours(caplog) == []

        exchange = engine_module.exchange_weights
        monkeypatch.setattr(engine_module, "exchange_weights", reload_as_vllm_does)
        assert not await engine._exchange(str(first), str(second)), "the earlier output layer passed the check"
        monkeypatch.setattr(engine_module, "exchange_weights", lambda llm, _: exchange(llm, str(mixed)))
        await engine.load_weights(str(second))
        assert engine._llm is not running, "one matrix of another model passed the check"
        assert ["its log-likelihoods were off by" in text for text in warnings_of_ours(caplog)] == [True, True]
        assert_equal(exchanged, await greedy_responses(engine, "new engine"))
        await engine.close()

    with caplog.at_level(logging.WARNING, "plad"):
        asyncio.run(change_weights())


def warnings_of_ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what plad-dist has logged; vLLM logs too."""
    return [record.getMessage() for record in caplog.records if record.name == "plad"]
