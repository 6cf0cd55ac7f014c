"""Prompts and tokens of a run follow from its config and from given numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plad_dist.config_file import load_config, parse_config
from plad_dist.planning.fit import shortest_context, sizes_of
from plad_dist.planning.hardware import Hardware
from plad_dist.planning.plan import plan_run
from plad_dist.planning.tables import plan_notes
from plad_dist.planning.workload import workload_of
from tests.conftest import tiny_config
from tests.unit.planning.configs import H100


def test_references_are_trained_on_for_all_prompts_and_pairs_for_the_sampled_prompts(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path) | {"sampling": {"limit": 1000}}, "test")
    plan = plan_run(config, Hardware(H100, 1, 8, None), prompts=8000, prompt_tokens=100, response_tokens=50)
    assert (plan["work"]["prompts"], plan["work"]["sampled_prompts"]) == (8000, 1000)
    training, stages = config.training, plan["time"]["stages"]
    assert training.warmup is not None
    assert training.warmup.data == "references"
    assert not training.warmup.max_steps
    assert stages["train warmup"]["tokens"] == training.warmup.epochs * 8000 * (100 + 50)
    group = 100 + 50 * (config.sampling.teacher.n + config.sampling.student.n)
    assert stages["train round-0"]["tokens"] == training.round.epochs * 1000 * group
    assert stages["train seqkd"]["tokens"] == stages["train round-0"]["tokens"]  # equal compute


@pytest.mark.parametrize(
    ("pairing", "responses"), [({"combine": "one"}, 2), ({"combine": "all", "max_pairs_per_prompt": 3}, 6), ({}, 8)]
)
def test_only_the_responses_in_pairs_are_trained_on(tmp_path: Path, pairing: dict[str, Any], responses: int) -> None:
    raw = tiny_config(tmp_path) | {"sampling": {"teacher": {"n": 8}, "student": {"n": 8}}, "pairing": pairing}
    config = parse_config(raw, "test")
    work = workload_of(config, prompts=1000, prompt_tokens=100, response_tokens=50)
    assert work.group_tokens(config) == 100 + 50 * responses


def test_a_warmup_on_the_teachers_responses_trains_on_all_of_them(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path) | {"sampling": {"limit": 500, "teacher": {"n": 4}}}
    raw["training"]["warmup"] = {"data": "teacher", "epochs": 2.0}
    config = parse_config(raw, "test")
    work = workload_of(config, prompts=1000, prompt_tokens=100, response_tokens=50)
    assert work.trained_tokens(config, "warmup") == 2 * 500 * 4 * 150


def test_prompts_without_a_limit_are_no_longer_than_the_models_context(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    raw["prompts"].pop("max_tokens", None)
    config = parse_config(raw, "test")
    context = shortest_context(sizes_of(config, "cpu"))
    assert context < 1024
    work = plan_run(config, Hardware(H100, 1, 8, None), prompts=10)["work"]
    assert work["prompt_tokens"] == context / 2


def test_the_plan_says_which_figures_lack_an_unknown_number_of_prompts(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    unknown, known = (
        "\n".join(plan_notes(plan_run(config, Hardware(H100, 1, 8, None), prompts=prompts))) for prompts in (None, 100)
    )
    assert "without prompts, samples and pairs, whose number is unknown: give --prompts" in unknown
    assert "unknown: give --prompts" not in known


def test_no_more_prompts_are_held_out_than_the_data_set_has() -> None:
    config = load_config("examples/endpoint-to-7b.yaml")
    assert config.prompts.heldout is None
    assert workload_of(config, prompts=1000).heldout_prompts == round(1000 * config.prompts.heldout_fraction)
    assert workload_of(config, prompts=1_000_000).heldout_prompts == config.evaluation.limit
