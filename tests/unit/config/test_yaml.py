"""YAML of configs: numbers are decimal, and messages show a value as it was written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.config import Config, Section, schema_fields
from plad_dist.config_file import load_config, parse_config
from plad_dist.config_yaml import dump_yaml, load_yaml, plain
from plad_dist.errors import UserError
from plad_dist.study import load_study

TEXT = """run: {dir: somewhere, seed: 17}
prompts:
  source: {type: files, paths: [a.jsonl]}
teacher: {path: teacher}
student: {path: student}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def problem(path: Path, override: str) -> str:
    """Return the message for a config with an override."""
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    return str(error.value)


@pytest.mark.parametrize("text", ["yes", "on", "true", "010", "+07", "1:30", "0x1", "0b1", "1_0", '"3"', "2024-01-01"])
def test_a_whole_number_is_written_in_decimal_digits(config: Path, text: str) -> None:
    message = problem(config, f"run.seed={text}")
    assert "1 problem:" in message
    assert f"run.seed: {text}" in message or f"got {text}" in message


@pytest.mark.parametrize("text", ["yes", "1_0.5", "1:30.5", ".inf", "-.inf", ".nan", ".NaN", "1e400", "0x1"])
def test_a_number_is_finite_and_decimal(config: Path, text: str) -> None:
    message = problem(config, f"training.round.epochs={text}")
    assert "1 problem:" in message
    assert "training.round.epochs: " in message
    assert text in message


@pytest.mark.parametrize("text", ["1", "0", '"true"', "1.0"])
def test_a_boolean_is_true_or_false(config: Path, text: str) -> None:
    assert "student.trust_remote_code: expected true or false; got " in problem(
        config, f"student.trust_remote_code={text}"
    )


@pytest.mark.parametrize(
    ("text", "value"), [("1e5", 100_000), ("1.5e3", 1500), ("+5", 5), ("7", 7), ("3.0", 3), ("0", 0)]
)
def test_a_whole_number_may_have_an_exponent(config: Path, text: str, value: int) -> None:
    seed = load_config(config, [f"run.seed={text}"]).run.seed
    assert (seed, type(seed)) == (value, int)


@pytest.mark.parametrize(
    "text", ["0123456", "1234567", "1e5", "2024-01-01", "yes", "no", "on", "true", "1:30", "1_000", "~", "0x1f", ".5"]
)
@pytest.mark.parametrize("key", ["run.dir", "prompts.source.paths", "prompts.source.prompt_column"])
def test_a_text_that_yaml_reads_as_another_value_is_shown_as_written(config: Path, key: str, text: str) -> None:
    override = f"{key}=[{text}]" if key.endswith("paths") else f"{key}={text}"
    message = problem(config, override)
    assert f'quote it ("{text}")' in message
    assert key in message
    assert "42798" not in message


def test_a_tag_on_another_text_is_refused(config: Path) -> None:
    message = problem(config, "sampling.teacher.engine={x: !!bool maybe}")
    assert "sampling.teacher.engine.x: maybe: expected true or false" in message


def test_a_quoted_text_is_accepted(config: Path) -> None:
    assert load_config(config, ['student.revision="0123456"']).student.revision == "0123456"


@pytest.mark.parametrize(("text", "advice"), [("None", "write null"), ("NaN", "write a number"), ("inf", ".inf")])
def test_spellings_of_python_are_called_so(config: Path, text: str, advice: str) -> None:
    for override in (f"student.revision={text}", f"sampling.limit={text}", f"sampling.teacher.engine={{x: {text}}}"):
        message = problem(config, override)
        assert "1 problem:" in message
        assert "Python spells it" in message
        assert advice in message


@pytest.mark.parametrize("key", ["run.seed", "training.num_workers"])
def test_messages_show_a_boolean_as_it_was_written(config: Path, key: str) -> None:
    for text in ("yes", "off", "TRUE"):
        assert problem(config, f"{key}={text}").endswith(f"got {text}")


def test_null_unsets_a_key(config: Path) -> None:
    for text in ("null", "~", ""):
        assert load_config(config, [f"student.revision={text}"]).student.revision is None


@pytest.mark.parametrize("key", ["training.warmup", "training.lora", "training.watch", "prompts.heldout", "teacher"])
def test_an_optional_section_without_keys_is_no_null(config: Path, key: str) -> None:
    remedy = "its keys" if key in ("prompts.heldout", "teacher") else "`{}` for its defaults"
    expected = f"{key}: a section without keys, which YAML reads as null; write {remedy}, or null for no section"
    assert expected in problem(config, f"{key}=")
    if key != "teacher":
        load_config(config, [f"{key}=null"])
    config.write_text(TEXT + "training:\n  watch:\n")
    with pytest.raises(UserError, match=r"1 problem:\n  training.watch: a section without keys"):
        load_config(config)


def test_the_date_of_a_run_needs_no_quotes(config: Path) -> None:
    for text in ("2026-01-31", '"2026-01-31"'):
        assert load_config(config, [f"run.date={text}"]).run.date == "2026-01-31"
    assert "run.date: '2026-13-01': expected a date such as 2026-01-31: month" in problem(config, "run.date=2026-13-01")
    assert "YAML reads it as a date" in problem(config, "run.dir=2026-01-31")


@pytest.mark.parametrize("document", ["on: 1", "1: a", "null: 1", "run: {1.5: x}", "teachers: {7: {path: x}}"])
def test_keys_are_texts(tmp_path: Path, document: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(document)
    with pytest.raises(UserError, match=r"line 1, column .*keys are strings: quote it"):
        load_config(path)


@pytest.mark.parametrize("text", ["010", ".nan", ".inf", "1:30", "2024-01-01", "1_0"])
@pytest.mark.parametrize(
    "key", ["sampling.teacher.engine", "student.scratch.architecture", "teacher.endpoint.extra_body"]
)
def test_free_mappings_hold_decimal_numbers(config: Path, key: str, text: str) -> None:
    message = problem(config, f"{key}={{model_type: llama, inner: [{{x: {text}}}]}}")
    assert "inner.0.x" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.divergence_factor", math.inf), ("training.round.optimizer.clip_norm", math.inf),
        ("sampling.lease_timeout_s", math.inf), ("sampling.stall_timeout_s", math.inf),
        ("training.round.checkpoint_seconds", None), ("training.watch.max_length_ratio", None),
        ("training.round.max_steps", None), ("training.max_group_tokens", None), ("sampling.limit", None),
    ],
)  # fmt: skip
def test_infinity_is_no_bound(config: Path, key: str, value: float | None) -> None:
    settings: Any = load_config(config, [f"{key}=.inf"])
    for name in key.split("."):
        settings = getattr(settings, name)
    assert settings == value
    assert "`.inf`" in next(str(field.description) for path, field in schema_fields() if path == key)


def test_infinity_survives_run_yaml(config: Path) -> None:
    settings = load_config(config, ["pairing.length_ratio=[0.5, .inf]", "training.divergence_factor=.inf"])
    assert parse_config(plain(load_yaml(dump_yaml(settings.model_dump(mode="json"))))[0], "x") == settings


def test_the_reference_names_every_key_that_may_be_infinite() -> None:
    assert Section.model_config["allow_inf_nan"] is False
    for path, field in schema_fields():
        if any(getattr(item, "allow_inf_nan", False) for item in field.metadata):
            assert "`.inf`" in str(field.description), path


@given(st.text(alphabet="0123456789+-.:_exabINnofaulysty~ =", max_size=8))
def test_a_text_that_is_written_is_read_back_unchanged(text: str) -> None:
    assert load_yaml(dump_yaml({"key": [text]})) == {"key": [text]}


@given(st.floats(allow_nan=False), st.integers(), st.booleans())
def test_numbers_that_are_written_are_read_back_unchanged(number: float, count: int, flag: bool) -> None:
    document = {"a": number, "b": count, "c": flag, "d": None}
    assert plain(load_yaml(dump_yaml(document)))[0] == document


def test_a_study_shows_the_values_of_its_variants_as_they_were_written(config: Path) -> None:
    study = config.with_name("study.yaml")
    for value in ("0123456", "1234567", "None"):
        study.write_text(f"base: run.yaml\ndir: here\nvariants: {{a: {{student.revision: {value}}}}}\n")
        with pytest.raises(UserError, match=f'quote it \\("{value}"\\)'):
            load_study(str(study), [])


def test_a_config_without_yaml_has_the_same_rules() -> None:
    raw = yaml.safe_load(TEXT)
    for change in ({"seed": True}, {"seed": "3"}, {"dir": 3}):
        with pytest.raises(UserError):
            parse_config(raw | {"run": raw["run"] | change}, "x")
    assert isinstance(parse_config(raw, "x"), Config)
