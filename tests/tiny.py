"""Small random models and a config that samples them, for tests and benchmarks of sampling."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from plad_dist.config import ScratchModel
from plad_dist.data.models import MARKER
from plad_dist.data.schemas import PROMPTS
from plad_dist.training.model.scratch import make_model

TEMPLATE = "{{ messages[-1].content }} ="
SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,  # of width 32, the smallest that vLLM's CPU attention supports
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def make_random_model(
    folder: Path, seed: int = 0, vocab_size: int = 320, text: str = "larger of 1 and 2 is 30 4 5 6 7 8 9", **shape: Any
) -> Path:
    """Write a model with random weights, whose responses rarely end before the token limit.

    Args:
        text: text from which the tokenizer learns its tokens.
    """
    rows = [{"prompt_id": "0", "messages": [{"role": "user", "content": text}]}]
    scratch = ScratchModel(architecture=SHAPE | shape, vocab_size=vocab_size)
    make_model(scratch, pa.Table.from_pylist(rows, schema=PROMPTS), "random", seed, folder)
    (folder / MARKER).unlink()  # a pretrained model has none
    return folder


def sampling_config(folder: Path, prompts: int, *, block_size: int = 16, max_tokens: int = 16) -> dict[str, Any]:
    """Return the config of a run that can only sample: two random models and numbered prompts."""
    with (folder / "prompts.jsonl").open("w") as file:
        for row in range(prompts):
            file.write(json.dumps({"prompt": f"larger of {row} and {row * 7 % 31}", "answer": f"it is {row}"}) + "\n")
    role = {
        "temperature": 1.0,
        "max_tokens": max_tokens,
        "engine": {"max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 27},
    }
    return {
        "run": {"dir": str(folder / "run"), "seed": 5},
        "prompts": {
            "source": {"type": "files", "paths": [str(folder / "prompts.jsonl")], "reference_column": "answer"},
            "heldout_fraction": 0.02,
            "block_size": block_size,
        },
        "teacher": {"path": str(make_random_model(folder / "teacher", 1)), "template": TEMPLATE},
        "student": {"path": str(make_random_model(folder / "student", 2)), "template": TEMPLATE},
        "sampling": {"teacher": role, "student": role, "window": 2},
        "evaluation": {"limit": 8},
    }


def make_chain_model(folder: Path, response: Sequence[str], prompt_end: str, *, added: Sequence[str] = ()) -> Path:
    """Write a model that always responds with the same tokens, and then ends.

    Its layers add nothing, so that the next token depends on the last one alone.

    Args:
        response: tokens, all of them different.
        prompt_end: token with which every prompt ends.
        added: tokens to add to the vocabulary.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_random_model(folder, tie_word_embeddings=False, hidden_size=384, num_attention_heads=12, head_dim=32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    chain = tokenizer.convert_tokens_to_ids([prompt_end, *response, tokenizer.eos_token])
    assert None not in chain
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        embeddings = torch.eye(len(tokenizer), model.config.hidden_size)
        model.get_input_embeddings().weight.copy_(embeddings)
        for token, following in itertools.pairwise(chain):
            model.get_output_embeddings().weight[following] = embeddings[token] * 10
    model.save_pretrained(folder)
    return folder
