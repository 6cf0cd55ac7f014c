"""Small random models of families with and without an encoder, which transformers generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from plad_dist.data.models import model_class
from tests.tiny import make_random_model

POSITIONS = 96
_SMALL = {"d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": POSITIONS},
    ),
    "gpt_neo": (
        "gpt_neo",
        {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "window_size": 8,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": POSITIONS},
    ),
    "t5": ("t5", _SMALL | {"d_ff": 48, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}),
    "bart": (
        "bart",
        _SMALL | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                  "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": POSITIONS},
    ),
}  # fmt: skip


def make_generator(folder: Path, family: str, *, spread: float = 0.4, seed: int = 0) -> Path:
    """Write a random model, whose tokenizer ends whole texts as that of T5 does.

    Args:
        spread: standard deviation of the weights; a large one makes likely and unlikely tokens.
    """
    make_random_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, eos_id)])
    tokenizer.save_pretrained(folder)
    model_type, shape = FAMILIES[family]
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": eos_id, "bos_token_id": eos_id}
    config = AutoConfig.for_model(model_type, **shape | tokens)
    torch.manual_seed(seed)
    model = model_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.normal_(0, spread)
    model.generation_config = GenerationConfig(eos_token_id=eos_id, no_repeat_ngram_size=2, forced_eos_token_id=5)
    model.save_pretrained(folder)
    return folder
