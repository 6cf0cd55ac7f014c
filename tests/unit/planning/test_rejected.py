"""Another model that writes the rejected responses takes memory, time and money of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plad_dist.config import Config
from plad_dist.config_file import load_config, parse_config
from plad_dist.holders import Holder
from plad_dist.planning.engines import engine_specs
from plad_dist.planning.fit import sizes_of
from plad_dist.planning.hardware import Hardware
from plad_dist.planning.plan import plan_run
from plad_dist.planning.training_fit import longest_group
from tests.conftest import tiny_config
from tests.unit.planning.configs import H100, H100_NODES

GIVEN = {"prompts": 1000, "prompt_tokens": 100, "response_tokens": 50}
SMALL = "Qwen/Qwen2.5-1.5B-Instruct"


def qwen(rejected: dict[str, Any] | None, *overrides: str) -> Config:
    config = load_config("examples/qwen-72b-to-7b.yaml", list(overrides))
    return parse_config(
        config.model_dump(mode="json") | {"sampling": config.sampling.model_dump(mode="json") | {"rejected": rejected}},
        "test",
    )


def test_the_engine_of_another_model_is_planned_with_its_own_size() -> None:
    plan, own = (plan_run(qwen(rejected), H100_NODES, **GIVEN) for rejected in ({"path": SMALL}, None))
    assert list(plan["sampling"]) == [*own["sampling"], "sampling.rejected"]
    assert plan["models"]["sampling.rejected"]["name"] == SMALL
    student, writer = (plan["sampling"][label] for label in ("student", "sampling.rejected"))
    assert 0 < writer["parts_gib"]["weights"] < student["parts_gib"]["weights"]
    assert plan["gpus"]["most"] >= own["gpus"]["most"]
    [spec] = [spec for spec in engine_specs(qwen({"path": SMALL})) if spec.label == "sampling.rejected"]
    assert spec.holder == Holder("sample", "rejected"), "not among those of the evaluation"


def test_responses_for_pairs_are_those_of_the_writer_and_drawn_once(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path) | {"rounds": {"most": 3, "stop": "never"}}

    def tokens(rejected: dict[str, Any] | None) -> dict[str, float]:
        config = parse_config(raw | {"sampling": raw["sampling"] | {"rejected": rejected}}, "test")
        stages = plan_run(config, Hardware(H100, 1, 8, None), **GIVEN)["time"]["stages"]
        return {name: stage["tokens"] for name, stage in stages.items() if name.startswith("sample ")}

    own, raw_student, other = (tokens(rejected) for rejected in (None, {"phase": "student-init"}, {"path": SMALL}))
    for_pairs = 50 * (1000 + 40)  # training prompts, and held-out ones for the held-out pairs
    assert own["sample student"] - raw_student["sample student"] == 2 * for_pairs
    assert own["sample student"] - other["sample student"] == 3 * for_pairs
    assert other["sample sampling.rejected"] == for_pairs


def test_the_engine_of_another_model_takes_the_students_rate_and_the_plan_says_so(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    rates = {"teacher": 1000.0, "student": 2000.0, "train": 500.0}
    notes = []
    for rejected in ({"path": SMALL}, None):
        config = parse_config(raw | {"sampling": raw["sampling"] | {"rejected": rejected}}, "test")
        plan = plan_run(config, Hardware(None, 1, 0, None), **GIVEN, rates=rates)
        rate = plan["time"]["stages"].get("sample sampling.rejected", {}).get("tokens_per_s_per_device")
        assert rate == (2000.0 if rejected else None)
        notes.append(any("rejected responses are as fast as --student-rate" in line for line in plan["assumptions"]))
    assert notes == [True, False]


def test_a_server_keeps_the_rate_of_its_limits_and_is_given_no_other() -> None:
    base = load_config("examples/endpoint-to-7b.yaml").model_dump(mode="json")
    unlimited = base["teacher"]["endpoint"] | {"requests_per_minute": None, "tokens_per_minute": None}

    def plan(weak: dict[str, Any]) -> dict[str, Any]:
        teachers = {"strong": base["teacher"], "weak": base["teacher"] | {"endpoint": weak}}
        sampling = base["sampling"] | {"rejected": {"teacher": "weak"}}
        config = parse_config(base | {"teacher": None, "teachers": teachers, "sampling": sampling}, "test")
        return plan_run(config, H100_NODES, **GIVEN, rates={"student": 2000.0})

    limited = plan(unlimited | {"requests_per_minute": 60})["time"]["stages"]["sample teachers.weak"]
    assert limited["tokens_per_s_per_device"] == 50.0
    [note] = [line for line in plan(unlimited)["assumptions"] if line.startswith("sample teachers.weak: ")]
    assert note.endswith("set its requests_per_minute")


def test_a_teacher_behind_a_server_is_paid_for_the_rejected_responses() -> None:
    base = load_config("examples/endpoint-to-7b.yaml").model_dump(mode="json")
    teachers = {"strong": base["teacher"], "weak": base["teacher"]}
    rejected = base["sampling"] | {"rejected": {"teacher": "weak"}}
    config = parse_config(base | {"teacher": None, "teachers": teachers, "sampling": rejected}, "test")
    plan = plan_run(config, H100_NODES, prompt_tokens=200, response_tokens=300)
    request, heldout = (200 * 2.5 + 300 * 10.0) / 1e6, 300
    assert plan["cost"]["endpoint weak"] == round((20_000 + heldout) * request, 2)
    assert plan["cost"]["endpoint strong"] == round((20_000 + 3 * heldout) * request, 2), "no share of the prompts less"
    assert plan["time"]["stages"]["sample teachers.weak"]["tokens"] == (20_000 + heldout) * 300


def test_groups_are_as_long_as_the_writers_responses() -> None:
    base = load_config("examples/endpoint-to-7b.yaml", ["sampling.student.max_tokens=512"]).model_dump(mode="json")
    longest = []
    for tokens in (512, 100):
        teachers = {"strong": base["teacher"], "weak": base["teacher"] | {"sampling": {"max_tokens": tokens}}}
        sampling = base["sampling"] | {"rejected": {"teacher": "weak"}}
        config = parse_config(base | {"teacher": None, "teachers": teachers, "sampling": sampling}, "test")
        longest.append(longest_group(config, sizes_of(config, "gpu")["student"]))
    assert longest[0] - longest[1] == 412
