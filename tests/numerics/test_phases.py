"""Phases of real DeepSpeed workers: losses, adapters, evaluations, export, stops."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plad_dist.data.dataset import Dataset
from plad_dist.data.schemas import INITIAL_LOGPS
from plad_dist.rundir import RunDir
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.training.worker import trackers
from plad_dist.training.worker.loop import train_loop
from plad_dist.training.worker.metrics_log import MetricsLog
from plad_dist.verify.run import verify
from tests.numerics.workers import config_with_pairs, job_of, losses, make_run, some_pairs, start, train, two_engines
from tests.tiny import make_random_model

pytestmark = pytest.mark.engine
PHASE = "round-0"


def trained(folder: Path, training: dict[str, Any] | None = None, workers: int = 1, **round_: Any) -> RunDir:
    raw = config_with_pairs(folder, **({"max_steps": 4} | round_))
    raw["training"] |= training or {}
    run = make_run(raw)
    train(folder, raw, PHASE, workers)
    return run


def stop_reason(run: RunDir) -> tuple[str, bool]:
    """Return the message with which the workers stopped, and if the user must correct an input."""
    (path,) = (run.root / "checkpoints" / PHASE).glob("stopped-*.json")
    stop = json.loads(path.read_text())
    return stop["message"], stop["by_user"]


def logp(model: Any, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + place, token]) for place, token in enumerate(response))


def test_initial_logps_are_the_starting_students_and_are_computed_once(tmp_path: Path) -> None:
    run = trained(tmp_path, workers=2, loss={"name": "dpo"})
    assert losses(run, PHASE)[0] == pytest.approx(math.log(2), rel=1e-5), "the student has not changed yet"
    (folder,) = (run.root / run.pairs().path).glob("initial-logps-*")
    table = Dataset(run.storage, f"{run.pairs().path}/{folder.name}", INITIAL_LOGPS).read()
    pairs = run.pairs().read()
    assert table["prompt_id"].to_pylist() == pairs["prompt_id"].to_pylist()
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "student").double()
    for row, initial in zip(pairs.to_pylist()[::7], table.to_pylist()[::7], strict=True):
        for side in ("chosen", "rejected"):
            expected = logp(start, row["prompt_token_ids"], row[f"{side}_token_ids"])
            assert initial[f"{side}_initial_logp"] == pytest.approx(expected, rel=1e-5)
    checked, _ = verify(run.storage.url)
    assert not [problem for item in checked for problem in item.problems if "initial-logps" in problem]


def test_lost_initial_logps_are_computed_from_the_starting_student_at_a_resume(tmp_path: Path) -> None:
    raw = config_with_pairs(tmp_path, max_steps=4, loss={"name": "dpo"}, optimizer={"lr": 2e-2})
    run = make_run(raw)
    train(tmp_path, raw, PHASE, 2, stop=2)
    (folder,) = (run.root / run.pairs().path).glob("initial-logps-*")
    before = [pa.ipc.open_file(part).read_all() for part in sorted(folder.glob("*.arrow"))]
    shutil.rmtree(folder)
    train(tmp_path, raw, PHASE, 2)
    assert before
    for part, table in zip(sorted(folder.glob("*.arrow")), before, strict=True):
        assert pa.ipc.open_file(part).read_all().equals(table)
    assert [row["attempt"] for row in read_metrics(run.root / "events" / PHASE)[0]] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "loss", [{"name": "listwise"}, {"name": "margin", "margin": 2.0}, {"name": "orpo", "beta": 0.5}]
)
def test_other_losses_decrease(tmp_path: Path, loss: dict[str, Any]) -> None:
    run = trained(tmp_path, loss=loss, max_steps=12, optimizer={"lr": 1e-2})
    assert all(math.isfinite(value) for value in losses(run, PHASE))
    _, heldout = read_metrics(run.root / "events" / PHASE)
    assert heldout[-1]["heldout"]["loss"] < heldout[0]["heldout"]["loss"]


def test_a_muon_step_moves_every_matrix_by_its_rate(tmp_path: Path) -> None:
    """Updates are orthogonal up to the tolerance of five Newton-Schulz steps.

    Clipping does not shrink them.
    """
    rate = 1e-2
    optimizer = {"name": "muon", "lr": rate, "schedule": "constant", "warmup_share": 0.0, "clip_norm": 1e-3}
    run = trained(tmp_path, workers=2, max_steps=1, optimizer=optimizer)
    start, after = load_file(tmp_path / "student/model.safetensors"), load_file(run.model(PHASE) / "model.safetensors")
    matrices = [name for name in start if "proj" in name]
    assert matrices
    for name in matrices:
        rows, columns = start[name].shape
        largest = float(torch.linalg.matrix_norm(after[name] - start[name], 2)) / math.sqrt(max(1, rows / columns))
        assert 0.6 * rate < largest < 1.3 * rate, name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wte.weight", {"model_type": "gpt_neo", "attention_types": [[["global"], 1]]}),
        ("shared.weight", {"model_type": "t5", "d_kv": 32, "d_ff": 64}),
    ],
)
def test_muon_leaves_embeddings_to_adam_whatever_their_names(tmp_path: Path, name: str, shape: dict[str, Any]) -> None:
    """Adam's first update changes each element by its rate."""
    optimizer = {"name": "muon", "lr": 0.1, "adam_lr": 1e-3, "schedule": "constant", "warmup_share": 0.0}
    raw = config_with_pairs(tmp_path, max_steps=1, optimizer=optimizer | {"weight_decay": 0.0})
    make_random_model(tmp_path / "student", 2, **shape)
    run = make_run(raw)
    train(tmp_path, raw, PHASE, 2)
    start, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "student", run.model(PHASE)))
    assert float((after[name] - start[name]).abs().max()) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(("family", "changes"), [("gpt_neo", True), ("llama", False)])
def test_checkpoints_from_when_muon_took_embeddings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: bool
) -> None:
    raw = config_with_pairs(tmp_path, max_steps=1, optimizer={"name": "muon", "lr": 0.1})
    shape = {"attention_types": [[["global"], 1]]} if family == "gpt_neo" else {}
    make_random_model(tmp_path / "student", 2, model_type=family, **shape)
    make_run(raw)
    present = job_of(raw, PHASE).fingerprint
    monkeypatch.setattr("plad_dist.training.plan.unnamed_embeddings", lambda model: {})
    assert (job_of(raw, PHASE).fingerprint != present) == changes


def test_adapters_are_merged_into_the_model_and_also_stored_alone(tmp_path: Path) -> None:
    """Two workers, interrupted after three steps and resumed."""
    raw = config_with_pairs(tmp_path, max_steps=6, optimizer={"lr": 2e-2})
    raw["training"]["lora"] = {"r": 4, "alpha": 8, "save_adapter": True}
    run = make_run(raw)
    train(tmp_path, raw, PHASE, 2, stop=3)
    (checkpoint,) = (run.root / "checkpoints" / PHASE).glob("step-*")
    train(tmp_path, raw, PHASE, 2)
    assert checkpoint.is_dir()
    values = losses(run, PHASE)
    assert len(values) == 6
    assert values[-1] < values[0]
    start, merged = load_file(tmp_path / "student/model.safetensors"), load_file(run.model(PHASE) / "model.safetensors")
    assert start.keys() == merged.keys()
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert changed
    assert all("proj" in name for name in changed), "embeddings, norms and the output layer are frozen"
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    adapted = PeftModel.from_pretrained(base, run.model(PHASE) / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = AutoModelForCausalLM.from_pretrained(run.model(PHASE))
    torch.testing.assert_close(adapted(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def on_a_node_without_the_model(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train a phase whose second rank runs on a node without the model's folder."""
    job = job_of(raw, phase)
    train_loop(job if dist.get_rank() == 0 else replace(job, start="/not/mounted"))


def test_an_error_on_one_node_ends_the_attempt_on_all_ranks_and_names_the_node(tmp_path: Path) -> None:
    """The attempt is retried, since it may succeed on another node."""
    raw = config_with_pairs(tmp_path, max_steps=2)
    make_run(raw)
    processes = start(tmp_path, raw, PHASE, 2, work=on_a_node_without_the_model)
    for rank, process in enumerate(processes):
        process.join(timeout=60)
        assert process.exitcode == 1
        log = (tmp_path / f"worker-{rank}.log").read_text()
        assert re.search(r"RunFailed: node \S+: /not/mounted: no such model folder", log)


def test_training_continues_without_a_tracker_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(run: str, phase: str, *, resumes: bool) -> Any:
        raise ConnectionError("the server does not respond")

    monkeypatch.setitem(trackers._TRACKERS, "wandb", unreachable)
    log = MetricsLog(tmp_path / "round-0", 0, 3, None, trackers=("wandb",), run=str(tmp_path))
    log.write_step(TrainState(1, 4, 9, 1, "f", stage=3, optimizer="", dtype=""), {"loss": 1.0})
    log.close()
    assert [row["loss"] for row in read_metrics(tmp_path / "round-0")[0]] == [1.0]


def test_training_stops_when_patience_runs_out_and_exports_the_best_checkpoint(tmp_path: Path) -> None:
    """At this learning rate the held-out loss soon rises."""
    run = trained(
        tmp_path, max_steps=40, evaluate_every=2, best_by="loss", patience=2, export="best", keep_checkpoints=1,
        optimizer={"lr": 5e-2, "warmup_share": 0.0},
    )  # fmt: skip
    steps, heldout = read_metrics(run.root / "events" / PHASE)
    values = {row["step"]: row["heldout"]["loss"] for row in heldout}
    last = steps[-1]["step"]
    assert last < 40
    best = min((step for step in values if step), key=values.__getitem__)
    assert last == best + 4
    facts = json.loads((run.model(PHASE) / "plad.json").read_text())["facts"]
    assert (facts["step"], facts["best_step"]) == (best, best)
    names = sorted(path.name for path in (run.root / "checkpoints" / PHASE).glob("step-*"))
    assert names == sorted({f"step-{best:08d}", f"step-{last:08d}"})
    model = AutoModelForCausalLM.from_pretrained(run.model(PHASE)).double()
    is_correct = [
        logp(model, row["prompt_token_ids"], row["chosen_token_ids"])
        > logp(model, row["prompt_token_ids"], row["rejected_token_ids"])
        for row in run.heldout_pairs().read().to_pylist()
    ]
    at_best = next(row["heldout"] for row in heldout if row["step"] == best)
    assert sum(is_correct) / len(is_correct) == pytest.approx(at_best["pair_accuracy"]), (
        "the weights are those of the best step"
    )


@pytest.mark.engine
def test_a_student_whose_files_lack_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers, and only say so."""
    raw = config_with_pairs(tmp_path, max_steps=1)
    run = make_run(raw)
    file = tmp_path / "student/model.safetensors"
    weights = load_file(file)
    save_file({name: w for name, w in weights.items() if "mlp" not in name}, file, metadata={"format": "pt"})
    train(tmp_path, raw, PHASE, 2)
    message, by_user = stop_reason(run)
    assert re.search(r"its files lack 3 weights of the model, such as model\.layers\.0\.mlp", message)
    assert by_user


def test_a_diverging_phase_stops_before_the_step_and_lists_groups(tmp_path: Path) -> None:
    run = trained(
        tmp_path, {"divergence_factor": 1.01}, max_steps=40, checkpoint_every=2,
        optimizer={"lr": 1.0, "warmup_share": 0.0, "clip_norm": 1e9},
    )  # fmt: skip
    message, by_user = stop_reason(run)
    assert "The step was not taken. Kept:" in message
    assert not by_user
    assert not (run.model(PHASE) / "plad.json").exists()


def test_a_loss_that_is_not_a_number_stops_the_phase_and_names_its_groups(tmp_path: Path) -> None:
    raw = config_with_pairs(tmp_path, max_steps=4)
    weights = load_file(tmp_path / "student/model.safetensors")
    weights["model.embed_tokens.weight"][100] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "student/model.safetensors", {"format": "pt"})
    run = make_run(raw)
    train(tmp_path, raw, PHASE, 1)
    message = stop_reason(run)[0]
    assert "step 1: the loss is nan" in message
    assert "no checkpoint yet" in message
    assert "pairs/round-0/part-0000" in message


@pytest.mark.parametrize("training", [{"deepspeed": "zero2"}, {"gradient_checkpointing": True}])
def test_losses_do_not_depend_on_how_they_are_computed(
    tmp_path: Path, plain: list[float], training: dict[str, Any]
) -> None:
    assert losses(trained(tmp_path, training, workers=2), PHASE) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("second_partition", [1, 2])
def test_a_closed_engine_holds_no_memory(tmp_path: Path, second_partition: int) -> None:
    raw = config_with_pairs(tmp_path)
    zero = json.loads((tmp_path / "zero3.json").read_text())
    zero["zero_optimization"]["zero_hpz_partition_size"] = second_partition
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    make_run(raw)
    train(tmp_path, raw, PHASE, 2, work=two_engines)
    for rank in (0, 1):
        lines = (tmp_path / f"worker-{rank}.log").read_text().splitlines()
        assert [line for line in lines if line.startswith("memory:")] == ["memory: free"] * 2


def test_eight_bit_states_stay_near_full_ones_and_resume_exactly(tmp_path: Path) -> None:
    runs = {}
    for name, optimizer, stop in (("full", "adamw", 0), ("eight", "adamw_8bit", 0), ("resumed", "adamw_8bit", 6)):
        folder = tmp_path / name
        folder.mkdir()
        raw = config_with_pairs(folder, max_steps=12, checkpoint_every=3, optimizer={"name": optimizer, "lr": 3e-3})
        runs[name] = make_run(raw)
        if stop:
            train(folder, raw, PHASE, 2, stop)
        train(folder, raw, PHASE, 2)
    full, eight = losses(runs["full"], PHASE), losses(runs["eight"], PHASE)
    assert full != eight
    assert eight == pytest.approx(full, rel=0.05)
    assert losses(runs["resumed"], PHASE) == eight


def test_piecewise_attention_trains_like_a_mask(tmp_path: Path) -> None:
    """With long groups, which are split, on several ranks and with recomputed activations."""
    all_losses = []
    for number, training in enumerate(({"attention": "sdpa"}, {}, {"gradient_checkpointing": True})):
        folder = tmp_path / str(number)
        folder.mkdir()
        raw = config_with_pairs(folder, max_steps=4)
        make_random_model(folder / "student", 2, max_position_embeddings=512)
        raw["training"] |= {"micro_batch_tokens": 600, **training}
        rows = some_pairs(0, 24)
        for row in rows:
            row["prompt_token_ids"] = row["prompt_token_ids"] * 10 + [5] * 90
        run = make_run(raw, [rows])
        train(folder, raw, PHASE, 2)
        all_losses.append(losses(run, PHASE))
    masked, piecewise, recomputed = all_losses
    assert piecewise == pytest.approx(masked, rel=1e-5)
    assert recomputed == pytest.approx(masked, rel=1e-5)
    assert piecewise != masked, "the arithmetic differs"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(trained(tmp_path_factory.mktemp("plain")), PHASE)


def test_every_step_has_its_health_figures(tmp_path: Path) -> None:
    steps, heldout = read_metrics(trained(tmp_path).root / "events" / PHASE)
    expected = {
        "loss", "active_share", "pair_accuracy", "chosen_logp", "rejected_logp", "chosen_logp_per_token",
        "chosen_logp_drift", "rejected_logp_drift", "grad_norm", "lr", "tokens_per_s", "prompt_tokens_saved",
        "input_wait_share", "memory_gb", "groups_dropped", "groups_cut",
        "groups_with_control_tokens",
    }  # fmt: skip
    assert expected <= steps[-1].keys()
    assert steps[0]["chosen_logp_drift"] == 0
    assert 0 < steps[0]["prompt_tokens_saved"] < 1
    assert [row["step"] for row in heldout] == [0, 4]
