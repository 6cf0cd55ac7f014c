"""Families of models through real engines: vLLM samples and scores them as transformers does, their weights are swapped, and a
run goes from a teacher of one family and tokenizer to a student of another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from plad_dist.config import Decoding, Model
from plad_dist.sampling.backend import Response
from plad_dist.sampling.engine import Engine
from tests.tiny import TEMPLATE, make_random_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NEO = {"model_type": "gpt_neo", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 96, "window_size": 6,
       "attention_types": [[["global", "local"], 1]]}  # fmt: skip
PROMPT, RESPONSE = "larger of 3 and 12", "it is 12, the larger one of the two numbers"


def as_transformers(folder: Path, prompt_ids: list[int], ids: list[int]) -> float:
    """Log-likelihood of a response by a plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logps = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    return float(sum(logps[len(prompt_ids) + place - 1, token] for place, token in enumerate(ids)))


def test_an_engine_tells_of_every_token_while_a_response_is_written(tmp_path: Path) -> None:
    """By which a long response is told from a hung engine."""
    folder = str(make_random_model(tmp_path / "model", max_position_embeddings=4096))

    async def ask() -> tuple[list[int], int]:
        settings = Model(path=folder, template=TEMPLATE)
        engine = Engine(folder, settings, {"kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 8}, 0)
        [prompt] = engine.render([[{"role": "user", "content": PROMPT}]])
        asked = asyncio.create_task(
            engine.complete(prompt, Decoding(temperature=1.0, min_p=0.0, max_tokens=1000), 1, "long")
        )
        seen = []
        while not asked.done():
            await asyncio.sleep(0.02)
            seen.append(engine.tokens)
        await engine.close()
        return seen[:-1], (await asked).num_tokens

    seen, written = asyncio.run(ask())
    assert seen == sorted(seen), "while it is under way"
    assert 0 < max(seen) <= written
    assert len(set(seen)) > 3


def test_gpt_neo_is_sampled_scored_and_swapped_as_transformers_has_it(tmp_path: Path) -> None:
    """vLLM has no GPT-Neo: ours, with a window shorter than the row, against transformers."""
    folders = [make_random_model(tmp_path / str(seed), seed, **NEO) for seed in (1, 2)]

    async def ask() -> list[tuple[Any, Any]]:
        settings = Model(path=str(folders[0]), template=TEMPLATE)
        engine = Engine(str(folders[0]), settings, {"kv_cache_memory_bytes": 1 << 27, "max_num_seqs": 8}, 0)
        [prompt] = engine.render([[{"role": "user", "content": PROMPT}]])
        found = []
        for folder in folders:
            await engine.load_weights(str(folder))
            drawn = await engine.complete(prompt, Decoding(temperature=0.0, max_tokens=12), 0, f"draw-{folder.name}")
            scored = await engine.score(prompt, Response(RESPONSE, [], "stop"), f"score-{folder.name}")
            found.append((drawn, scored))
        await engine.close()
        return [(prompt, *pair) for pair in found]  # type: ignore[misc]

    for folder, (prompt, drawn, scored) in zip(folders, asyncio.run(ask()), strict=True):  # type: ignore[misc]
        assert drawn.logprob == pytest.approx(as_transformers(folder, prompt, list(drawn.token_ids)), rel=1e-4)
        assert scored.logprob == pytest.approx(as_transformers(folder, prompt, list(scored.token_ids)), rel=1e-4)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert written[0, len(prompt) :].tolist()[: len(drawn.token_ids)] == list(drawn.token_ids)
