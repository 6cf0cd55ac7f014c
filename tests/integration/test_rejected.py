"""Rejected responses of other models than the trained student, on real engines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.config import Decoding, Model
from plad_dist.config_file import load_config
from plad_dist.data.conversation import Conversation
from plad_dist.data.templates import Renderer
from plad_dist.pairing.build import pair_jobs, pair_worker_args
from plad_dist.pairing.worker import PairWorker
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.sampling.backend import Completion
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.job import sample_seed
from tests.conftest import plad, write_config, write_prompts
from tests.in_process import build_in_process
from tests.tiny import TEMPLATE, make_random_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ENGINE = {"max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 27}
SEED = 5


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config of a run whose student changes much in its warm-up."""
    models = {
        role: {"path": str(make_random_model(folder / role, seed)), "template": TEMPLATE}
        for seed, role in enumerate(("teacher", "student"))
    }
    role = {"temperature": 1.0, "max_tokens": 8, "engine": ENGINE}
    phase = {"batch_groups": 32, "max_steps": 4, "optimizer": {"lr": 1e-2}}
    return {
        "run": {"dir": str(folder / "run"), "seed": SEED},
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
            "warmup": phase,
            "round": phase | {"loss": {"name": "dpo"}},
        },
        "evaluation": {"limit": 8, "bootstrap": 100, "candidates": 2, "warmup_temperatures": []},
    }


def read(folder: Path) -> list[dict[str, Any]]:
    tables = [pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("part-*.arrow"))]
    return list(pa.concat_tables(tables).to_pylist())


async def draw(path: Path, prompts: list[dict[str, Any]], max_tokens: int) -> list[Completion]:
    """Return what a model draws with the seeds of the first round's rejected samples."""
    engine = Engine(str(path), Model(path=str(path), template=TEMPLATE), ENGINE, SEED)
    rendered = engine.render([Conversation.from_row(prompt) for prompt in prompts])
    decoding = Decoding(temperature=1.0, max_tokens=max_tokens)
    completions = await asyncio.gather(
        *(
            engine.complete(
                text, decoding, sample_seed(SEED, 0, "student", prompt["prompt_id"], 0), prompt["prompt_id"]
            )
            for text, prompt in zip(rendered, prompts, strict=True)
        )
    )
    await engine.close()
    return list(completions)


def test_rejected_responses_are_those_of_the_named_model_in_the_students_tokens(tmp_path: Path) -> None:
    write_prompts(tmp_path, 120)
    raw, run = config_of(tmp_path), tmp_path / "run"
    raw["sampling"]["rejected"] = {"phase": "student-init"}
    completed = plad("run", str(write_config(tmp_path, raw)), timeout=400, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-4000:]
    prompts = {row["prompt_id"]: row for row in read(run / "prompts")}
    sampled = read(run / "samples/student/round-0")
    raw_student = str(tmp_path / "student")
    assert {(row["role"], row["model"]) for row in sampled} == {("student", raw_student)}
    drawn = asyncio.run(draw(tmp_path / "student", [prompts[row["prompt_id"]] for row in sampled], 8))
    assert [row["text"] for row in sampled] == [completion.text for completion in drawn]
    evaluated = read(run / "eval/round-0/samples/warmup/sampled")
    assert {row["model"] for row in evaluated} == {str(run / "models/warmup")}, "the evaluation samples the warm-up"
    pairs = read(run / "pairs/round-0")
    assert {row["rejected_logprob"] for row in pairs} == {None}, "the starting student did not write them"
    steps = [json.loads(line) for line in (run / "events/round-0/metrics.jsonl").read_text().splitlines()]
    assert not any("sampler_gap_per_token" in step for step in steps)
    assert "the student before its training" in (run / "eval/round-0/report.html").read_text()

    make_random_model(tmp_path / "weak", 7, text="another text with other tokens")
    raw["sampling"]["rejected"] = {"path": str(tmp_path / "weak")}
    raw["run"] |= {"dir": str(tmp_path / "second"), "reuse": str(run)}
    config = load_config(write_config(tmp_path, raw))
    completed = plad("sample", str(tmp_path / "config.yaml"), timeout=200, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-4000:]
    directory = RunDir.of(config)
    worker = PairWorker(*pair_worker_args(config, directory))
    build_in_process(pair_jobs(config, directory), worker, directory.storage, Progress())
    second = tmp_path / "second"
    teacher = "samples/teacher/round-0/part-00000.arrow"
    assert (second / teacher).samefile(run / teacher), "the chosen responses do not depend on the rejected ones"
    sampled = {row["prompt_id"]: row for row in read(second / "samples/student/round-0")}
    assert {(row["role"], row["model"]) for row in sampled.values()} == {("student", str(tmp_path / "weak"))}
    renderer = Renderer(raw_student, Model(path=raw_student, template=TEMPLATE))
    pairs = read(second / "pairs/round-0")
    assert pairs
    for row in pairs:
        assert row["rejected_text"] == sampled[row["prompt_id"]]["text"]
        assert row["rejected_token_ids"] != sampled[row["prompt_id"]]["token_ids"]
        assert renderer.without_end(row["rejected_token_ids"]) == renderer.text_ids([row["rejected_text"]])[0]
