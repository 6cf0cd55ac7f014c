"""The engine of transformers compared with vLLM's, on one GPT-Neo in one run.

The model is random, of the size of the quickstart's teacher (`quickstart`, 0.8M parameters) or of
about 30M (`medium`). Both engines get the same requests through the interface that the sampling
actors use: prompts of mixed lengths, temperature 1, a seed per sample, the log-probabilities of the
sampled tokens, and text. Some of the tokens end a response, so outputs have mixed lengths.

Both engines have completed the same work once before. They alternate, with one at work at a time,
and the order reverses every round. `ratio_vs_vllm` is the median over rounds of vLLM's generated
tokens per second over those of transformers: how many times slower transformers is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plad_dist.config import Decoding
    from plad_dist.sampling.backend import Backend

VOCABULARY, POSITIONS, SEED = 2048, 256, 1
SHAPES = {
    "quickstart": {"hidden_size": 128, "intermediate_size": 384, "num_layers": 3, "num_heads": 4},
    "medium": {"hidden_size": 512, "intermediate_size": 2048, "num_layers": 8, "num_heads": 16},
}
MAX_TOKENS, ENDINGS = 96, 40  # a token in fifty ends a response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--model", choices=list(SHAPES), default="quickstart")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=256, help="of both engines")
    arguments = parser.parse_args()
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="plad-engines-") as folder:
        model = make_model(Path(folder), arguments.model)
        figures = asyncio.run(measure(model, arguments.rounds, arguments.prompts, arguments.max_num_seqs))
    print(json.dumps({"model": arguments.model, "max_num_seqs": arguments.max_num_seqs, **figures}))


def make_model(folder: Path, size: str) -> str:
    """Write a random GPT-Neo, some of whose tokens end a response, and return its folder."""
    from transformers import GenerationConfig

    from plad_dist.config import ScratchModel
    from plad_dist.training.model.scratch import random_model, train_tokenizer

    sources = (path.read_text(encoding="utf-8", errors="ignore") for path in Path(os.__file__).parent.glob("*.py"))
    tokenizer = train_tokenizer(sources, VOCABULARY)
    tokenizer.save_pretrained(folder)
    layers = SHAPES[size]["num_layers"]
    attention = [[["global", "local"], layers // 2], *([[["global"], 1]] if layers % 2 else [])]
    architecture = SHAPES[size] | {
        "model_type": "gpt_neo",
        "attention_types": attention,
        "max_position_embeddings": POSITIONS,
    }
    model = random_model(ScratchModel(architecture=architecture, vocab_size=VOCABULARY), tokenizer, SEED)
    endings = [tokenizer.eos_token_id, *random.Random(0).sample(range(300, VOCABULARY), ENDINGS)]
    model.generation_config = GenerationConfig(eos_token_id=endings, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return str(folder)


async def measure(model: str, rounds: int, count: int, batch: int) -> dict[str, Any]:
    """Alternate the engines and return their rates, compared round by round."""
    from plad_dist.config import Decoding, Model
    from plad_dist.sampling.engine_choice import start_engine

    settings, decoding = Model(path=model, template="{{ messages[-1].content }}"), Decoding(max_tokens=MAX_TOKENS)
    arguments: dict[str, dict[str, Any]] = {
        "vllm": {"max_num_seqs": batch, "kv_cache_memory_bytes": 1 << 30, "enable_prefix_caching": False},
        "transformers": {"name": "transformers", "max_num_seqs": batch},
    }
    engines = {name: start_engine(model, settings, engine, SEED) for name, engine in arguments.items()}
    rng = random.Random(0)
    prompts = [[rng.randrange(300, VOCABULARY) for _ in range(rng.randint(4, 48))] for _ in range(count)]
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(1 + rounds):
        for name in sorted(engines, reverse=bool(round_ % 2)):
            tokens, seconds = await respond(engines[name], prompts, decoding, round_)
            if round_:  # the first one warms up
                rates[name].append(tokens / seconds)
                print(f"round {round_}: {name}: {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s", flush=True)
    for backend in engines.values():
        await backend.close()
    ratios = [theirs / ours for theirs, ours in zip(rates["vllm"], rates["transformers"], strict=True)]
    return {
        "ratio_vs_vllm": round(statistics.median(ratios), 2),
        "ratio_vs_vllm_rounds": [round(ratio, 2) for ratio in ratios],
        **{f"{name}_tokens_per_s": round(statistics.median(values)) for name, values in rates.items()},
        "prompts": count,
        "rounds": rounds,
    }


async def respond(engine: Backend, prompts: Sequence[list[int]], decoding: Decoding, round_: int) -> tuple[int, float]:
    """Draw a response to every prompt at once, and return their tokens and the seconds."""
    begun = time.perf_counter()
    requests = (engine.complete(ids, decoding, row, f"{round_}/{row}") for row, ids in enumerate(prompts))
    responses = await asyncio.gather(*requests)
    return sum(response.num_tokens for response in responses), time.perf_counter() - begun


if __name__ == "__main__":
    main()
