"""The trainer on one GPU at realistic student sizes, compared with a padded step and with TRL.

The students are Llama-shaped, with 1B, 3B and 7B parameters, random weights and a vocabulary of
32,000. They train in bfloat16 with gradient checkpointing under ZeRO-3. A student that does not fit
into device memory keeps its optimizer and parameters on the host. The pairs have the two shapes of
:mod:`benchmarks.training`, with more pairs per step. Each measurement runs in its own process.

- `ours`: a complete worker, with packed groups, each prompt computed once, FlexAttention, a chunked
  output layer and health figures;
- `padded`: the same DeepSpeed engine around the unmodified transformers model. Every response is
  computed with its own prompt, so every prompt twice, and all logits are materialised. Pairs are
  sorted by length. A micro-batch takes as many pairs as the token budget holds, padded to the
  longest. Same loss;
- `trl`: TRL's CPOTrainer with the same loss, without DeepSpeed, if TRL is installed.

Figures for every size and shape: pairs and tokens per second, model FLOPs utilisation (6 FLOPs per
parameter and computed token), peak memory, `speedup_vs_padded` and `speedup_vs_trl` (ratios of
pairs per second). A system that fails, such as one that runs out of memory, is reported with its
error. The first two steps of every run are left out.

Without a CUDA device, the benchmark reports that it was skipped. `--smoke` runs everything except
TRL with a tiny model on the CPU, which only shows that the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.training import EOS, MARGIN, RANK, SHAPES, VOCABULARY, Row

# hidden size, intermediate size, layers, heads, key-value heads
SIZES = {
    "tiny": (64, 128, 2, 4, 2),
    "1b": (2048, 5632, 22, 32, 4),
    "3b": (3072, 8192, 28, 24, 8),
    "7b": (4096, 11008, 32, 32, 32),
}
BYTES = 19  # per parameter: weights, gradients, optimizer states, and room for a step's temporaries
WARM, STEPS = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--sizes", nargs="+", default=["1b", "3b", "7b"], choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--systems", nargs="+", default=["ours", "padded", "trl"], choices=["ours", "padded", "trl"])
    parser.add_argument("--pairs", type=int, default=64, help="pairs per step")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens per micro-batch")
    parser.add_argument("--smoke", action="store_true", help="run a tiny model on the CPU")
    parser.add_argument("--one", nargs=3, metavar=("SYSTEM", "SHAPE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--config", default="zero3", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        system, shape, model = arguments.one
        rows = training.make_pairs(shape, arguments.pairs)
        print(json.dumps(measure(system, Path(model), rows, arguments.tokens, arguments.config)))
        return
    if arguments.smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        print(json.dumps({"skipped": "gpu_training: torch sees no CUDA device; run it on a GPU or with --smoke"}))
        return
    if arguments.smoke:
        arguments.sizes, arguments.pairs, arguments.tokens = ["tiny"], 8, 2048
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="plad-gpu-training-") as folder:
            parameters = make_model(Path(folder), size)
            figures[size] = {"parameters": parameters} | {
                shape: compare(folder, parameters, f"{size}: {shape}", shape, arguments) for shape in arguments.shapes
            }
    print(json.dumps(figures))


def compare(model: str, parameters: int, name: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every system on one size and shape, each in its own process."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else parameters * BYTES
    config = "zero3" if parameters * BYTES <= memory else "zero3_offload"
    systems = [name for name in arguments.systems if name != "trl" or (find_spec("trl") and not arguments.smoke)]
    figures: dict[str, Any] = {}
    for system in systems:
        command = [
            sys.executable, "-m", "benchmarks.gpu_training", "--one", system, shape, model,
            "--pairs", str(arguments.pairs), "--tokens", str(arguments.tokens), "--config", config,
        ]  # fmt: skip
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            errors = [line for line in process.stderr.splitlines() if "Error" in line] or ["no error message"]
            figures[system] = {"failed": errors[-1][:300]}
        else:
            figures[system] = json.loads(process.stdout.splitlines()[-1])
        print(f"{name}: {system}: {figures[system]}", flush=True)
    for peer in [name for name in systems if name != "ours"]:
        if "pairs_per_s" in figures.get("ours", {}) and "pairs_per_s" in figures[peer]:
            figures[f"speedup_vs_{peer}"] = round(figures["ours"]["pairs_per_s"] / figures[peer]["pairs_per_s"], 3)
    return figures | {"config": config}


def make_model(folder: Path, size: str) -> int:
    """Write a random Llama with its tokenizer and return its number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        eos_token_id=EOS, pad_token_id=0, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    training.make_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(system: str, model: Path, rows: list[Row], tokens: int, config: str) -> dict[str, Any]:
    """Return the figures of one system."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if system == "trl":
        return _figures(*trl(model, rows, tokens), rows)
    os.environ |= RANK
    training.start_one_rank("nccl" if cuda else "gloo")
    with tempfile.TemporaryDirectory(prefix="plad-gpu-run-") as folder:
        if system == "ours":
            return ours(Path(folder), model, rows, tokens, config, device)
        return _figures(*padded(model, rows, tokens, config, device), rows)


def _figures(seconds: list[float], computed: int, rows: list[Row]) -> dict[str, Any]:
    """Return rates and peak memory.

    Args:
        computed: tokens of a step, without padding.
    """
    import torch

    step_seconds = statistics.median(seconds[WARM:])
    figures: dict[str, Any] = {
        "pairs_per_s": round(len(rows) / step_seconds, 3),
        "tokens_per_s": round(computed / step_seconds),
    }
    if torch.cuda.is_available():
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        figures["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return figures


def ours(folder: Path, model: Path, rows: list[Row], tokens: int, config: str, device: Any) -> dict[str, Any]:
    """Return the figures of a complete worker."""
    from plad_dist.training.model.deepspeed_config import load_deepspeed

    dtype = "bfloat16" if device.type == "cuda" else "float32"
    job = training.worker_job(
        folder, model, rows, tokens, WARM + STEPS,
        deepspeed=load_deepspeed(config), dtype=dtype, gradient_checkpointing=True,
    )  # fmt: skip
    seconds, records = training.run_worker(job, device)
    computed = statistics.median(record["tokens_per_s"] * record["seconds"] for record in records)
    figures = _figures(seconds, round(computed), rows)
    utilisations = [
        record["model_flops_utilisation"] for record in records[WARM:] if "model_flops_utilisation" in record
    ]
    return figures | ({"mfu": round(statistics.median(utilisations), 4)} if utilisations else {})


def padded(model: Path, rows: list[Row], tokens: int, config: str, device: Any) -> tuple[list[float], int]:
    """Train separate padded sequences with all logits; return step seconds and computed tokens."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from plad_dist.config import Optimizer
    from plad_dist.training.model.deepspeed_config import load_deepspeed
    from plad_dist.training.model.engine import engine_config

    half = device.type == "cuda"
    optimizer = Optimizer(lr=training.LR, schedule="constant", warmup_share=0.0, clip_norm=1.0)
    settings = engine_config(load_deepspeed(config), optimizer, 1, half=half)
    partition_at_load = HfDeepSpeedConfig(settings)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if half else torch.float32)
    del partition_at_load
    student.config.use_cache = False
    student.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(model=student, config=settings, model_parameters=list(student.parameters()))
    pairs = sorted(rows, key=lambda row: len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])))
    batches: list[list[Row]] = [[]]
    for row in reversed(pairs):  # the longest first, with as many shorter ones as fit
        if batches[-1] and 2 * (len(batches[-1]) + 1) * _longest(batches[-1]) > tokens:
            batches.append([])
        batches[-1].append(row)
    seconds = []
    for _ in range(WARM + STEPS):
        started = time.perf_counter()
        for number, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            ids, mask, in_response = (tensor.to(device) for tensor in _pad(batch))
            logits = engine(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            chosen, rejected = (logps * in_response[:, 1:]).sum(1).chunk(2)
            engine.backward((MARGIN + rejected - chosen).relu().sum() / len(rows))
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    computed = sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows)
    return seconds, computed


def _longest(batch: list[Row]) -> int:
    return max(len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) for row in batch)


def _pad(batch: list[Row]) -> tuple[Any, Any, Any]:
    """Return token ids, attention mask and response mask: chosen responses, then rejected ones."""
    import torch

    sequences = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in batch]
    width = _longest(batch)
    ids, mask, in_response = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(3))
    for number, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[number, :end] = torch.tensor([*prompt, *response])
        mask[number, :end] = 1
        in_response[number, len(prompt) : end] = 1
    return ids, mask, in_response


def trl(model: Path, rows: list[Row], tokens: int) -> tuple[list[float], int]:
    """Run TRL's trainer with the same token budget; return step seconds and computed tokens."""
    longest = _longest(rows)
    micro_batch = max(size for size in (1, 2, 4, 8, 16, 32, 64) if size == 1 or 2 * size * longest <= tokens)
    with tempfile.TemporaryDirectory(prefix="plad-gpu-trl-") as folder:
        seconds, _ = training.trl(
            Path(folder), model, rows, micro_batch, steps=WARM + STEPS, gradient_checkpointing=True
        )
    return seconds, sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows)


if __name__ == "__main__":
    main()
