"""The date that templates read: one for the whole run, kept in run.yaml and in fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist.config_file import parse_config
from plad_dist.errors import UserError
from plad_dist.rundir import RunDir, check_same_run, load_run, open_run, with_date
from tests.conftest import tiny_config, write_prompts

CLOCK = "{{ strftime_now('%Y-%m-%d') }} {{ messages[-1].content }} ="


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    write_prompts(tmp_path)
    raw = tiny_config(tmp_path)
    raw["student"]["template"] = CLOCK
    return raw


def begun(raw: dict[str, Any], day: str) -> RunDir:
    """Return a run that began on a day."""
    config = parse_config(raw, "test")
    return open_run(config.with_date(day))


def test_a_run_whose_template_reads_the_clock_keeps_the_day_on_which_it_began(raw: dict[str, Any]) -> None:
    config = parse_config(raw, "test")
    today = with_date(config, RunDir.of(config)).run.date
    assert today is not None
    run = begun(raw, "2026-01-31")
    assert yaml.safe_load((run.root / "run.yaml").read_text())["config"]["run"]["date"] == "2026-01-31"
    resumed = with_date(parse_config(raw, "test"), run)
    assert resumed.run.date == "2026-01-31"
    assert {str(model.today) for model in resumed.named_models().values()} == {"2026-01-31"}
    assert load_run(str(run.root)).config.student.rendering()["date"] == "2026-01-31"
    check_same_run(parse_config(raw, "test"), run)


def test_a_run_whose_templates_do_not_read_the_clock_has_no_date(raw: dict[str, Any]) -> None:
    raw["student"]["template"] = raw["teacher"]["template"]
    config = parse_config(raw, "test")
    assert with_date(config, RunDir.of(config)).run.date is None


def test_another_date_is_another_run(raw: dict[str, Any]) -> None:
    first, second = (
        parse_config(raw | {"run": raw["run"] | {"date": day}}, "test") for day in ("2026-01-31", "2026-02-01")
    )
    assert first.fingerprint() != second.fingerprint()
    assert first.student.rendering() != second.student.rendering()


@pytest.mark.parametrize("day", ["2026-02-30", "yesterday", "20260131"])
def test_a_date_that_is_none_is_refused(raw: dict[str, Any], day: str) -> None:
    raw["run"]["date"] = day
    with pytest.raises(UserError, match=f"run.date: '{day}': expected a date such as 2026-01-31"):
        parse_config(raw, "test")


def test_a_student_has_no_choice_of_thoughts(raw: dict[str, Any]) -> None:
    raw["student"]["reasoning"] = "keep"
    with pytest.raises(UserError, match=r"student\.reasoning: is for teachers"):
        parse_config(raw, "test")
