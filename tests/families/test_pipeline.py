"""Tiny models of nine families through the whole pipeline, on the real engines.

Each teacher has a student of another family and tokenizer. The trained student loads in
transformers and in its engine, and generates the same tokens in both.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from plad_dist.config import Decoding, Model
from plad_dist.data.conversation import Conversation
from plad_dist.data.models import model_class
from plad_dist.data.templates import Renderer
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.generation.engine import TransformersEngine
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
    "t5": (
        {"model_type": "t5", "d_model": 64, "d_kv": 32, "d_ff": 96, "num_hidden_layers": 2, "num_decoder_layers": 2},
        370,
    ),
    "falcon_h1": (
        GROUPED
        | {
            "model_type": "falcon_h1",
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
        380,
    ),
    "gpt_oss": (
        GROUPED
        | {
            "model_type": "gpt_oss",
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        390,
    ),
    "qwen3_moe": (
        GROUPED | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        400,
    ),
}
# vLLM lacks T5, and its build for CPUs does not run the others.
BY_TRANSFORMERS = ("t5", "falcon_h1", "gpt_oss")
NAMES = list(FAMILIES)
ENGINE = {"max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 27}


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
    assert abs(first["sampler_gap_per_token"]) < 1e-4, "the trainer and the engine run the same model"

    folder = tmp_path / "run/models/round-0"
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32)
    prompt = Renderer(str(folder), Model(path=str(folder), template=TEMPLATE)).prompt_ids(
        [Conversation([{"role": "user", "content": "larger of 3 and 7"}])]
    )[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "larger of 3 and 7"}]
    assert list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) == prompt
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
    by_transformers = generated[1 if student == "t5" else len(prompt) :]
    by_engine = asyncio.run(_generate(folder, prompt, student))
    assert by_engine[:4] == by_transformers[:4], "the engine and transformers run the same model"


async def _generate(folder: Path, prompt: list[int], family: str) -> list[int]:
    """Return the tokens that the family's engine generates greedily."""
    settings = Model(path=str(folder), template=TEMPLATE)
    engine: Engine | TransformersEngine
    if family in BY_TRANSFORMERS:
        engine = TransformersEngine(str(folder), settings, {})
    else:
        engine = Engine(str(folder), settings, ENGINE, 0)
    completion = await engine.complete(prompt, Decoding(temperature=0.0, max_tokens=8), 0, "a")
    await engine.close()
    return list(completion.token_ids)


def engine_of(family: str) -> dict[str, Any] | str:
    """Return the engine in the config; for T5, the run chooses it."""
    if family == "t5":
        return {}
    return "transformers" if family in BY_TRANSFORMERS else ENGINE


def config_of(folder: Path, teacher: str, student: str) -> dict[str, Any]:
    models = {}
    for seed, (role, family) in enumerate((("teacher", teacher), ("student", student))):
        shape, vocabulary = FAMILIES[family]
        path = make_random_model(folder / role, seed, vocab_size=vocabulary, **shape)
        models[role] = {"path": str(path), "template": TEMPLATE, "max_length": 128}
    sampling = {
        role: {"temperature": 1.0, "max_tokens": 12, "engine": engine_of(family)}
        for role, family in (("teacher", teacher), ("student", student))
    }
    return {
        "run": {"dir": str(folder / "run"), "seed": 5},
        "prompts": {
            "source": {"type": "files", "paths": [str(folder / "prompts.jsonl")], "reference_column": "answer"},
            "heldout_fraction": 0.2,
            "block_size": 32,
        },
        **models,
        "sampling": sampling,
        "pairing": {"truncated_chosen": "keep"},
        "training": {
            "micro_batch_tokens": 512,
            "round": {"batch_groups": 32, "max_steps": 6, "optimizer": {"lr": 1e-3}},
        },
        "evaluation": {"limit": 16, "bootstrap": 100, "candidates": 2, "warmup_temperatures": []},
    }
