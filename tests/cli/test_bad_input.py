"""Bad input ends a command with exit code 2 and one message, and changes no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist.config_file import parse_config
from plad_dist.rundir import open_run
from plad_dist.training.model.scratch import train_tokenizer
from tests.conftest import in_this_process, write_config

Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `plad` in this process and returns its exit code and output."""

    def run(*arguments: str) -> tuple[int, str]:
        code, out, err = in_this_process(monkeypatch, capsys, *arguments)
        return code, out + err

    return run


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def model_folder(folder: Path) -> Path:
    """Write a model folder whose tokenizer has no chat template."""
    model = folder / "model"
    train_tokenizer(iter(["some text"]), 300).save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 1}))
    return model


def prompts_missing(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "prompts.jsonl").unlink()


def prompts_empty(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "prompts.jsonl").write_text("")


def prompts_broken(folder: Path, raw: dict[str, Any]) -> None:
    path = folder / "prompts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:40], '{"prompt": ', *lines[41:]]))


def a_link_to_nowhere_among_the_prompts(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "prompts-2.jsonl").symlink_to(folder / "gone.jsonl")
    raw["prompts"]["source"]["paths"] = [str(folder / "prompts*.jsonl")]


def column_missing(folder: Path, raw: dict[str, Any]) -> None:
    raw["prompts"]["source"]["prompt_column"] = "question"


def model_missing(folder: Path, raw: dict[str, Any]) -> None:
    raw["student"] = {"path": str(folder / "nowhere")}


def not_a_model(folder: Path, raw: dict[str, Any]) -> None:
    raw["student"] = {"path": str(folder)}


def no_template(folder: Path, raw: dict[str, Any]) -> None:
    raw["student"] = {"path": str(model_folder(folder))}


def no_template_for_scratch(folder: Path, raw: dict[str, Any]) -> None:
    del raw["student"]["template"]


def broken_template(folder: Path, raw: dict[str, Any]) -> None:
    raw["student"] = {"path": str(model_folder(folder)), "template": "{{ messages[ }}"}


def bad_architecture(folder: Path, raw: dict[str, Any]) -> None:
    raw["student"]["scratch"]["architecture"] = {"model_type": "lama"}


def heads_unknown_on_cpus(folder: Path, raw: dict[str, Any]) -> None:
    raw["student"]["scratch"]["architecture"] = raw["student"]["scratch"]["architecture"] | {"num_attention_heads": 2}


def unknown_engine_argument(folder: Path, raw: dict[str, Any]) -> None:
    raw["sampling"]["student"]["engine"] = {"max_num_seq": 3}


def reserved_engine_argument(folder: Path, raw: dict[str, Any]) -> None:
    raw["sampling"]["student"]["engine"] = {"model": "other"}


def no_weights(folder: Path, raw: dict[str, Any]) -> None:
    raw["student"] = {"path": str(model_folder(folder)), "template": "{{ messages[-1].content }}"}


def weights_cut(folder: Path, raw: dict[str, Any]) -> None:
    model = model_folder(folder)
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0" + b'{"w": {"')
    raw["student"] = {"path": str(model), "template": "{{ messages[-1].content }}"}


def replicas_not_a_number(folder: Path, raw: dict[str, Any]) -> None:
    raw["sampling"]["student"]["replicas"] = "many"


def tracker_not_installed(folder: Path, raw: dict[str, Any]) -> None:
    raw["training"]["trackers"] = ["wandb"]


def patience_without_evaluations(folder: Path, raw: dict[str, Any]) -> None:
    raw["training"]["round"]["patience"] = 2


def margin_loss_without_scores(folder: Path, raw: dict[str, Any]) -> None:
    raw["training"]["round"]["loss"] = {"name": "margin"}
    raw["pairing"] = {"score": "none"}


def deepspeed_sets_the_batch(folder: Path, raw: dict[str, Any]) -> None:
    deepspeed_file(folder, raw, {"zero_optimization": {"stage": 3}, "train_batch_size": 64})


def deepspeed_sets_many_keys(folder: Path, raw: dict[str, Any]) -> None:
    keys = ("train_batch_size", "gradient_clipping", "bf16", "optimizer", "amp")
    zero = {"stage": 1, "overlap_com": True, "offload_param": {"device": "nvme"}}
    deepspeed_file(folder, raw, {"zero_optimization": zero} | dict.fromkeys(keys, "auto"))


def deepspeed_misspelt(folder: Path, raw: dict[str, Any]) -> None:
    deepspeed_file(folder, raw, {"zero_optimization": {"stage": 3, "overlap_com": True}})


def secret_in_the_engine(folder: Path, raw: dict[str, Any]) -> None:
    raw["sampling"]["student"]["engine"] = {"hf_token": "hf_secret"}


def judge_template_as_text(folder: Path, raw: dict[str, Any]) -> None:
    judge = {"type": "llm", "model": {"endpoint": {"url": "http://x", "model": "m"}}, "template": "{{ first }} [[A]]"}
    raw["evaluation"]["judges"] = {"a": judge}


def tensor_parallel_not_a_number(folder: Path, raw: dict[str, Any]) -> None:
    raw["sampling"]["student"]["engine"] = {"tensor_parallel_size": "two"}


def deepspeed_missing(folder: Path, raw: dict[str, Any]) -> None:
    raw["training"]["deepspeed"] = "zero9"


def deepspeed_not_stage_3(folder: Path, raw: dict[str, Any]) -> None:
    deepspeed_file(folder, raw, {"zero_optimization": {"stage": 1}})


def deepspeed_on_nvme(folder: Path, raw: dict[str, Any]) -> None:
    deepspeed_file(folder, raw, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}})


def deepspeed_file(folder: Path, raw: dict[str, Any], config: dict[str, Any]) -> None:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    raw["training"]["deepspeed"] = str(path)


def run_dir_is_a_file(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "run").write_text("a file of the user")


def run_dir_of_something_else(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("a file of the user")


def run_dir_below_a_file(folder: Path, raw: dict[str, Any]) -> None:
    raw["run"]["dir"] = str(folder / "prompts.jsonl" / "run")


def run_dir_too_long(folder: Path, raw: dict[str, Any]) -> None:
    raw["run"]["dir"] = str(folder / ("a" * 300))


def run_dir_on_an_object_store(folder: Path, raw: dict[str, Any]) -> None:
    raw["run"]["dir"] = "s3://bucket/run"


def run_dir_unknown_scheme(folder: Path, raw: dict[str, Any]) -> None:
    raw["run"]["dir"] = "ftp://host/folder"


@pytest.mark.parametrize("subcommand", ["run", "validate"])
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (prompts_missing, ["prompts.source.paths: ", "prompts.jsonl", "no such prompts file"]),
        (
            replicas_not_a_number,
            ["1 problem", 'sampling.student.replicas: expected a whole number or `auto`; got "many"'],
        ),
        (weights_cut, ["student.path: ", "model.safetensors: not a safetensors file", "Copy the model again"]),
        (prompts_empty, ["prompts.jsonl", "no prompts;"]),
        (a_link_to_nowhere_among_the_prompts, ["prompts.source.paths: ", "prompts-2.jsonl: is a link to"]),
        (column_missing, ["prompts.jsonl:1", "no column 'question'", "it has 'answer', 'prompt'"]),
        (model_missing, ["student.path: ", "nowhere", "no such model folder"]),
        (not_a_model, ["not a model folder", "config.json"]),
        (no_template, ["no chat template", "template"]),
        (no_template_for_scratch, ["student", "template"]),
        (broken_template, ["not a valid Jinja template"]),
        (no_weights, ["has no *.safetensors weights"]),
        (bad_architecture, ["student.scratch.architecture.model_type", "no 'lama'; did you mean `llama`?"]),
        (heads_unknown_on_cpus, ["student.scratch.architecture: attention heads of 16", "only 32, 64", "head_dim"]),
        (unknown_engine_argument, ["sampling.student.engine.max_num_seq", "did you mean `max_num_seqs`?"]),
        (reserved_engine_argument, ["sampling.student.engine.model", "set by the run itself"]),
        (tracker_not_installed, ["training.trackers: wandb", "not installed"]),
        (patience_without_evaluations, ["training.round", "evaluate_every"]),
        (margin_loss_without_scores, ["training.round.loss.name: margin needs scores", "pairing.score"]),
        (deepspeed_sets_the_batch, ["train_batch_size", "training.<phase>.batch_groups"]),
        (
            deepspeed_sets_many_keys,
            [
                "7 problems",
                "stage 2 or 3",
                "offload_param.device: nvme",
                "train_batch_size: is decided by",
                "gradient_clipping: is",
                "bf16: is",
                "optimizer: is",
                "amp: is",
                "overlap_com",
            ],
        ),
        (deepspeed_misspelt, ["zero_optimization.overlap_com", "installed DeepSpeed"]),
        (secret_in_the_engine, ["hf_token", "HF_TOKEN environment variable"]),
        (tensor_parallel_not_a_number, ["tensor_parallel_size: expected a whole number", "'two'"]),
        (judge_template_as_text, ["evaluation.judges.a.template", "expected the path of a file"]),
        (deepspeed_missing, ["training.deepspeed", "zero9", "zero3"]),
        (deepspeed_not_stage_3, ["training.deepspeed", "stage 2 or 3"]),
        (deepspeed_on_nvme, ["training.deepspeed", "offload_optimizer.device: nvme", "set cpu"]),
        (run_dir_is_a_file, ["is a file, expected a directory"]),
        (run_dir_of_something_else, ["not empty and not a run directory"]),
        (run_dir_below_a_file, ["run.dir", "cannot be created"]),
        (run_dir_too_long, ["run.dir", "not a usable path"]),
        (run_dir_on_an_object_store, ["run.dir", "a file system that all nodes share"]),
        (run_dir_unknown_scheme, ["run.dir", "expected a path or a file://"]),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    tiny: tuple[Path, dict[str, Any]],
    command: Callable[..., tuple[int, str]],
    subcommand: str,
    change: Change,
    messages: list[str],
) -> None:
    folder, raw = tiny
    change(folder, raw)
    config = write_config(folder, raw)
    before = snapshot(folder)
    code, printed = command(subcommand, str(config))
    assert code == 2, printed
    assert all(message in printed for message in messages), printed
    assert "Traceback" not in printed
    assert snapshot(folder) == before


def test_a_broken_line_is_named_by_its_number_and_no_prompts_are_written(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = tiny
    prompts_broken(folder, raw)
    config = str(write_config(folder, raw))
    for subcommand in ("validate", "run"):
        code, printed = command(subcommand, config)
        assert code == 2
        assert "prompts.jsonl:41: not valid JSON" in printed
        assert (folder / "run").exists() == (subcommand == "run"), "validate writes nothing"
    assert not (folder / "run" / "prompts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.yaml"], "nothing.yaml: no such config file"),
        (["status", "nothing"], "nothing: no such run directory"),
        (
            ["train", "CONFIG", "--phase", "rounds"],
            "--phase rounds: this config has the phases teacher, warmup, round-0, seqkd",
        ),
        (["run", "CONFIG", "run.sed=3"], "run.sed: unknown key; did you mean `seed`?"),
        (["sample", "CONFIG"], "models/teacher: missing; run `plad train --phase teacher` first"),
        (["pair", "CONFIG"], "samples/teacher/round-0: not complete yet; run `plad sample` first"),
        (["evaluate", "CONFIG"], "models/seqkd: missing; run `plad train` first"),
        (["train", "CONFIG", "--phase", "round-0"], "pairs/round-0: not complete yet; run `plad pair` first"),
        (["report", "CONFIG"], "run `plad evaluate` first"),
        (["run", "CONFIG", "training.lr=3"], "did you mean `training.teacher.optimizer.lr` or"),
    ],
)
def test_a_bad_command_line_is_refused(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]], arguments: list[str], message: str
) -> None:
    folder, raw = tiny
    config = str(write_config(folder, raw))
    code, printed = command(*[config if argument == "CONFIG" else argument for argument in arguments])
    assert code == 2, printed
    assert message in printed
    assert "Traceback" not in printed
    assert "ray:" not in printed, "nothing is started"
    assert not (folder / "run").exists(), "the command writes nothing"


def test_a_config_without_held_out_prompts_is_refused(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = tiny
    code, printed = command("validate", str(write_config(folder, raw)), "prompts.heldout_fraction=0")
    assert code == 2
    assert "prompts.heldout_fraction: 0: leaves no held-out prompts" in printed


def test_all_conflicts_between_keys_are_reported_at_once(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = tiny
    del raw["student"]["template"]
    del raw["training"]["warmup"]
    raw["sampling"]["student"]["stop"] = ["x"]
    code, printed = command("validate", str(write_config(folder, raw)))
    assert code == 2
    assert "3 problems" in printed
    for line in ("  student.template: missing", "  training.warmup: missing", "  sampling.student.stop: the student"):
        assert line in printed


def test_a_run_directory_of_another_config_is_refused_by_the_keys_that_differ(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = tiny
    config = write_config(folder, raw)
    assert command("prepare", str(config))[0] == 0
    before = snapshot(folder)
    code, printed = command("prepare", str(config), "run.seed=6", "prompts.block_size=32", "training.num_workers=1")
    assert code == 2
    assert "run.seed: 5 before, 6 now" in printed
    assert "prompts.block_size: 64 before, 32 now" in printed
    assert "num_workers" not in printed
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("override", "started", "refused"),
    [
        ("teacher.max_length=32", "samples", True),
        ("student.template='{{ messages[0].content }}'", "pairs", True),
        ("training.warmup.epochs=3", "samples", True),
        ("sampling.teacher.engine.quantization=fp8", "samples", True),
        ("sampling.teacher.engine.max_num_seqs=3", "samples", False),
        ("training.round.epochs=1", "samples", False),
        ("training.round.epochs=1", "checkpoints/round-0", True),
        ("training.seqkd.batch_groups=3", "checkpoints/round-0", False),
        ("evaluation.bootstrap=300", "checkpoints/seqkd", False),
    ],
)
def test_a_key_is_frozen_once_a_step_that_depends_on_it_has_started(
    tiny: tuple[Path, dict[str, Any]],
    command: Callable[..., tuple[int, str]],
    override: str,
    started: str,
    refused: bool,
) -> None:
    folder, raw = tiny
    config = str(write_config(folder, raw))
    assert command("prepare", config)[0] == 0
    (folder / "run" / started).mkdir(parents=True)
    code, printed = command("validate", config, override)
    assert code == (2 if refused else 0), printed
    assert (override.partition("=")[0] in printed) == refused


def test_keys_of_steps_that_have_not_started_may_change(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = tiny
    config = write_config(folder, raw)
    assert command("prepare", str(config))[0] == 0
    code, printed = command("prepare", str(config), "sampling.teacher.temperature=0.5")
    assert (code, "prepare: committed, skipped" in printed) == (0, True), printed
    assert (
        yaml.safe_load((folder / "run" / "run.yaml").read_text())["config"]["sampling"]["teacher"]["temperature"] == 0.5
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1", "template of student: not a valid Jinja template"),
        (
            "{{ messags[-1].content }}{{ messages[-1].content }}",
            "template of student: unknown variable messags; the variables are `messages`",
        ),
    ],
)
def test_an_unusable_template_is_refused_before_anything_is_read(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]], template: str, message: str
) -> None:
    folder, raw = tiny
    raw["student"]["template"] = template
    code, printed = command("validate", str(write_config(folder, raw)))
    assert (code, message in printed) == (2, True), printed


def test_all_problems_of_the_inputs_are_reported_at_once(
    tiny: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = tiny
    raw["sampling"]["teacher"]["engine"] = {"max_num_seq": 4}
    raw["training"]["deepspeed"] = "zero9"
    code, printed = command("validate", str(write_config(folder, raw)))
    assert code == 2
    assert "2 problems:" in printed
    assert "max_num_seqs" in printed, "suggests the nearest name"
    assert "zero9" in printed
    assert "Traceback" not in printed


def test_a_run_directory_without_write_permission_is_refused(tiny: tuple[Path, dict[str, Any]]) -> None:
    _, raw = tiny
    raw["run"]["dir"] = "/proc/plad-run"  # not even root can create folders in /proc
    with pytest.raises(ValueError, match="/proc/plad-run: cannot be written"):
        open_run(parse_config(raw, "test"))


def test_the_version_and_the_help_are_shown(command: Callable[..., tuple[int, str]]) -> None:
    assert command("--version") == (0, "plad-dist 0.2.0\n")
    code, printed = command("--help")
    assert code == 0
    for name in ("run", "prepare", "sample", "pair", "train", "evaluate", "report", "status", "validate"):
        assert name in printed
