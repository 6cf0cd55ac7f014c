"""One small run of all stages on real engines, killed while it samples and while it trains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch

from plad_dist.config_file import load_config
from plad_dist.data.conversation import Conversation
from plad_dist.errors import UserError
from plad_dist.evaluation.comparison import compare_runs
from plad_dist.evaluation.over_seeds import study_over_seeds
from plad_dist.planning.workload import workload_of
from plad_dist.rundir import RunDir
from plad_dist.sampling.job import sample_seed
from plad_dist.systems import PLAD, SEQKD, TEACHER, WARMUP, System
from tests.catalog import entries_without_folder, folders_without_entry
from tests.conftest import plad, tiny_config, write_config, write_prompts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

Stamp = tuple[bytes, int]


@dataclass
class Finished:
    """A finished run, and its state at the times when it was killed."""

    root: Path
    config: Path
    committed_at_kill: dict[Path, Stamp]
    step_at_kill: int
    log: str
    output: str
    surviving_processes: list[str]


def stamps(root: Path) -> dict[Path, Stamp]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("part-*.arrow")}


def kill_when(config: Path, condition: Any, command: str = "run") -> None:
    """Start `plad`, and `kill -9` it as soon as a condition holds."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from plad_dist.cli import main; main()", command, str(config)],
        stdout=subprocess.DEVNULL,
        stderr=(config.parent / "killed.log").open("a"),
        start_new_session=True,
        cwd=config.parent,
    )
    try:
        deadline = time.monotonic() + 700
        while not condition():
            assert process.poll() is None, (config.parent / "killed.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def processes(ignored: Collection[str] = ()) -> list[str]:
    """Return the living processes of Ray and vLLM, except those with ignored process ids."""
    listing = subprocess.run(["ps", "-eo", "pid,stat,args"], capture_output=True, text=True, check=True).stdout
    return [
        line
        for line in listing.splitlines()
        if re.search(r"ray::|VLLM::|raylet|gcs_server", line) and " Z" not in line and "ps -eo" not in line
        if line.split()[0] not in ignored
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, before = tmp_path_factory.mktemp("pipeline"), {line.split()[0] for line in processes()}
    write_prompts(folder)
    raw, root = tiny_config(folder), folder / "run"
    # With more sequences, all blocks end at once, with no time between them for a kill.
    raw["sampling"]["student"]["engine"]["max_num_seqs"] = 16
    raw["run"]["dir"] = "run"  # relative to the working directory of the user; workers have another
    config = write_config(folder, raw)

    kill_when(config, lambda: any((root / "samples" / "student" / "round-0").glob("part-*.arrow")))
    committed = stamps(root)
    assert not (root / "samples" / "student" / "round-0" / "manifest.json").exists(), (
        "killed too late to prove anything"
    )

    kill_when(config, lambda: (root / "checkpoints" / "round-0" / "latest.json").exists())
    step = json.loads((root / "checkpoints" / "round-0" / "latest.json").read_text())["step"]
    assert not (root / "models" / "round-0").exists(), "killed too late to prove anything"
    committed |= stamps(root)

    last = plad("run", str(config), timeout=900, cwd=folder)
    assert last.returncode == 0, last.stderr[-4000:]
    deadline = time.monotonic() + 120
    while (surviving := processes(before)) and time.monotonic() < deadline:
        time.sleep(1)
    log = (root / "logs" / "plad.log").read_text()
    return Finished(root, config, committed, step, log, last.stdout + last.stderr, surviving)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("part-*.arrow")))


def test_every_folder_of_the_run_has_an_entry_in_the_catalog_and_every_entry_a_folder(finished: Finished) -> None:
    config = load_config(finished.config, [f"run.dir={finished.root}"])
    run = RunDir.of(config)
    assert folders_without_entry(config, run) == set()
    assert entries_without_folder(config, run) == set()


def test_the_run_directory_has_its_documented_layout(finished: Finished) -> None:
    root = finished.root
    for path in (
        "run.yaml",
        "prompts/manifest.json",
        "samples/teacher/round-0/manifest.json",
        "samples/student/round-0/manifest.json",
        "pairs/round-0/manifest.json",
        "eval/round-0/metrics.json",
        "eval/round-0/report.html",
    ):
        assert (root / path).is_file(), path
    for phase in ("teacher", "warmup", "round-0", "seqkd"):
        assert (root / "models" / phase / "model.safetensors").is_file()
        latest = json.loads((root / "checkpoints" / phase / "latest.json").read_text())
        assert (root / "checkpoints" / phase / f"step-{latest['step']:08d}").is_dir()
        assert list((root / "events" / phase).glob("events.out.tfevents.*"))


def test_nothing_committed_before_a_kill_was_written_again(finished: Finished) -> None:
    assert len(finished.committed_at_kill) > 9
    for path, stamp in finished.committed_at_kill.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == stamp, path


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_every_prompt_has_its_sample_exactly_once(finished: Finished, role: str) -> None:
    prompts = read(finished.root / "prompts")["prompt_id"].to_pylist()
    samples = read(finished.root / "samples" / role / "round-0")
    assert samples["prompt_id"].to_pylist() == prompts
    assert set(samples["sample_index"].to_pylist()) == {0}
    assert set(samples["finish_reason"].to_pylist()) <= {"stop", "length"}
    assert samples["error"].null_count == len(prompts)
    assert all(value < 0 for value in samples["logprob"].to_pylist())


@pytest.mark.parametrize(("role", "systems"), [("teacher", [TEACHER]), ("student", [WARMUP, SEQKD, PLAD])])
def test_the_plan_counts_the_answers_that_were_sampled(finished: Finished, role: str, systems: list[System]) -> None:
    config = load_config(str(finished.config), [f"run.dir={finished.root}"])
    run = RunDir.of(config)
    answers = [run.system_samples(system, name) for system in systems for name in config.system_decodings(system)]
    datasets = [run.heldout_samples(role), *answers, *([run.candidates()] if role == "student" else [])]
    assert workload_of(config).heldout_responses(config, role) == sum(
        dataset.require("sample").rows for dataset in datasets
    )


def test_training_resumed_from_the_checkpoint(finished: Finished) -> None:
    first_steps = re.findall(r"train round-0: zero stage 3 with 2 ranks; .*step (\d+) of", finished.log)
    assert int(first_steps[-1]) >= finished.step_at_kill >= 10
    records = [json.loads(line) for line in (finished.root / "events/round-0/metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))


def test_the_log_shows_zero_stage_3_with_parameters_partitioned(finished: Finished) -> None:
    shares = re.findall(
        r"zero stage 3 with 2 ranks; [\d,]+ parameters, this rank holds [\d,]+ \((\d+)%\)", finished.log
    )
    assert shares
    assert all(45 <= int(share) <= 55 for share in shares)


def test_the_samples_load_in_datasets(finished: Finished, tmp_path: Path) -> None:
    pattern = str(finished.root / "samples/teacher/round-0/*.arrow")
    loaded = datasets.load_dataset("arrow", data_files=pattern, cache_dir=str(tmp_path))["train"]
    assert loaded.num_rows == read(finished.root / "prompts").num_rows


def test_the_student_loads_in_transformers_and_ranks_pairs_as_the_trainer_reported(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.root / "models" / "round-0"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    pairs = read(finished.root / "eval/round-0/pairs").to_pylist()

    def logp(prompt: list[int], response: list[int]) -> float:
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        return float(logps[at, torch.tensor(response)].sum())

    with torch.no_grad():
        right = [
            logp(row["prompt_token_ids"], row["chosen_token_ids"])
            > logp(row["prompt_token_ids"], row["rejected_token_ids"])
            for row in pairs
        ]
        scored = read(finished.root / "eval/round-0/scored/candidates/plad").to_pylist()
        prompt_ids = {row["prompt_id"]: row["prompt_token_ids"] for row in pairs}
        compared = [row for row in scored if row["prompt_id"] in prompt_ids]
        for row in compared[:20]:
            expected = logp(prompt_ids[row["prompt_id"]], row["token_ids"])
            assert row["logprob"] == pytest.approx(expected, rel=1e-3), "vLLM scores like a plain forward pass"
    assert len(compared) >= 20
    metrics = json.loads((finished.root / "eval/round-0/metrics.json").read_text())
    assert metrics["ranking"]["pairs"] == len(pairs)
    assert metrics["ranking"]["after"]["pair_accuracy"] == pytest.approx(sum(right) / len(right), abs=1 / len(pairs))


def test_the_report_compares_the_four_systems(finished: Finished) -> None:
    metrics = json.loads((finished.root / "eval/round-0/metrics.json").read_text())
    compared = {(row["system"], row["decoding"]) for row in metrics["systems"]}
    assert compared == {(s, d) for s in ("teacher", "warmup", "seqkd", "plad") for d in ("greedy", "sampled")} | {
        ("warmup", "t0.5")
    }
    assert metrics["calibration"]["candidates"] == 2
    assert set(metrics["calibration"]["systems"]) == {"warmup", "seqkd", "plad"}
    card = (finished.root / "models/round-0/README.md").read_text()
    assert metrics["verdict"][0] in card
    page = (finished.root / "eval/round-0/report.html").read_text()
    assert "<html" in page
    for verdict in metrics["verdict"]:
        assert verdict.split()[0] in finished.output
    assert str(finished.root / "eval/round-0/report.html") in finished.output


def test_the_figures_over_seeds_of_one_run_equal_those_of_its_report(finished: Finished) -> None:
    """A variant without a control of its own borrows the control of the first variant."""
    metrics = json.loads((finished.root / "eval/round-0/metrics.json").read_text())
    root = str(finished.root)
    own, other = study_over_seeds([{"own": root, "other": root}])
    assert (own.seeds, own.figures) == (other.seeds, other.figures)
    rows = {(row["system"], row["decoding"]): row for row in metrics["systems"]}
    for prefix, decoding in (("", "sampled"), ("greedy_", "greedy")):
        expected = rows["plad", decoding]
        assert own.figures[f"{prefix}rouge_l_plad"].value == pytest.approx(expected["rouge_l"]["value"])
        assert own.figures[f"{prefix}win_rate_vs_warmup"].value == pytest.approx(
            expected["win_rate_vs_warmup"]["value"]
        )
        assert own.figures[f"{prefix}win_rate_vs_seqkd"].value == pytest.approx(
            metrics["plad_vs_seqkd"][decoding]["value"]
        )
    ranking = metrics["ranking"]
    gain = ranking["after"]["pair_accuracy"] - ranking["before"]["pair_accuracy"]
    assert own.figures["pair_accuracy_gain"].value == pytest.approx(gain)


def test_systems_with_identical_responses_are_compared_once(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.root, tmp_path / "again")
    alone, both = (
        compare_runs(paths) for paths in ([str(finished.root)], [str(finished.root), str(tmp_path / "again")])
    )
    assert [row.system for row in both.systems] == [TEACHER, WARMUP, SEQKD, PLAD]
    for row_alone, row_of_both in zip(alone.systems, both.systems, strict=True):
        assert row_alone.model_copy(update={"label": row_of_both.label}) == row_of_both
    with pytest.raises(UserError, match="again: given twice"):
        compare_runs([str(finished.root), *[str(tmp_path / "again")] * 2])


def test_runs_are_compared_under_the_requested_decoding(finished: Finished) -> None:
    compared = compare_runs([str(finished.root)], "greedy")
    figures = json.loads((finished.root / "eval" / "round-0" / "metrics.json").read_bytes())
    own = {row["system"]: row["rouge_l"] for row in figures["systems"] if row["decoding"] == "greedy"}
    assert compared.decoding == "greedy"
    for row in compared.systems:
        assert row.rouge_l is not None
        assert row.rouge_l.value == pytest.approx(own[str(row.system)]["value"])
    with pytest.raises(UserError, match="--decoding beam: run has greedy, sampled"):
        compare_runs([str(finished.root)], "beam")


def test_engines_with_swapped_weights_respond_like_the_model_of_those_weights(finished: Finished) -> None:
    """Greedy responses after a change of weights equal those of plain transformers."""
    from transformers import AutoModelForCausalLM

    config = load_config(finished.config, [f"run.dir={finished.root}"])
    run = RunDir.of(config)
    from plad_dist.data.prompts import heldout_prompts
    from plad_dist.data.templates import Renderer

    prompts = heldout_prompts(run.storage).read().slice(0, 40).to_pylist()
    for system, folder in ((SEQKD, "seqkd"), (PLAD, "round-0")):
        model = AutoModelForCausalLM.from_pretrained(run.model(folder), dtype=torch.float32)
        renderer = Renderer(str(run.model(folder)), config.student)
        answers = run.system_samples(system, "greedy").read().to_pylist()
        same = 0
        for prompt, answer in zip(prompts, answers, strict=False):
            ids = torch.tensor(renderer.prompt_ids([Conversation.from_row(prompt)]))
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            same += written[0, ids.shape[1] :].tolist() == answer["token_ids"]
        assert same >= 0.95 * len(answers), f"{system}: {same} of {len(answers)}"


def test_a_second_command_does_nothing_and_reports_it(finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished.root / "models").rglob("*")} | stamps(finished.root)
    again = plad("run", str(finished.config), cwd=finished.root.parent)
    assert again.returncode == 0
    assert "nothing to do: everything is committed" in again.stderr
    assert "Ray" not in again.stderr
    assert "begins" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (finished.root / "models").rglob("*")} | stamps(
        finished.root
    ) == before


def test_status_shows_a_finished_run(finished: Finished) -> None:
    shown = plad("status", str(finished.root))
    assert shown.returncode == 0
    assert "started" not in shown.stdout
    assert shown.stdout.count("complete") >= 15


def test_no_process_outlives_the_run(finished: Finished) -> None:
    assert finished.surviving_processes == []


def test_seeds_depend_on_every_part_of_their_key() -> None:
    seeds = {
        sample_seed(*key)
        for key in [(1, 0, "t", "p", 0), (2, 0, "t", "p", 0), (1, 1, "t", "p", 0), (1, 0, "s", "p", 0)]
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_an_engine_without_memory_is_refused_with_advice(finished: Finished) -> None:
    """The error of vLLM becomes a message that names the key to change, with exit code 2."""
    root = finished.root.parent / "run-memory"
    config = finished.config.with_name("memory.yaml")
    raw = tiny_config(finished.root.parent)
    raw["run"]["dir"] = str(root)
    raw["teacher"] = {"path": str(finished.root / "models" / "teacher"), "template": raw["teacher"]["template"]}
    raw["student"] = {"path": str(finished.root / "models" / "warmup"), "template": raw["student"]["template"]}
    for phase in ("teacher", "warmup"):
        del raw["training"][phase]
    raw["sampling"]["teacher"]["engine"]["kv_cache_memory_bytes"] = 1 << 45
    raw["sampling"]["student"]["engine"]["kv_cache_memory_bytes"] = 1 << 45
    config.write_text(json.dumps(raw))
    planned = plad("run", str(config), timeout=400)
    assert planned.returncode == 2, planned.stderr[-3000:]
    assert "this config does not fit" in planned.stderr
    tried = plad("run", str(config), "cluster.unfit=warn", timeout=400)
    assert tried.returncode == 2, tried.stderr[-3000:]
    assert "vLLM could not start" in tried.stderr
    assert "kv_cache_memory_bytes" in tried.stderr
    assert "Traceback" not in tried.stderr
    assert not list((root / "samples").rglob("*.arrow"))


def test_the_run_is_sound(finished: Finished) -> None:
    verified = plad("verify", str(finished.root))
    assert verified.returncode == 0, verified.stdout + verified.stderr
