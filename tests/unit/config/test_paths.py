"""Paths of configs and of the command line: `~` and variables are expanded in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from plad_dist.config import path_keys, schema_fields
from plad_dist.config.sampling import RoleSampling
from plad_dist.config.values import PathText, expand_path
from plad_dist.config_file import load_config, parse_config
from plad_dist.errors import UserError
from plad_dist.rundir import check_same_run, open_run, run_document
from plad_dist.study import Study
from tests.conftest import in_this_process

RAW: dict[str, Any] = {
    "run": {"dir": "somewhere"},
    "prompts": {"source": {"type": "files", "paths": ["a.jsonl"]}},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
}
PATH_KEYS = {
    "run.dir", "run.reuse", "prompts.source.paths", "prompts.heldout.paths", "prompts.source.name",
    "prompts.heldout.name", "prompts.source.data_dir", "prompts.heldout.data_dir", "teacher.path", "teachers.*.path",
    "student.path", "pairing.reward_model.path", "training.deepspeed", "training.checkpoint_url",
    "training.staging_dir", "evaluation.judges.*.path", "evaluation.judges.*.model.path",
    "evaluation.judges.*.template", "teacher.endpoint.api_key_file", "teacher.endpoint.ca_bundle",
}  # fmt: skip
# Keys whose names or descriptions speak of files, and why they are not paths.
NOT_PATHS = {
    "prompts.source.type", "prompts.heldout.type",
}  # fmt: skip


def test_every_key_that_names_a_file_or_folder_is_a_path() -> None:
    paths = path_keys()
    assert paths >= PATH_KEYS
    texts = [(path, field) for path, field in schema_fields() if field.annotation in (str, str | None, list[str])]
    words = ("folder", "file ", "files", "path to", "uri", "directory")
    suspects = {path for path, field in texts if any(word in str(field.description).lower() for word in words)}
    assert suspects - paths - NOT_PATHS == set()
    for name in ("base", "dir"):
        assert expand_path in [getattr(item, "func", None) for item in Study.model_fields[name].metadata]


def set_key(key: str, value: Any) -> dict[str, Any]:
    """Return a config with a key set in the section that has it."""
    reward = {"type": "reward_model", "path": "x"}
    llm = {"type": "llm", "model": {"path": "x"}}
    raw: dict[str, Any] = yaml.safe_load(yaml.safe_dump(RAW))
    if key in ("prompts.source.name", "prompts.source.data_dir"):
        raw["prompts"]["source"] = {"type": "dataset", "name": "x"}
    if key.startswith("prompts.heldout"):
        is_dataset = key.endswith(("name", "data_dir"))
        raw["prompts"]["heldout"] = (
            {"type": "dataset", "name": "x"} if is_dataset else {"type": "files", "paths": ["x"]}
        )
    if key.startswith("pairing."):
        raw["pairing"] = {"score": "reward_model", "reward_model": {"path": "x"}}
    if key.startswith("teachers."):
        raw["teachers"] = {"a": {"path": "x"}}
        del raw["teacher"]
    if key.startswith("evaluation."):
        raw["evaluation"] = {"judges": {"a": reward if key == "evaluation.judges.*.path" else llm}}
    if key.startswith("teacher.endpoint"):
        raw["teacher"] = {"endpoint": {"url": "http://host/v1", "model": "x"}}
    section = raw
    *parents, leaf = key.replace("*", "a").split(".")
    for name in parents:
        section = section.setdefault(name, {})
    section[leaf] = [value] if leaf == "paths" else value
    return raw


def value_of(config: Any, key: str) -> str:
    for name in key.replace("*", "a").split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    value = config[0] if isinstance(config, list) else config
    assert isinstance(value, str)
    return value


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("BUCKET", "b-1")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("NESTED", "$HOME/x")
    monkeypatch.setenv("TILDE", "~/x")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize("key", sorted(PATH_KEYS))
def test_home_and_variables_are_expanded_in_every_path(key: str) -> None:
    for text, path in (
        ("~/x", "/home/me/x"), ("${SCRATCH}/x", "/scratch/me/x"), ("$SCRATCH/x", "/scratch/me/x"),
        ("s3://$BUCKET/x", "s3://b-1/x"), ("/a/$$b", "/a/$b"), ("$TILDE", "/home/me/x"), ("/a/~b", "/a/~b"),
    ):  # fmt: skip
        config = parse_config(set_key(key, text), "x")
        assert value_of(config, key) == path
        assert parse_config(config.model_dump(mode="json"), "x") == config, "run.yaml reads back as the same paths"


@pytest.mark.parametrize("key", sorted(PATH_KEYS))
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${UNSET}/x", "variable UNSET is not set"), ("$UNSET", "variable UNSET is not set"),
        ("/a/$EMPTY", "variable EMPTY is empty"), ("~nobody-here/x", "no home folder is known for ~nobody-here"),
        ("/a/${SCRATCH:-x}", "write $$ for a dollar sign"), ("/a/$(date)", "write $$"),
        ("$NESTED", "NESTED is '$HOME/x'"),
    ],
)  # fmt: skip
def test_a_path_that_cannot_be_expanded_is_refused_by_name(key: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(set_key(key, text), "x")
    assert message in str(error.value)
    assert key.replace("*", "a") in str(error.value)


@pytest.mark.parametrize("key", ["student.path", "run.reuse", "training.staging_dir", "run.dir"])
def test_a_plain_tilde_is_not_taken_for_an_unset_path(tmp_path: Path, key: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RAW))
    with pytest.raises(UserError, match=f'{key}: ~: YAML reads it as null; quote it \\("~"\\) if it is the home'):
        load_config(file, [f"{key}=~"])
    assert load_config(file, ["run.dir='~'"]).run.dir == "/home/me"


def test_paths_of_engine_arguments_are_expanded_and_patterns_are_not() -> None:
    engine = {"download_dir": "~/cache", "hf_overrides": {"ignore": ["re:.*head$"]}, "pattern": "head$"}
    sampling = RoleSampling(engine=engine | {"speculative_config": {"model": "~/draft"}})
    assert sampling.engine == engine | {
        "download_dir": "/home/me/cache",
        "speculative_config": {"model": "/home/me/draft"},
    }
    with pytest.raises(ValueError, match="UNSET"):
        RoleSampling(engine={"download_dir": "$UNSET/cache"})


def test_an_empty_path_of_prompts_is_not_the_current_folder() -> None:
    raw = RAW | {"prompts": {"source": {"type": "files", "paths": [""]}}, "run": {"dir": ""}}
    with pytest.raises(UserError) as error:
        parse_config(raw, "x")
    for key in ("prompts.source.paths.0", "run.dir"):
        assert f"{key}: expected a non-empty string" in str(error.value)


def test_a_run_resumes_under_another_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = RAW | {"run": {"dir": str(tmp_path / "run"), "reuse": "~/earlier"}, "training": {"staging_dir": "$SCRATCH/s"}}
    config = parse_config(raw, "x")
    run = open_run(config)
    (tmp_path / "run" / "prompts").mkdir()
    (tmp_path / "run" / "prompts" / "manifest.json").write_text("{}")
    monkeypatch.setenv("HOME", "/home/you")
    monkeypatch.setenv("SCRATCH", "/elsewhere")
    again = parse_config(raw, "x")
    assert again != config
    assert again.fingerprint() == config.fingerprint()
    check_same_run(again, run)
    moved = parse_config(raw | {"student": {"path": "~/student"}}, "x")
    with pytest.raises(UserError, match=r"student.path: 'student' before, '/home/you/student' now"):
        check_same_run(moved, run)


def test_run_yaml_holds_the_expanded_paths(tmp_path: Path) -> None:
    config = parse_config(RAW | {"run": {"dir": f"{tmp_path}/$BUCKET/a$$b"}}, "x")
    file = tmp_path / "run.yaml"
    file.write_bytes(run_document(config))
    assert load_config(file).run.dir == f"{tmp_path}/b-1/a$b"


@pytest.mark.parametrize("command", ["status", "verify", "validate", "compare"])
def test_paths_on_the_command_line_are_expanded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for argument, message in (("~/nothing", "/home/me/nothing"), ("$UNSET/x", "variable UNSET is not set")):
        code, out, err = in_this_process(monkeypatch, capsys, command, argument)
        assert code == 2
        assert message in out + err


@pytest.mark.parametrize("command", ["status", "verify", "compare"])
def test_a_config_is_no_run_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "run.yaml").write_bytes(run_document(parse_config(RAW | {"run": {"dir": "/runs/a"}}, "x")))
    code, _, err = in_this_process(monkeypatch, capsys, command, str(tmp_path / "run.yaml"))
    assert code == 2
    assert "is a file; expected a run directory (run.dir of this config is /runs/a)" in err
    code, _, err = in_this_process(monkeypatch, capsys, "validate", str(tmp_path))
    assert code == 2
    assert f"{tmp_path}: is a folder; the config of this run is {tmp_path}/run.yaml" in err


def test_the_type_of_paths_is_one() -> None:
    assert expand_path in [getattr(item, "func", None) for item in get_args(PathText)]
