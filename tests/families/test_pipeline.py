"""Tiny models of five families through the whole pipeline, on the real engines.

Each teacher has a student of another family and tokenizer. The trained student loads in
transformers and in vLLM, and generates the same tokens in both.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plad_dist.config import Decoding, Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.templates import Renderer
from plad_dist.sampling.engine import Engine
from tests.conftest import plad, write_config, write_prompts
from tests.tiny import TEMPLATE, make_random_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = WIDE | {"num_key_value_heads": 1, "head_dim": 32}
# Architecture and vocabulary size by family. Different sizes give different tokenizers.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (WIDE | {"model_type": "llama"}, 320),
    "qwen3": (GROUPED | {"model_type": "qwen3"}, 340),
    "gemma3": (
        GROUPED
        | {
            "model_type": "gemma3_text",
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        },
        360,
    ),
    "gpt_neo": (
        WIDE | {"model_type": "gpt_neo", "attention_types": [[["global", "local"], 1]], "window_size": 64},
        330,
    ),
    "opt": (WIDE | {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64}, 350),
}
NAMES = list(FAMILIES)


@pytest.mark.parametrize(("teacher", "student"), list(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)))
def test_a_teacher_of_one_family_distils_into_a_student_of_another(tmp_path: Path, teacher: str, student: str) -> None:
    write_prompts(tmp_path, 120)
    raw = config_of(tmp_path, teacher, student)
    completed = plad("run", str(write_config(tmp_path, raw)), timeout=800, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-4000:]
    metrics = json.loads((tmp_path / "run/eval/round-0/metrics.json").read_text())
    assert {row["system"] for row in metrics["systems"]} == {"teacher", "warmup", "plad"}
    rows = [json.loads(line) for line in (tmp_path / "run/events/round-0/metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "loss" in row)
    assert abs(first["sampler_gap_per_token"]) < 0.01, "the trainer and vLLM run the same model"

    folder = tmp_path / "run/models/round-0"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = Renderer(str(folder), Model(path=str(folder), template=TEMPLATE)).prompt_ids(
        [Conversation([{"role": "user", "content": "larger of 3 and 7"}])]
    )[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "larger of 3 and 7"}]
    assert list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) == prompt
    by_transformers = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    by_vllm = asyncio.run(_generate(folder, prompt))
    assert by_vllm[:4] == by_transformers[:4], "vLLM and transformers run the same model"


async def _generate(folder: Path, prompt: list[int]) -> list[int]:
    """Return the tokens that vLLM generates greedily."""
    engine = Engine(
        str(folder),
        Model(path=str(folder), template=TEMPLATE),
        {"kv_cache_memory_bytes": 1 << 27, "max_num_seqs": 4},
        0,
    )
    completion = await engine.complete(prompt, Decoding(temperature=0.0, max_tokens=8), 0, "a")
    await engine.close()
    return list(completion.token_ids)


def config_of(folder: Path, teacher: str, student: str) -> dict[str, Any]:
    engine = {"max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 27}
    models = {}
    for seed, (role, family) in enumerate((("teacher", teacher), ("student", student))):
        shape, vocabulary = FAMILIES[family]
        path = make_random_model(folder / role, seed, vocab_size=vocabulary, **shape)
        models[role] = {"path": str(path), "template": TEMPLATE}
    role = {"temperature": 1.0, "max_tokens": 12, "engine": engine}
    return {
        "run": {"dir": str(folder / "run"), "seed": 5},
        "prompts": {
            "source": {"type": "files", "paths": [str(folder / "prompts.jsonl")], "reference_column": "answer"},
            "heldout_fraction": 0.2,
            "block_size": 32,
        },
        **models,
        "sampling": {"teacher": role, "student": role},
        "pairing": {"truncated_chosen": "keep"},
        "training": {
            "micro_batch_tokens": 512,
            "round": {"batch_groups": 32, "max_steps": 6, "optimizer": {"lr": 1e-3}},
        },
        "evaluation": {"limit": 16, "bootstrap": 100, "candidates": 2, "warmup_temperatures": []},
    }
