"""Configs: every error is found before a run starts, and names the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.config import Config, Pretrained, Student, is_operational, operational_keys, schema_fields
from plad_dist.config_file import load_config, override, parse_config
from plad_dist.errors import UserError
from plad_dist.rundir import run_document
from plad_dist.study import load_study

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "run": {"dir": "somewhere"},
    "prompts": {"source": {"type": "files", "paths": ["a.jsonl"]}},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
}


def server(**settings: Any) -> dict[str, Any]:
    return {"teacher": {"endpoint": {"url": "http://host/v1", "model": "m"} | settings}}


def write(folder: Path, config: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    if "variants" in yaml.safe_load(path.read_text()):
        assert load_study(str(path), [])
    else:
        assert load_config(path).run.dir


def test_a_config_is_unchanged_after_writing_and_reading() -> None:
    config = parse_config(MINIMAL, "x")
    assert parse_config(config.model_dump(mode="json"), "x") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samplng": {}}, "samplng: unknown key; did you mean `sampling`?"),
        ({"run": {"dir": "x", "sed": 1}}, "run.sed: unknown key; did you mean `seed`?"),
        ({"run": {}}, "run.dir: missing"),
        ({"run": {"dir": "x", "seed": "many"}}, 'run.seed: expected a whole number; got "many"'),
        ({"sampling": {"teacher": {"temperature": -1}}}, "sampling.teacher.temperature: expected a value greater than"),
        (
            {"training": {"round": {"loss": {"name": "rnak"}}}},
            "training.round.loss.name: expected 'rank', 'margin', 'listwise'",
        ),
        ({"training": {"round": {"loss": {"name": "mle"}}}}, "must be a preference loss"),
        (
            {"training": {"num_workers": "two"}},
            "training.num_workers: expected a number of workers, or [minimum, maximum]",
        ),
        ({"training": {"num_workers": [3, 2]}}, "or [minimum, maximum] such as [2, 16]; got [3, 2]"),
        ({"training": {"num_workers": 0}}, "training.num_workers: expected a number of workers"),
        (
            {"training": {"num_workers": [1, 2], "round": {"optimizer": {"name": "adamw_8bit"}}}},
            "round.optimizer.name: adamw_8bit: its block-wise states cannot be divided",
        ),
        ({"teacher": {}}, "teacher: needs exactly one of `path`"),
        ({"student": {"scratch": {"architecture": {}}, "template": "x"}}, "needs `model_type`"),
        (
            {"prompts": {"source": {"type": "web"}}},
            "prompts.source.type: 'web': expected one of files, dataset, python_functions",
        ),
        (
            {
                "prompts": {"source": MINIMAL["prompts"]["source"] | {"tools_column": "t"}},
                "teacher": {"endpoint": {"url": "http://host/v1", "model": "m"}},
            },
            "teacher.endpoint.api: chat: a server returns calls of tools apart from the text",
        ),
        (
            {"prompts": {"source": MINIMAL["prompts"]["source"] | {"messages_format": "sharegpt"}}},
            "`messages_format` describes `messages_column`, which is missing",
        ),
        (
            {
                "prompts": {
                    "source": MINIMAL["prompts"]["source"] | {"messages_column": "m", "ignored_fields": ["content"]}
                }
            },
            "`ignored_fields` has `content`, which every message needs",
        ),
        (server(extra_body={"n": 2}), "teacher.endpoint.extra_body: n: is set by the run; remove it"),
        (server(extra_body={"tools": []}), "teacher.endpoint.extra_body: tools: is set by the run; remove it"),
        (server(extra_body={"seed": 1}), "teacher.endpoint.extra_body: seed: is set by the run; remove it"),
        (
            server(extra_body={"top_k": 5}),
            "teacher.endpoint.extra_body.top_k: replaces a setting of the run; set sampling.teacher.top_k",
        ),
        (
            {"evaluation": {"judges": {"j": {"type": "llm", "model": server(extra_body={"min_p": 0.1})["teacher"]}}}},
            "evaluation.judges.j.model.endpoint.extra_body.min_p: replaces a setting of the run; set "
            "evaluation.judges.j.sampling.min_p",
        ),
        (
            {"teacher": server()["teacher"] | {"trust_remote_code": True}},
            "teacher: trust_remote_code: has no effect with `endpoint`",
        ),
        (server(url="http://h/v1/chat/completions"), "give the base URL, http://h/v1"),
        (server(url="http://h/v1/completions/"), "give the base URL, http://h/v1"),
        (
            {"student": {"path": "x", "template_kwargs": {"add_generation_prompt": False}}},
            "student.template_kwargs: add_generation_prompt: is set by the run; remove it",
        ),
        (
            {"student": {"path": "x", "template_kwargs": {"chat_template": "{{ messages }}"}}},
            "student.template_kwargs: chat_template: is set by the run; set `template` instead",
        ),
        ({"sampling": {"student": {"stop": ["x"]}}}, "sampling.student.stop: the student must end with a token"),
        (
            {"evaluation": {"warmup_temperatures": [-3]}},
            "evaluation.warmup_temperatures.0: expected a value greater than 0",
        ),
        (
            {"evaluation": {"decodings": {"t0.5": {"temperature": 0.5, "max_tokens": 8}}}},
            "name 't0.5': reserved for the warm-up student at that temperature",
        ),
        (
            {"training": {"warmup": {}}},
            "prompts.source.reference_column: missing; training.warmup.data is `references`: "
            "set the column, or `data: teacher`",
        ),
    ],
)
def test_the_error_names_the_key_and_the_expected_value(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, MINIMAL | change)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": None, "teachers": {"a": {"path": "x", "sampling": {"replicas": "many"}}}},
            'teachers.a.sampling.replicas: expected a whole number or `auto`; got "many"',
        ),
        ({"dataset": 1}, "dataset: unknown key"),
        ({"run": {"dir": "x", "int": 3}}, "run.int: unknown key"),
        (
            {"teacher": None, "teachers": {"files": {"path": "x", "templat": "y"}}},
            "teachers.files.templat: unknown key",
        ),
        ({"training": {"lora": {"target_modules": 3}}}, "lora.target_modules: expected a list or `all-linear`; got 3"),
        ({"student": "/models/x"}, 'student: expected a section (a mapping of keys); got "/models/x"'),
    ],
)
def test_an_error_is_one_line_with_the_whole_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, MINIMAL | change))
    assert message in str(error.value)
    assert "1 problem:" in str(error.value)


@pytest.mark.parametrize("text", ["run: &a [*a]", "[" * 3000])
def test_yaml_that_contains_itself_or_is_nested_too_deeply_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="nested too deeply, or an alias contains itself"):
        load_config(path)


def test_an_override_of_an_aliased_section_changes_that_section_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        write(tmp_path, MINIMAL).read_text()
        + "training: {round: {optimizer: &o {lr: 1.0e-3}}, seqkd: {optimizer: *o}}\n"
    )
    config = load_config(path, ["training.round.optimizer.lr=0.5"])
    assert config.training.seqkd is not None
    assert (config.training.round.optimizer.lr, config.training.seqkd.optimizer.lr) == (0.5, 1e-3)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 problems"):
        load_config(write(tmp_path, MINIMAL | {"samplng": {}, "run": {"dir": ""}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "not valid YAML"),
        ("- a\n- b", "expected a mapping of sections"),
        ("run: {dir: a}\nrun: {dir: b}", "duplicate key 'run'"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_yaml_that_is_not_a_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_the_error_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "nothing.yaml")


def test_overrides_set_keys_and_read_their_values_as_yaml(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL), ["run.seed=3", "training.round.optimizer.lr=1e-4", "sampling.teacher.stop=['a']"]
    )
    assert (config.run.seed, config.training.round.optimizer.lr, config.sampling.teacher.stop) == (3, 1e-4, ["a"])


def test_a_template_can_be_an_override(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["teacher.template={{ messages[0].content }} ="])
    assert config.teacher.template == "{{ messages[0].content }} ="


@pytest.mark.parametrize("override", ["seed", "=3", "run.dir.deeper=1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="override"):
        load_config(write(tmp_path, MINIMAL), [override])


def test_operational_keys_do_not_change_the_fingerprint() -> None:
    config = parse_config(MINIMAL, "x")
    other = parse_config(MINIMAL | {"training": {"num_workers": 8}, "run": {"dir": "elsewhere"}}, "x")
    assert other.fingerprint() == config.fingerprint()
    assert parse_config(MINIMAL | {"run": {"dir": "somewhere", "seed": 1}}, "x").fingerprint() != config.fingerprint()


def test_adding_operational_engine_arguments_does_not_change_the_fingerprint() -> None:
    config = parse_config(MINIMAL, "x")
    sampling = {"teacher": {"engine": {"max_num_seqs": 32}}}
    assert parse_config(MINIMAL | {"sampling": sampling}, "x").fingerprint() == config.fingerprint()
    other = {"teacher": {"engine": {"quantization": "fp8"}}}
    assert parse_config(MINIMAL | {"sampling": other}, "x").fingerprint() != config.fingerprint()


def test_an_engine_is_named_by_a_text_or_by_the_arguments() -> None:
    named = [
        parse_config(MINIMAL | {"sampling": {"student": {"engine": engine}}}, "x")
        for engine in ("transformers", {"name": "transformers"})
    ]
    assert named[0].flat() == named[1].flat()
    assert named[0].fingerprint() != parse_config(MINIMAL, "x").fingerprint(), "the engines draw other responses"
    for other in ("sglang", {"name": "vllm"}):
        with pytest.raises(UserError, match=r"sampling\.student\.engine: '\w+': expected `transformers`, or vLLM's"):
            parse_config(MINIMAL | {"sampling": {"student": {"engine": other}}}, "x")


def test_keys_inside_an_operational_section_are_operational() -> None:
    assert is_operational("sampling.teacher.engine.max_num_seqs")
    assert not is_operational("sampling.teacher.engine.quantization"), "it changes the samples"
    assert not is_operational("sampling.teacher.temperature")
    assert operational_keys() <= {path for path, _ in schema_fields()}


@given(st.floats(1e-9, 1.0), st.integers(1, 10**6), st.integers(0, 2**31 - 1))
def test_numbers_are_parsed_unchanged(lr: float, batch: int, seed: int) -> None:
    raw = MINIMAL | {
        "run": {"dir": "x", "seed": seed},
        "training": {"round": {"batch_groups": batch, "optimizer": {"lr": lr}}},
    }
    config = Config.model_validate(yaml.safe_load(yaml.safe_dump(raw)))
    assert (config.training.round.optimizer.lr, config.training.round.batch_groups, config.run.seed) == (
        lr,
        batch,
        seed,
    )


def test_the_stored_config_of_a_run_directory_can_be_loaded(tmp_path: Path) -> None:
    config = load_config("examples/quickstart.yaml", [f"run.dir={tmp_path}"])
    (tmp_path / "run.yaml").write_bytes(run_document(config))
    assert load_config(tmp_path / "run.yaml") == config


def test_null_removes_a_field_that_a_server_refuses() -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 99, "temperature": None, "seed": None}
    teacher = parse_config(MINIMAL | server(extra_body=extra), "x").teacher
    assert teacher is not None
    assert teacher.endpoint is not None
    assert teacher.endpoint.extra_body == extra


def test_greedy_responses_are_drawn_once() -> None:
    for greedy in ({"temperature": 0}, {"top_k": 1}, {"min_p": 1}):
        for role in ("teacher", "student"):
            with pytest.raises(UserError, match=rf"sampling.{role}.n: 4: with .* are the same; set `n: 1`"):
                parse_config(MINIMAL | {"sampling": {role: {"n": 4} | greedy}}, "x")
        raw = {key: value for key, value in MINIMAL.items() if key != "teacher"}
        raw |= {"teachers": {"a": {"path": "x", "sampling": {"n": 2} | greedy}}, "sampling": {"teacher": {"n": 2}}}
        with pytest.raises(UserError, match=r"teachers.a.sampling.n: 2: with"):
            parse_config(raw, "x")
        assert parse_config(MINIMAL | {"sampling": {"student": greedy}}, "x").candidates == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": {"teacher": {"min_tokens": 9, "max_tokens": 8}}}, "min_tokens: 9: must be at most max_tokens"),
        ({"sampling": {"teacher": {"stop": [""]}}}, "sampling.teacher.stop.0: expected a non-empty string"),
        ({"sampling": {"teacher": {"temperature": 3}}}, "less than or equal to 2"),
        ({"sampling": {"teacher": {"temperature": 0.001}}}, "vLLM samples at 0.01 at least"),
        ({"sampling": {"student": {"stop_token_ids": [3]}}}, "add the tokens to eos_token_id"),
        ({"sampling": {"teacher": {"repetition_penalty": 0}}}, "repetition_penalty: expected a value greater than 0"),
        ({"pairing": {"length_ratio": [0, 0]}}, "0 <= low <= high > 0"),
        (
            {"prompts": MINIMAL["prompts"] | {"heldout_fraction": 0}},
            "prompts.heldout_fraction: 0: leaves no held-out prompts",
        ),
    ],
)
def test_combinations_that_cannot_be_meant_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(MINIMAL | change, "x")
    assert message in str(error.value)


def test_no_template_of_a_prompt_is_a_path() -> None:
    for key in ("template", "reference_template"):
        for template in ("chat.jinja", "/a b/chat", "~/chat.j2", "../x", "a/b.txt"):
            source = {"type": "files", "paths": ["a"], key: template}
            with pytest.raises(UserError, match=f"prompts.source.{key}: {template}: is a path, expected the text"):
                parse_config(MINIMAL | {"prompts": {"source": source}}, "x")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("/models/chat.jinja", "is a path, expected the text of a template"),
        ("chat.jinja", "is a path"),
        ("Question: {prompt}", "uses no messages"),
        ("{{ prompt }}", "uses no messages"),
        ("{# messages #} x", "uses no messages"),
        ("", "uses no messages"),
    ],
)
def test_a_template_of_a_model_uses_the_messages(template: str, message: str) -> None:
    judge = {"judges": {"a": {"type": "reward_model", "path": "x", "template": template}}}
    for change in ({"student": {"path": "x", "template": template}}, {"evaluation": judge}):
        with pytest.raises(UserError) as error:
            parse_config(MINIMAL | change, "x")
        assert message in str(error.value)
        assert "template: " in str(error.value)
    text = "{%- for m in messages %}{{ m.content }}{% endfor %}"
    assert parse_config(MINIMAL | {"student": {"path": "x", "template": text}}, "x").student.template == text


def test_a_cut_student_is_written_and_read_under_its_key() -> None:
    raw = MINIMAL | {
        "student": {"from": {"path": "a/b", "layers": [0, 1, 5]}},
        "training": {"warmup": {"data": "teacher"}},
    }
    config = parse_config(override(raw, {}, ["student.from.layers=12", "student.from.revision=v1"]), "test")
    assert config.flat()["student.from.layers"] == 12
    assert parse_config(config.model_dump(mode="json"), "run.yaml") == config
    assert config.student.pretrained() == Pretrained("from.path", "a/b", Student(path="a/b", revision="v1"), 12)
    other = parse_config(override(raw, {}, ["student.from.layers=11", "student.from.revision=v1"]), "test")
    assert other.fingerprint() != config.fingerprint()
