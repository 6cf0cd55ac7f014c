"""`metrics.json` is read as it was written, and a file of another form is named with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from plad_dist.errors import RunFailed
from plad_dist.evaluation.document import HeldoutFigures, Metrics, Ranking, load_metrics
from plad_dist.evaluation.scores import Candidates
from plad_dist.rundir import RunDir
from plad_dist.systems import PLAD, WARMUP
from tests.unit.evaluation.comparisons import REFERENCES, compare_shares

RANKING = Ranking(
    before=HeldoutFigures(pair_accuracy=0.4, chosen_logp=-14.0, rejected_logp=-11.0, loss=1.5),
    after=HeldoutFigures(pair_accuracy=0.6, chosen_logp=-13.0, rejected_logp=-15.0),
    pairs=512,
)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    quality, rng = np.zeros((len(REFERENCES), 2)), np.random.default_rng(0)
    quality[:, 1] = 1.0
    logps = {WARMUP: rng.normal(size=quality.shape), PLAD: quality}
    shares = {("teacher", "sampled"): 0.9, ("plad", "sampled"): 0.7, ("warmup", "sampled"): 0.4}
    candidates = Candidates("rouge_l", quality, np.ones(quality.shape), logps)
    return compare_shares(shares, ranking=RANKING, candidates=candidates, settings="f")


@pytest.fixture
def run(tmp_path: Path, metrics: Metrics) -> RunDir:
    run = RunDir.at(str(tmp_path))
    run.storage.replace(run.metrics, metrics.to_bytes())
    return run


def test_metrics_are_read_as_they_were_written(run: RunDir, metrics: Metrics) -> None:
    assert load_metrics(run) == metrics


def test_an_unevaluated_round_has_no_metrics(run: RunDir) -> None:
    assert load_metrics(run.at_round(1)) is None


def test_the_document_has_the_keys_that_other_programs_read(run: RunDir) -> None:
    raw = json.loads(run.storage.read(run.metrics) or b"")
    assert list(raw) == [
        "version", "prompts", "prompts_with_reference", "main_decoding", "judge", "systems", "plad_vs_seqkd",
        "gain_of_round", "previous", "rouge_l_difference", "judges", "judge_was_trained_on", "ranking", "calibration",
        "verdict", "settings",
    ]  # fmt: skip
    assert list(raw["systems"][0]) == [
        "system", "decoding", "temperature", "rouge_1", "rouge_2", "rouge_l", "exact_match", "tokens_mean",
        "no_eos_share", "repetition", "win_rate_vs_warmup",
    ]  # fmt: skip
    assert list(raw["systems"][2]["win_rate_vs_warmup"]) == ["value", "low", "high"]
    (warmup_pair, teacher_pair) = raw["judges"]["rouge_l"]["comparisons"]
    assert (warmup_pair["a"], warmup_pair["b"], teacher_pair["b"]) == ("plad", "warmup", "teacher")
    assert list(warmup_pair) == [
        "a", "b", "decoding", "prompts", "win_rate", "ties", "length_controlled", "by_length",
    ], "keys of judges that read two responses are left out for other judges"  # fmt: skip
    assert list(raw["calibration"]["systems"]) == ["warmup", "plad"]
    assert raw["ranking"] == {
        "before": {"pair_accuracy": 0.4, "chosen_logp": -14.0, "rejected_logp": -11.0, "loss": 1.5},
        "after": {"pair_accuracy": 0.6, "chosen_logp": -13.0, "rejected_logp": -15.0},
        "pairs": 512,
    }


def remove(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != key}


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (lambda raw: raw | {"version": 2}, "has version 2, this plad-dist reads version 1"),
        (lambda raw: remove(raw, "version"), "version: Field required"),
        (lambda raw: remove(raw, "verdict"), "verdict: Field required"),
        (lambda raw: raw | {"extra": 1}, "extra: Extra inputs are not permitted"),
        (lambda raw: raw | {"previous": "nobody"}, "previous: .*'nobody': not a system"),
        (lambda raw: [], "the document: Input should be a valid"),
        (lambda raw: 3, "the document: Input should be a valid"),
    ],
)
def test_a_document_of_another_form_is_named_with_what_to_do(run: RunDir, alter: Any, problem: str) -> None:
    raw = json.loads(run.storage.read(run.metrics) or b"")
    run.storage.replace(run.metrics, json.dumps(alter(raw)).encode())
    with pytest.raises(RunFailed, match=rf"eval/round-0/metrics.json: .*{problem}.* Delete it and run `plad evaluate`"):
        load_metrics(run)


def test_metrics_cannot_be_changed(metrics: Metrics) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        metrics.prompts = 3  # type: ignore[misc]
