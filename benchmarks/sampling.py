"""The sampling pool compared with bare vLLM and with Ray Data LLM, on one model in one run.

The model is a random Llama of about 30M parameters. 240 of its 16,384 tokens end a response, so
outputs have mixed lengths (at most 128 tokens). All systems get the same prompts of mixed lengths,
the same engine arguments and the same sampling parameters: temperature 1, a seed per sample, the
log-probabilities of the sampled tokens, and text.

- `vllm`: `vllm.LLM.generate` over all prompts at once, given as token ids; the engine alone;
- `pool`: this project's fleet, with one actor that runs vLLM's async engine. The driver leases the
  blocks. The actor reads prompts from Arrow parts, renders and tokenizes them, and commits samples
  as parts. The journal and the manifest are included;
- `ray_data`: `ray.data.llm.build_processor` with one engine over the same rows as token ids. Batch
  size times concurrent batches is well above the engine's `max_num_seqs`, as its documentation
  advises.

The time covers sampling alone: from a running engine to the last sample at the caller (for the
pool: to the manifest). Bare vLLM and the pool keep an engine that has completed the same work once
before. The pool samples one dataset per round, which its actor starts on a signal. Ray Data starts
a new engine every round. Its clock starts with its first request, derived from the times that it
reports for its rows, so earlier work is left out.

The systems alternate, with one engine at work at a time. A pause lets the previous system finish,
and the order reverses every round. The speed of a shared machine changes within minutes by more
than the systems differ.

`ratio_vs_vllm` and `ratio_vs_ray_data` compare the generated tokens per second within a round. Both
are medians over rounds. `tokens_per_s` is the pool's median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plad_dist.fleet.protocol import BlockResult, Hints
    from plad_dist.sampling.job import SamplingJob

PROMPTS, BLOCK, MAX_TOKENS, ENDINGS = 256, 32, 128, 240
ENGINE: dict[str, Any] = {
    "max_num_seqs": 64,
    "dtype": "float32",
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,  # every round samples the same prompts
    "max_num_batched_tokens": 16_384,
    "kv_cache_memory_bytes": 1 << 30,
    "max_model_len": 512,
}
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VOCABULARY = 16_384
SEED, ROUND, PAUSE_S = 1, 0, 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--without", action="append", default=[], choices=["vllm", "ray_data"], help="leave out a peer")
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",  # all systems at one priority; Ray's workers are nice by default
    }
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory(prefix="plad-sampling-") as folder:
        figures = measure(Path(folder), arguments.rounds, arguments.prompts, set(arguments.without))
    print(json.dumps(figures))


def measure(folder: Path, rounds: int, count: int, without: set[str]) -> dict[str, Any]:
    """Alternate the systems and return their rates, compared round by round."""
    texts = corpus(count)
    model = make_model(folder / "model", texts)
    work = Work(folder, model, texts)
    systems: dict[str, Callable[[], tuple[int, float]]] = {
        "vllm": bare(work) if "vllm" not in without else lambda: (0, 1.0),
        "pool": Pool(work, rounds),
        "ray_data": partial(ray_data, work),
    }
    rates: dict[str, list[float]] = {name: [] for name in systems if name not in without}
    for round_ in range(rounds):
        for name in sorted(rates, reverse=bool(round_ % 2)):
            time.sleep(PAUSE_S)
            tokens, seconds = systems[name]()
            rates[name].append(tokens / seconds)
            print(
                f"round {round_ + 1}: {name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s",
                flush=True,
            )
    figures: dict[str, Any] = {"tokens_per_s": round(statistics.median(rates["pool"]), 1)}
    for peer, key in (("vllm", "ratio_vs_vllm"), ("ray_data", "ratio_vs_ray_data")):
        if peer in rates:
            ratios = [ours / theirs for ours, theirs in zip(rates["pool"], rates[peer], strict=True)]
            figures |= {
                key: round(statistics.median(ratios), 3),
                f"{key}_rounds": [round(ratio, 3) for ratio in ratios],
            }
            figures[f"{peer}_tokens_per_s"] = round(statistics.median(rates[peer]), 1)
    return figures | {"prompts": count, "rounds": rounds, "parameters": work.parameters}


# --- model and work


def corpus(count: int) -> list[str]:
    """Return prompts of mixed lengths, built from source lines of the standard library."""
    rng = random.Random(0)
    lines = [
        line.strip()
        for path in sorted(Path(os.__file__).parent.glob("*.py"))
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        if line.strip()
    ]
    return ["\n".join(lines[at : at + rng.randint(1, 8)]) for at in rng.sample(range(len(lines) - 8), count)]


def make_model(folder: Path, texts: list[str]) -> Path:
    """Write a random Llama, many of whose tokens end a response, and return its folder."""
    from transformers import GenerationConfig

    from plad_dist.config import ScratchModel
    from plad_dist.training.model.scratch import random_model, train_tokenizer

    sources = (path.read_text(encoding="utf-8", errors="ignore") for path in Path(os.__file__).parent.glob("*.py"))
    tokenizer = train_tokenizer(sources, VOCABULARY)
    tokenizer.save_pretrained(folder)
    model = random_model(ScratchModel(architecture=ARCHITECTURE, vocab_size=VOCABULARY), tokenizer, SEED)
    endings = [tokenizer.eos_token_id, *random.Random(0).sample(range(300, VOCABULARY), ENDINGS)]
    model.generation_config = GenerationConfig(eos_token_id=endings, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return folder


class Work:
    """Model, prompts and sampling parameters that all systems share."""

    def __init__(self, folder: Path, model: Path, texts: list[str]) -> None:
        import pyarrow as pa
        from safetensors import safe_open

        from plad_dist.config import Decoding, Model
        from plad_dist.data.conversation import Conversation
        from plad_dist.data.dataset import Dataset
        from plad_dist.data.schemas import PROMPTS as SCHEMA
        from plad_dist.data.storage import Storage
        from plad_dist.data.templates import Renderer
        from plad_dist.sampling.job import sample_seed

        self.folder, self.model = folder, model
        self.settings = Model(
            path=str(model), template="{{ messages[-1].content }}", max_length=ENGINE["max_model_len"]
        )
        self.decoding = Decoding(max_tokens=MAX_TOKENS)
        conversations = [Conversation([{"role": "user", "content": text}]) for text in texts]
        rows = [{"prompt_id": f"{row:08d}", **prompt.to_row()} for row, prompt in enumerate(conversations)]
        self.ids = Renderer(str(model), self.settings).prompt_ids(conversations)
        self.seeds = [sample_seed(SEED, ROUND, "teacher", str(row["prompt_id"]), 0) for row in rows]
        self.storage = Storage(str(folder / "run"))
        prompts = Dataset(self.storage, "prompts", SCHEMA)
        blocks = range(0, len(rows), BLOCK)
        for block, start in enumerate(blocks):
            table = pa.Table.from_pylist(rows[start : start + BLOCK], schema=SCHEMA)
            prompts.commit(block, table, fingerprint="benchmark", attempt="a")
        self.blocks = prompts.finish(len(blocks), fingerprint="benchmark", facts={}).parts
        with safe_open(model / "model.safetensors", "pt") as file:
            self.parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping

    def sampling_params(self, row: int) -> dict[str, Any]:
        return {"temperature": 1.0, "max_tokens": MAX_TOKENS, "seed": self.seeds[row], "logprobs": 0}


# --- the three systems


def bare(work: Work) -> Callable[[], tuple[int, float]]:
    """Return a function that samples all prompts at once with vLLM alone, after a warm-up."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(work.model), disable_log_stats=True, **ENGINE)
    prompts = [{"prompt_token_ids": ids} for ids in work.ids]
    parameters = [SamplingParams(**work.sampling_params(row)) for row in range(len(prompts))]

    def ask() -> tuple[int, float]:
        begun = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return sum(len(output.outputs[0].token_ids) for output in outputs), seconds

    ask()  # warm-up
    return ask


class Pool:
    """This project's fleet with one running actor, which samples one dataset per call."""

    def __init__(self, work: Work, runs: int) -> None:
        from plad_dist.config_file import parse_config
        from plad_dist.fleet.driver import run_fleets
        from plad_dist.fleet.fleet import Assignment, Fleet
        from plad_dist.fleet.placement import Placement
        from plad_dist.progress import Progress
        from plad_dist.sampling.actor import Sampler
        from plad_dist.sampling.engine import Engine
        from plad_dist.sampling.engine_placement import window_for
        from plad_dist.sampling.job import SamplingJob

        class Gated(Sampler):
            """Sampler that starts a dataset only after its release."""

            async def work(self, job: SamplingJob, block: int, attempt: str, hints: Hints) -> BlockResult:
                while not gate(work, job.output).exists():
                    await asyncio.sleep(0.05)
                return await super().work(job, block, attempt, hints)

        model = {"path": str(work.model)}
        source = {"type": "files", "paths": ["-"], "reference_column": "reference"}
        sections = {"run": {"dir": "-"}, "prompts": {"source": source}, "teacher": model, "student": model}
        config = parse_config(sections | {"sampling": {"stall_timeout_s": 1e6, "lease_timeout_s": 1e6}}, "benchmark")
        self.work, self.begun = work, 0
        self.jobs = [
            SamplingJob(
                prompts="prompts", output=f"samples/{run}", role="teacher", model="m", weights=str(work.model),
                decoding=work.decoding, n=1, seed=SEED, round=ROUND, seed_round=ROUND, fingerprint="benchmark",
            )
            for run in range(1 + runs)
        ]  # fmt: skip
        units = [part.rows for part in work.blocks]
        environment = ("VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
        fleet = Fleet(
            "pool",
            tuple(Assignment(job, range(len(units)), units) for job in self.jobs),
            Gated,
            (work.storage, partial(Engine, str(work.model), work.settings, ENGINE, SEED)),
            Placement(1.0),
            environment={name: os.environ[name] for name in environment},
            window=window_for(ENGINE["max_num_seqs"], BLOCK, config.sampling.window),
        )
        drive = partial(run_fleets, config, work.storage, [fleet], Progress(every_s=1e9))
        self.driver = threading.Thread(target=drive, daemon=True)
        self.driver.start()
        self()  # warm-up

    def __call__(self) -> tuple[int, float]:
        """Sample the next dataset; the time runs from its release to its manifest."""
        job, self.begun = self.jobs[self.begun], self.begun + 1
        folder = self.work.folder / "run" / job.output
        begun = time.time()
        gate(self.work, job.output).touch()
        while not (folder / "manifest.json").exists():
            if not self.driver.is_alive() and not (folder / "manifest.json").exists():
                raise SystemExit("pool: the fleet ended before the dataset was complete; see the error above")
            time.sleep(0.1)
        manifest = job.dataset(self.work.storage).require("sample")
        assert manifest.rows == len(self.work.ids)
        assert not manifest.count("errors")
        return manifest.count("tokens"), (folder / "manifest.json").stat().st_mtime - begun


def gate(work: Work, output: str) -> Path:
    """Return the path of the file that releases a dataset."""
    return work.folder / f"{Path(output).name}.go"


def ray_data(work: Work) -> tuple[int, float]:
    """Sample with Ray Data LLM and one engine; time from the first request to the last row."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.data.DataContext.get_current().enable_progress_bars = False
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(work.model),
            engine_kwargs=dict(ENGINE),  # a copy, because the processor adds to it
            batch_size=64,
            max_concurrent_batches=8,
            concurrency=1,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
            placement_group_config={"bundles": [{"CPU": 1}]},  # the default waits for a GPU
            runtime_env={
                "env_vars": {name: os.environ[name] for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")}
            },
        ),
        preprocess=lambda row: {
            "tokenized_prompt": row["ids"],
            "sampling_params": row["sampling_params"],
        },
        postprocess=lambda row: {
            "tokens": row["num_generated_tokens"],
            "took": row["time_taken_llm"],
            "at": time.time(),
        },
    )
    rows = [{"ids": ids, "sampling_params": work.sampling_params(row)} for row, ids in enumerate(work.ids)]
    done = processor(ray.data.from_items(rows)).take_all()
    assert len(done) == len(rows)
    begun, ended = min(row["at"] - row["took"] for row in done), max(row["at"] for row in done)
    return sum(row["tokens"] for row in done), ended - begun


if __name__ == "__main__":
    main()
