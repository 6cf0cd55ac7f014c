"""Evaluation and report of a run whose responses are committed, without engines."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from plad_dist.catalog import systems_of, trained_systems
from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data.dataset import Dataset
from plad_dist.data.prompts import heldout_prompts, prepare
from plad_dist.data.schemas import SAMPLES
from plad_dist.errors import UserError
from plad_dist.evaluation import stage
from plad_dist.evaluation.document import load_metrics
from plad_dist.evaluation.report.stage import write_report
from plad_dist.evaluation.rounds import continues_after, evaluated_run, last_round
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir, open_run
from plad_dist.systems import PLAD, SEQKD, TEACHER, WARMUP
from tests.conftest import tiny_config, write_prompts

WORDS = {TEACHER: 3, WARMUP: 1, SEQKD: 2, PLAD: 3}  # of the three words of each reference


def write_responses(output: Dataset, prompts: Dataset, words: int, n: int = 1) -> None:
    """Commit responses that begin with the first words of the reference."""
    blocks = len(prompts.require("prepare").parts)
    for block in range(blocks):
        rows = [
            {"prompt_id": prompt["prompt_id"], "sample_index": index, "role": "student",
             "text": " ".join(prompt["reference"].split()[: words + index]), "token_ids": [1], "logprob": -1.0 - index,
             "num_tokens": words + index, "finish_reason": "stop", "error": None, "model": "m", "round": 0}
            for prompt in prompts.read_block(block).to_pylist()
            for index in range(n)
        ]  # fmt: skip
        output.commit(block, pa.Table.from_pylist(rows, schema=SAMPLES), fingerprint="f", attempt="a")
    output.finish(blocks, fingerprint="f", facts={})


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, RunDir]:
    """A run with responses of all systems, evaluated."""
    write_prompts(tmp_path)
    raw = tiny_config(tmp_path)
    raw["evaluation"]["limit"] = 500  # more than there are
    config = parse_config(raw, "test")
    run = open_run(config)
    prepare(config, run.storage)
    prompts = heldout_prompts(run.storage)
    for system in systems_of(config, run):
        for decoding in config.system_decodings(system):
            write_responses(run.system_samples(system, decoding), prompts, WORDS[system])
    write_responses(run.candidates(), prompts, 1, config.candidates)
    for system in trained_systems(config, run):
        write_responses(run.scored("candidates", system), prompts, 1, config.candidates)
    monkeypatch.setattr(stage, "sample_systems", lambda *arguments: None)
    monkeypatch.setattr(stage, "require_model", lambda *arguments: None)
    stage.evaluate(config, run, Progress())
    return config, run


def test_figures_are_written_and_read_by_every_reader(evaluated: tuple[Config, RunDir]) -> None:
    config, run = evaluated
    metrics = load_metrics(run)
    assert metrics is not None
    assert [str(system) for system in metrics.rows_under("greedy")] == ["teacher", "warmup", "seqkd", "plad"]
    assert metrics.calibration is not None
    assert list(metrics.calibration.systems) == [WARMUP, SEQKD, PLAD]
    assert stage.is_evaluated(config, run)
    assert continues_after(config, run)
    assert last_round(config, run).round == 0
    assert evaluated_run(str(run.root))[2] == metrics


def test_the_report_shows_the_committed_figures(evaluated: tuple[Config, RunDir]) -> None:
    config, run = evaluated
    path = write_report(config, run)
    page = Path(path).read_text(encoding="utf-8")
    metrics = load_metrics(run)
    assert metrics is not None
    assert metrics.verdict[0] in page
    assert "Students, held-out prompts" in page


def test_other_settings_of_the_evaluation_require_a_new_evaluation(evaluated: tuple[Config, RunDir]) -> None:
    config, run = evaluated
    evaluation = config.evaluation.model_copy(update={"judge": "rouge_2"})
    changed = config.model_copy(update={"evaluation": evaluation})
    assert not stage.is_evaluated(changed, run)
    with pytest.raises(UserError, match="belongs to other values of the `evaluation` keys; run `plad evaluate` first"):
        write_report(changed, run)


def test_a_round_without_a_clear_gain_is_the_last(evaluated: tuple[Config, RunDir]) -> None:
    config, run = evaluated
    raw = json.loads(run.storage.read(run.metrics) or b"")
    raw["gain_of_round"] = {"value": 0.6, "low": 0.5, "high": 0.7}
    run.storage.replace(run.metrics, json.dumps(raw).encode())
    assert not continues_after(config, run)
    never = config.rounds.model_copy(update={"stop": "never"})
    assert continues_after(config.model_copy(update={"rounds": never}), run)
    assert not continues_after(config, run.at_round(1)), "it is not evaluated"
