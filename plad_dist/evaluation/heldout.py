"""Committed results on the held-out prompts: responses, candidates, rankings of the pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from plad_dist import phases
from plad_dist.catalog import trained_systems
from plad_dist.config import Config
from plad_dist.config.evaluation import REFERENCE_JUDGES
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import model_marker
from plad_dist.data.prompts import heldout_prompts, rows_by_block
from plad_dist.errors import RunFailed
from plad_dist.evaluation.document import HeldoutFigures, Ranking
from plad_dist.evaluation.scores import Candidates, score_system
from plad_dist.rundir import RunDir
from plad_dist.systems import PLAD, WARMUP, System
from plad_dist.text_metrics import Output, Scores
from plad_dist.training.records.metrics_file import read_metrics


def evaluated_prompts(config: Config, run: RunDir) -> pa.Table:
    """Return the held-out prompts that all systems responded to, in the order of the responses."""
    prompts = heldout_prompts(run.storage)
    rows = rows_by_block(prompts.require("prepare"), config.evaluation.limit)
    return pa.concat_tables([prompts.read_block(block).slice(0, count) for block, count in enumerate(rows)])


def response_datasets(config: Config, run: RunDir, system: System) -> list[Dataset]:
    """Return the datasets of a system's responses, one per decoding."""
    return [run.system_samples(system, name) for name in config.system_decodings(system)]


def outputs_of(run: RunDir, system: System, decoding: str) -> list[Output]:
    """Return a system's responses to the held-out prompts."""
    rows = run.system_samples(system, decoding).read(["text", "num_tokens", "finish_reason"]).to_pylist()
    return [Output(row["text"], row["num_tokens"], row["finish_reason"] == "stop") for row in rows]


def candidates_of(config: Config, run: RunDir, references: list[str | None]) -> Candidates | None:
    """Return the candidates with their log-likelihoods under the students.

    None if the run samples no candidates, or if no reference measures their quality.
    """
    count = config.candidates
    if not count or not any(reference and reference.strip() for reference in references):
        return None
    manifest = run.candidates().require("sample")
    if manifest.rows != count * len(references):
        raise RunFailed(
            f"{run.candidates().url}: has {manifest.rows:,} rows, expected {count} for each of {len(references):,} "
            "prompts; run `plad verify`"
        )
    rows = run.candidates().read(["text", "num_tokens", "logprob"])
    metric = config.evaluation.judge if config.evaluation.judge in REFERENCE_JUDGES else "rouge_l"
    repeated = [reference for reference in references for _ in range(count)]
    outputs = [
        Output(text, tokens, True)
        for text, tokens in zip(rows["text"].to_pylist(), rows["num_tokens"].to_pylist(), strict=True)
    ]
    shape = (len(references), count)
    tokens = np.array([output.num_tokens for output in outputs], dtype=np.float64)
    return Candidates(
        judge=metric,
        quality_PK=getattr(score_system(repeated, outputs), metric).reshape(shape),
        tokens_PK=np.maximum(tokens, 1.0).reshape(shape),
        logps={
            system: logps.reshape(shape)
            for system, logps in ({WARMUP: _column(rows, "logprob")} | _candidate_logps(config, run)).items()
        },
    )


def _candidate_logps(config: Config, run: RunDir) -> dict[System, Scores]:
    """Return the log-likelihoods of the candidates under the trained students of all rounds."""
    logps = {}
    for number in range(run.round + 1):
        at_round = run.at_round(number)
        for system in trained_systems(config, at_round):
            is_earlier = system == PLAD and number < run.round
            scored = at_round.scored("candidates", system).read(["logprob"])
            logps[System("plad", number) if is_earlier else system] = _column(scored, "logprob")
    return logps


def _column(table: pa.Table, name: str) -> Scores:
    return np.array(table[name].to_pylist(), dtype=np.float64)


def heldout_ranking(config: Config, run: RunDir) -> Ranking | None:
    """Return the figures of the held-out pairs before and after the round, and of the control."""
    rankings = _rankings(run, phases.round_phase(run.round))
    # The control is trained on the pairs of the first round.
    has_control = config.training.seqkd is not None and not run.round
    control = _rankings(run, phases.SEQKD) if has_control else None
    latest = control or rankings
    if latest is None:
        return None
    return Ranking(
        before=_figures(rankings[0]) if rankings else None,
        after=_figures(rankings[1]) if rankings else None,
        seqkd=_figures(control[1]) if control else None,
        pairs=latest[1]["heldout_pairs"],
    )


def _rankings(run: RunDir, phase: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the first ranking of a phase, and that of the checkpoint that became the model."""
    _, rankings = read_metrics(run.root / "events" / phase)
    if not rankings:
        return None
    step = model_step(run, phase)  # not always the last checkpoint
    return rankings[0], next((row for row in rankings if row["step"] == step), rankings[-1])


def _figures(ranking: dict[str, Any]) -> HeldoutFigures:
    figures = ranking["heldout"]
    return HeldoutFigures(**{name: figures[name] for name in HeldoutFigures.model_fields if name in figures})


def model_step(run: RunDir, phase: str) -> int | None:
    """Return the step of the checkpoint that became a phase's model, or None without a model."""
    marker = model_marker(run.model(phase))
    return None if marker is None else marker["facts"].get("step")
