"""The trainer compared with TRL's CPOTrainer: same hinge, pairs and weights, in one process.

TRL's `CPOConfig(loss_type="hinge", beta=1/margin, cpo_alpha=0)` is the loss `rank` without anchor,
up to the factor `margin`. Both trainers use a random Llama of about 25M parameters with a
vocabulary of 32,000, float32, AdamW, and the same global batch, threads and gradient clipping. Ours
is a complete worker (DeepSpeed ZeRO-3 with one rank, health figures included). TRL's is a complete
`train()` without evaluation and checkpoints. Gradient checkpointing, which TRL enables by default,
is off for both. TRL uses the fastest micro-batch that fits (`--trl-micro-batch`); ours uses its
token budget. The margin is so wide that no pair is satisfied, so no work is skipped. Every step
trains on the same pairs, so losses can be compared step by step.

Two shapes, with varied lengths: `tldr` (prompts of about 380 tokens, responses of about 45) and
`hh` (about 190 and 130). Figures for each shape:

- `speedup_vs_trl`: pairs per second over whole optimizer steps, ours over TRL's. It is the median
  over rounds that alternate the two trainers, without the first step of every run;
- `max_rel_logprob_error`: error of the sequence log-likelihoods of our packed rows, relative to a
  plain float64 forward of each separate sequence;
- `loss_rel_diff_vs_trl`: largest relative difference between our loss of a step and margin times
  TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plad_dist.training.job import PhaseJob

VOCABULARY, EOS, PAIRS, STEPS, MARGIN = 32_000, 2, 8, 2, 500.0
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
# mean and standard deviation of the tokens of prompts, then of responses
SHAPES = {"tldr": (380, 90, 45, 15), "hh": (190, 80, 130, 60)}
LR, BETAS, EPS = 1e-6, (0.9, 0.999), 1e-8
THREADS = os.cpu_count() or 1
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
Row = dict[str, list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096, help="our micro-batch, in tokens")
    parser.add_argument("--trl-micro-batch", type=int, default=4, help="TRL's micro-batch, in pairs")
    arguments = parser.parse_args()
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="plad-training-") as folder:
        model = make_model(Path(folder) / "model")
        start_one_rank()
        for shape in arguments.shapes:
            figures[shape] = measure(
                Path(folder) / shape, model, shape, arguments.rounds, arguments.tokens, arguments.trl_micro_batch
            )
    print(json.dumps(figures))


def measure(
    folder: Path, model: Path, shape: str, rounds: int, tokens: int, trl_micro_batch: int
) -> dict[str, float | int]:
    """Alternate the two trainers on one shape and return the figures."""
    rows = make_pairs(shape)
    systems: dict[str, Callable[[int], tuple[list[float], list[float]]]] = {
        "ours": lambda number: ours(folder / f"run-{number}", model, rows, tokens),
        "trl": lambda number: trl(folder / f"trl-{number}", model, rows, trl_micro_batch),
    }
    rates: dict[str, list[float]] = {name: [] for name in systems}
    losses: dict[str, list[float]] = {}
    for number in range(rounds):
        for name in sorted(systems, reverse=bool(number % 2)):
            seconds, losses[name] = systems[name](number)
            rates[name].append(PAIRS / statistics.median(seconds[1:]))
            print(
                f"{shape}: round {number + 1}: {name}: {rates[name][-1]:.2f} pairs/s, losses {losses[name]}", flush=True
            )
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["trl"], strict=True)]
    return {
        "speedup_vs_trl": round(statistics.median(ratios), 3),
        "max_rel_logprob_error": logprob_error(model, rows),
        "loss_rel_diff_vs_trl": max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["trl"], strict=True)),
        "pairs_per_s": round(statistics.median(rates["ours"]), 3),
        "trl_pairs_per_s": round(statistics.median(rates["trl"]), 3),
        "prompt_tokens": round(statistics.mean(len(row["prompt"]) for row in rows)),
        "threads": THREADS,
        "response_tokens": round(statistics.mean(len(row["chosen"]) + len(row["rejected"]) for row in rows) / 2),
    }


# --- model and pairs


def make_model(folder: Path) -> Path:
    """Write a random Llama with its tokenizer and return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer().save_pretrained(folder)
    arguments: dict[str, Any] = dict(ARCHITECTURE)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        arguments.pop("model_type"),
        **arguments,
        vocab_size=VOCABULARY,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """Return a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(VOCABULARY)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=word(EOS), pad_token=word(0), unk_token=word(0)
    )


def word(token: int) -> str:
    """Return the word of a token, `w17` for 17.

    Special tokens have another form, because the tokenizer also finds them inside words.
    """
    return f"<{token}>" if token in (0, EOS) else f"w{token}"


def make_pairs(shape: str, count: int = PAIRS) -> list[Row]:
    """Return pairs of random tokens with the lengths of a shape."""
    rng = random.Random(1)
    prompt, prompt_spread, response, response_spread = SHAPES[shape]

    def tokens(mean: int, spread: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(max(4, round(rng.gauss(mean, spread))))]

    return [
        {
            "prompt": tokens(prompt, prompt_spread),
            "chosen": [*tokens(response, response_spread), EOS],
            "rejected": [*tokens(response, response_spread), EOS],
        }
        for _ in range(count)
    ]


def start_one_rank(backend: str = "gloo") -> None:
    """Initialise a process group with this process as its only rank, as in a worker."""
    import torch.distributed as dist

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)


# --- the two trainers


def ours(folder: Path, model: Path, rows: list[Row], tokens: int) -> tuple[list[float], list[float]]:
    """Run a worker; return the seconds and losses of its steps."""
    import torch

    torch.set_num_threads(THREADS)
    os.environ |= RANK  # for DeepSpeed only: TRL would assume a launcher and wrap its model
    seconds, records = run_worker(worker_job(folder, model, rows, tokens, STEPS + 1), torch.device("cpu"))
    for name in RANK:
        del os.environ[name]
    return seconds, [record["loss"] for record in records]


def worker_job(folder: Path, model: Path, rows: list[Row], tokens: int, steps: int, **changes: Any) -> PhaseJob:
    """Return a phase in which every step takes all pairs.

    Args:
        changes: job fields that replace the values for one CPU.
    """
    from plad_dist.config import Loss, Model, Optimizer, Phase
    from plad_dist.data.dataset import Dataset
    from plad_dist.data.schemas import PAIRS as SCHEMA
    from plad_dist.data.storage import Storage
    from plad_dist.training.batches.groups import DataSpec
    from plad_dist.training.job import PhaseJob
    from plad_dist.training.model.deepspeed_config import load_deepspeed

    storage = Storage(str(folder))
    pairs = Dataset(storage, "pairs", SCHEMA)
    part, _ = pairs.commit(0, _table(rows), fingerprint="b", attempt="a", counts={"groups": len(rows)})
    pairs.finish(1, fingerprint="b", facts={}, known_parts=[part])
    optimizer = Optimizer(lr=LR, betas=BETAS, eps=EPS, schedule="constant", warmup_share=0.0, clip_norm=1.0)
    loss = Loss(name="rank", margin=MARGIN, mle_weight=0.0)
    job = PhaseJob(
        name="round-0", start=str(model), settings=Model(path=str(model), template="{{ messages }}"),
        phase=Phase(batch_groups=len(rows), optimizer=optimizer, loss=loss),
        data=DataSpec("pairs", "pairs", context=1024), heldout=None, heldout_limit=0,
        seed=1, steps=steps, deepspeed=load_deepspeed("zero3"), dtype="float32",
        micro_batch_tokens=tokens, max_group_tokens=None, row_support="tree",
        attention="auto", lora=None, router_aux_loss=0.0, gradient_checkpointing=False,
        divergence_factor=1e9, trackers=(), storage=storage, checkpoints=storage, staging=None, watch=None,
        fingerprint="b",
    )  # fmt: skip
    return replace(job, **changes)


def run_worker(job: PhaseJob, device: Any) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the seconds and the logged record of each step of a worker."""
    from plad_dist.training.records.metrics_file import read_metrics
    from plad_dist.training.worker.loop import Worker

    worker = Worker(job, device)
    worker.open_data()
    worker.open_log()
    seconds = []
    for _ in range(job.steps):
        started = time.perf_counter()
        worker.train_step()
        seconds.append(time.perf_counter() - started)
    worker.close()
    return seconds, read_metrics(job.folder("events"))[0]


def _table(rows: list[Row]) -> Any:
    import pyarrow as pa

    from plad_dist.data.schemas import PAIRS as SCHEMA

    table = [
        {
            "prompt_id": str(number), "prompt_token_ids": row["prompt"], "chosen_token_ids": row["chosen"],
            "rejected_token_ids": row["rejected"], "chosen_text": "", "rejected_text": "", "round": 0,
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(table, schema=SCHEMA)


def trl(
    folder: Path,
    model: Path,
    rows: list[Row],
    micro_batch: int,
    steps: int = STEPS + 1,
    *,
    gradient_checkpointing: bool = False,
) -> tuple[list[float], list[float]]:
    """Run TRL's trainer, in bfloat16 on a GPU and in float32 on a CPU.

    Returns:
        The seconds of its steps, and its losses times the margin.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.started, self.seconds, self.losses = 0.0, [], []  # type: ignore[var-annotated]

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(MARGIN * float(logs["loss"]))

    # Responses begin with a space to separate their first word from the prompt's last word.
    texts = [
        {side: (" " if side != "prompt" else "") + " ".join(map(word, tokens)) for side, tokens in row.items()}
        for row in rows
    ]
    clock = Clock()
    cuda = torch.cuda.is_available()
    trainer = CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if cuda else torch.float32),
        args=CPOConfig(
            output_dir=str(folder), loss_type="hinge", beta=1 / MARGIN, cpo_alpha=0.0, max_length=1024,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=len(rows) // micro_batch,
            max_steps=steps, learning_rate=LR, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
            weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant", optim="adamw_torch", logging_steps=1,
            logging_strategy="steps", save_strategy="no",
            report_to=[], use_cpu=not cuda, bf16=cuda, gradient_checkpointing=gradient_checkpointing, disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=make_tokenizer(),
        callbacks=[clock],
    )  # fmt: skip
    torch.set_num_threads(THREADS)
    trainer.train()
    return clock.seconds, clock.losses


# --- exactness


def logprob_error(model: Path, rows: list[Row]) -> float:
    """Return the largest error of our packed log-likelihoods.

    The error is relative to a float64 forward of each separate sequence.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from plad_dist.training.batches.micro_batch import single_pair
    from plad_dist.training.batches.packing import collate
    from plad_dist.training.model.attention import attention_of
    from plad_dist.training.model.policy import Policy

    groups = [single_pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    attention = attention_of(AutoConfig.from_pretrained(model), "tree", None)
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation=attention.implementation
    )
    policy = Policy(plain, attention)
    with torch.no_grad():
        packed_S = policy(collate(groups, filler=0, layout=attention.layout)).double()
        exact_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
        expected = []
        for group in groups:
            for response in group.responses:
                ids = torch.tensor([[*group.prompt, *response]])
                logps_TV = exact_model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
                expected.append(logps_TV.gather(1, torch.tensor(response)[:, None]).sum())
    expected_S = torch.stack(expected)
    return float(((packed_S - expected_S) / expected_S).abs().max())


if __name__ == "__main__":
    main()
