"""Hours and cost of a run follow from its work, and from given or modelled rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_dist.config_file import load_config, parse_config
from plad_dist.devices import GPUS
from plad_dist.planning.hardware import Hardware
from plad_dist.planning.plan import plan_run
from tests.conftest import tiny_config
from tests.unit.planning.configs import H100, H100_NODES


def test_given_numbers_and_rates_replace_assumptions(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    hardware = Hardware(H100, 1, 8, None)
    assumed = plan_run(config, hardware)
    assert assumed["time"] is None
    assert "prompts: unknown: give --prompts" in assumed["assumptions"]
    plan = plan_run(
        config, hardware, prompts=1_000_000, prompt_tokens=100, response_tokens=50,
        rates={"teacher": 1000.0, "student": 2000.0, "train": 500.0}, price=3.0,
    )  # fmt: skip
    stage = plan["time"]["stages"]["sample teacher"]
    tokens = 50 * (1_000_000 + 40 * 3)  # held-out prompts: greedy, sampled, and once for pairs
    assert stage["tokens"] == tokens
    assert stage["hours"] == pytest.approx(tokens / 1000 / 3600, rel=1e-3)  # one engine of one GPU
    assert plan["cost"]["devices"] == pytest.approx(3.0 * plan["time"]["device_hours"])


def test_an_endpoint_costs_as_much_as_its_prices_and_responses_give() -> None:
    config = load_config("examples/endpoint-to-7b.yaml")
    plan = plan_run(config, H100_NODES, prompt_tokens=200, response_tokens=300)
    request = (200 * 2.5 + 300 * 10.0) / 1e6
    heldout = 300 * 3  # greedy, sampled, and once for pairs, whatever sampling.teacher.n is
    assert plan["cost"]["endpoint teacher"] == pytest.approx((20_000 + heldout) * request, rel=1e-3)
    assert plan["time"]["stages"]["sample teacher"]["tokens"] == (20_000 + heldout) * 300
    config = load_config("examples/endpoint-to-7b.yaml", ["sampling.teacher.n=4"])
    plan = plan_run(config, H100_NODES, prompt_tokens=200, response_tokens=300)
    assert plan["cost"]["endpoint teacher"] == pytest.approx((4 * 20_000 + heldout) * request, rel=1e-3)


def test_a_server_without_limits_has_no_hours() -> None:
    unlimited = [f"teacher.endpoint.{key}=null" for key in ("requests_per_minute", "tokens_per_minute")]
    plan = plan_run(load_config("examples/endpoint-to-7b.yaml", unlimited), H100_NODES)
    assert plan["time"]["stages"]["sample teacher"]["hours"] is None
    assert "sample teacher: the server's speed is unknown" in " ".join(plan["assumptions"])


def test_an_endpoint_that_would_cost_more_than_its_limit_is_a_problem() -> None:
    config = load_config("examples/endpoint-to-7b.yaml", ["teacher.endpoint.max_spend=50"])
    plan = plan_run(config, H100_NODES)
    (problem,) = plan["problems"]
    assert problem["what"].startswith("teacher.endpoint.max_spend: 50.00: the responses cost about")
    assert not plan["fits"]


def test_a_run_that_does_not_fit_has_no_hours_and_no_cost() -> None:
    plan = plan_run(load_config("examples/qwen-72b-to-7b.yaml"), Hardware(GPUS["l4-24g"], None, 8, None), price=2.5)
    assert (plan["fits"], plan["time"], plan["cost"]) == (False, None, None)


def test_workers_beyond_the_groups_of_a_batch_make_nothing_faster() -> None:
    example = "examples/tldr-llama2-13b-to-7b.yaml"
    plans = [plan_run(load_config(example, [f"training.num_workers={count}"]), H100_NODES) for count in (64, 128)]
    assert load_config(example).training.round.batch_groups <= 64
    assert len({plan["time"]["stages"]["train round-0"]["hours"] for plan in plans}) == 1


def test_endpoints_respond_while_engines_sample() -> None:
    config = load_config("examples/endpoint-to-7b.yaml", ["teacher.endpoint.requests_per_minute=1"])
    time = plan_run(config, H100_NODES)["time"]
    stages = {name: stage["hours"] for name, stage in time["stages"].items()}
    assert stages["sample teacher"] > stages["sample student"] > 0
    training = sum(hours for name, hours in stages.items() if name.startswith("train"))
    assert time["hours"] == pytest.approx(stages["sample teacher"] + training, abs=0.02)
