"""Checkpoints under real DeepSpeed workers: killed at every point of a commit, damaged, of another size, of an attempt that is over."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from plad_dist.config_file import parse_config
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import RunDir, open_run
from plad_dist.training import checkpoints as module
from plad_dist.training.attempts import Attempt, claim
from plad_dist.training.checkpoints import Checkpoints, CheckpointStore, TrainState
from plad_dist.training.loop import Worker
from plad_dist.training.metrics import read_metrics
from plad_dist.verify import repair, verify
from tests.numerics.workers import config_with_pairs, job_of, losses, make_run, start, train, train_phase
from tests.s3 import environment

pytestmark = pytest.mark.engine
PHASE, EVERY, STEPS = "round-0", 5, 15


def begun(folder: Path, **round_: Any) -> tuple[dict[str, Any], RunDir]:
    raw = config_with_pairs(folder, **({"max_steps": STEPS, "checkpoint_every": EVERY} | round_))
    return raw, make_run(raw)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("undisturbed")
    raw, run = begun(folder)
    train(folder, raw, PHASE, 2)
    return run


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model(PHASE) / "model.safetensors")


def steps(run: RunDir) -> list[int]:
    return [row["step"] for row in read_metrics(run.root / "events" / PHASE)[0]]


def store(run: RunDir) -> CheckpointStore:
    return CheckpointStore(run.storage, PHASE, None)


# ------------------------------------------------------------------------------------------------------------ crash points


def die_when(owner: Any, name: str, when: Callable[..., bool], *, after: bool) -> None:
    """Kill this process at a call of a method."""
    real = getattr(owner, name)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        now = when(self, *arguments)
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, *arguments, **named)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def at_second_save(_: Any, engine: Any, state: TrainState, *rest: Any) -> bool:
    return state.step == 2 * EVERY


def in_second_folder(_: Any, key: str, *rest: Any, ending: str) -> bool:
    return f"step-{2 * EVERY:08d}" in key and key.endswith(ending)


# Where a worker dies, which one, and what it is told to die at.
POINTS: dict[str, tuple[int, Callable[[], None]]] = {
    "before anything is written": (1, partial(die_when, Checkpoints, "save", at_second_save, after=False)),
    "when it is staged and not carried": (0, partial(die_when, Checkpoints, "save", at_second_save, after=True)),
    "between the ranks: one has carried nothing": (
        1, partial(die_when, Storage, "upload", partial(in_second_folder, ending=".pt"), after=False),
    ),
    "between the ranks: one has not said that it is done": (
        1, partial(die_when, Storage, "replace", partial(in_second_folder, ending="rank-00001.json"), after=False),
    ),
    "before the marker": (0, partial(die_when, Storage, "create", partial(in_second_folder, ending="state.json"), after=False)),
    "after the marker": (0, partial(die_when, Storage, "create", partial(in_second_folder, ending="state.json"), after=True)),
    "while old ones are pruned": (
        0, partial(die_when, Storage, "delete_folder", lambda self, folder: True, after=False),
    ),
}  # fmt: skip


def train_and_die(point: str, raw: dict[str, Any], phase: str, stop: int) -> None:
    rank, arm = POINTS[point]
    if dist.get_rank() == rank:
        arm()
    train_phase(raw, phase, stop)


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_at_any_point_of_a_commit_costs_no_more_than_the_interval(
    tmp_path: Path, undisturbed: RunDir, point: str
) -> None:
    raw, run = begun(tmp_path, keep_checkpoints=1)
    processes = start(tmp_path, raw, PHASE, 2, work=partial(train_and_die, point))
    rank, _ = POINTS[point]
    processes[rank].join(timeout=200)
    for process in processes:
        process.kill()
        process.join()
    assert processes[rank].exitcode == -signal.SIGKILL, (tmp_path / f"worker-{rank}.log").read_text()[-2000:]
    left, damaged = store(run).newest()
    assert not damaged, "a checkpoint is whole or not there"
    assert left is not None
    assert left.state.step >= EVERY
    train(tmp_path, raw, PHASE, 2)
    assert losses(run, PHASE) == losses(undisturbed, PHASE)
    assert steps(run) == list(range(1, STEPS + 1))
    for name, expected in weights(undisturbed).items():
        assert torch.equal(weights(run)[name], expected), name
    assert wrong_with_checkpoints(run) == []
    assert len(list((run.root / "checkpoints" / PHASE).glob("step-*/state.json"))) == 1


def die_while_resharding(raw: dict[str, Any], phase: str, stop: int) -> None:
    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    module.load_resharded = killed
    train_phase(raw, phase, stop)


def test_sizes_change_in_the_middle_and_the_student_is_the_same(tmp_path: Path, undisturbed: RunDir) -> None:
    """From 2 to 1, where it is killed while it loads, to 3."""
    raw, run = begun(tmp_path)
    train(tmp_path, raw, PHASE, 2, stop=4)
    (process,) = start(tmp_path, raw, PHASE, 1, work=die_while_resharding)
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL
    train(tmp_path, raw, PHASE, 1, stop=9)
    train(tmp_path, raw, PHASE, 3)
    assert losses(run, PHASE) == pytest.approx(losses(undisturbed, PHASE), rel=1e-4)
    assert steps(run) == list(range(1, STEPS + 1))
    assert [row["workers"] for row in read_metrics(run.root / "events" / PHASE)[0]] == [2] * 4 + [1] * 5 + [3] * 6
    found = weights(run)
    for name, expected in weights(undisturbed).items():
        assert float((found[name] - expected).norm() / expected.norm()) <= 1e-4, name


# ------------------------------------------------------------------------------------------- damage, attempts, other places


def wrong_with_checkpoints(run: RunDir) -> list[str]:
    """What `plad verify` says of them."""
    return [
        line for item in verify(run.storage.url)[0] if item.path.startswith("checkpoints") for line in item.problems
    ]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("harm", [cut, alter, lose])
def test_a_damaged_newest_checkpoint_is_left_out_and_the_one_before_is_used(
    tmp_path: Path, undisturbed: RunDir, harm: Callable[[Path], None]
) -> None:
    raw, run = begun(tmp_path)
    train(tmp_path, raw, PHASE, 2, stop=EVERY)
    train(tmp_path, raw, PHASE, 2, stop=EVERY + 2)
    (file,) = (run.root / "checkpoints" / PHASE / f"step-{EVERY + 2:08d}").rglob("*rank_1_*optim_states.pt")
    harm(file)
    (problem,) = wrong_with_checkpoints(run)
    assert file.name in problem
    assert "goes on from the one before" in problem
    train(tmp_path, raw, PHASE, 2)
    assert losses(run, PHASE) == losses(undisturbed, PHASE)
    repair(run.storage.url, verify(run.storage.url)[0])
    assert wrong_with_checkpoints(run) == []


def overtaken(raw: dict[str, Any], phase: str, stop: int) -> None:
    """A worker group that another command overtakes after its first checkpoint, as if it had been frozen until then."""
    real = Worker._save

    def save(self: Worker) -> None:
        if self.state.step == 2 * EVERY and self.rank == 0:
            claim(self.job.storage, f"events/{phase}/attempts", "another")
        real(self)

    Worker._save = save  # type: ignore[method-assign]
    train_phase(raw, phase, stop)


def test_an_attempt_that_is_over_commits_neither_checkpoint_nor_model(tmp_path: Path) -> None:
    raw, run = begun(tmp_path)
    train(tmp_path, raw, PHASE, 2, work=overtaken)
    assert not run.model(PHASE).exists()
    found, _ = store(run).newest()
    assert found is not None
    assert found.state.step == EVERY
    assert "another command has begun to work" in run.storage.read_json(job_of(raw, PHASE).stopped_key)["message"]


def test_a_late_figure_of_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    lines = [(1, 1, 5.0), (2, 1, 6.0), (2, 2, 7.0), (2, 1, 8.0)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "attempt": {attempt}, "loss": {loss}}}\n' for step, attempt, loss in lines)
    )
    assert [row["loss"] for row in read_metrics(tmp_path)[0]] == [5.0, 7.0]


def test_attempts_are_numbered_once_and_the_last_one_holds(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = claim(storage, "attempts", "a")
    assert first.superseded() is None
    second = claim(storage, "attempts", "a")
    assert (first.number, second.number) == (1, 2)
    assert first.superseded() == "a"
    stale = Attempt(storage, "attempts", 1, "a")
    assert stale.superseded() == "a"
    third = claim(storage, "attempts", "b")
    assert second.superseded() == "b"
    for attempt, step in ((first, 0), (second, 10), (third, 10)):
        attempt.began_at(step)
    assert third.failures_before(10) == 0, "another command's attempts do not count"
    fourth = claim(storage, "attempts", "b")
    assert (fourth.failures_before(None), fourth.failures_before(10), fourth.failures_before(20)) == (0, 1, 0)
    third.leaves(10)
    assert fourth.failures_before(10) == 0, "it ended because it was told to"
    fifth, sixth = claim(storage, "attempts", "b"), claim(storage, "attempts", "b")
    assert (fifth.failures_before(None), sixth.failures_before(None)) == (1, 2), "they have not even begun"


def test_checkpoints_may_be_kept_on_an_object_store(
    tmp_path: Path,
    undisturbed: RunDir,
    server: str,
    bucket: str,
) -> None:
    """Read at the same size, and at another one."""
    raw, run = begun(tmp_path)
    raw["training"]["checkpoint_url"] = bucket
    open_run(parse_config(raw, "test"))
    reach = environment(server)
    train(tmp_path, raw, PHASE, 2, stop=EVERY, environment=reach)
    assert not list(run.root.glob("checkpoints/*/step-*"))
    train(tmp_path, raw, PHASE, 2, stop=EVERY + 3, environment=reach)
    assert losses(run, PHASE) == losses(undisturbed, PHASE)[: EVERY + 3]
    train(tmp_path, raw, PHASE, 1, environment=reach)
    assert losses(run, PHASE) == pytest.approx(losses(undisturbed, PHASE), rel=1e-4)
    found, damaged = CheckpointStore(Storage(bucket), PHASE, None).newest()
    assert (found and found.state.step, damaged) == (STEPS, {})
    checked, problems = verify(run.storage.url)
    assert (problems, [item.problems for item in checked if item.path == f"checkpoints/{PHASE}"]) == ([], [[]])


def test_checkpoints_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        raw, _ = begun(folder)
        raw["training"]["checkpoint_url"] = str(tmp_path / "kept")
        runs.append(raw)
    job_of(runs[0], PHASE)
    with pytest.raises(UserError, match=r"has the checkpoints of another run, .*/one/run"):
        job_of(runs[1], PHASE)


@pytest.mark.parametrize("case", ["several sub-groups", "muon", "adapters", "offloaded"])
def test_other_optimizer_states_change_their_size_too(tmp_path: Path, case: str) -> None:
    changes: dict[str, Any] = {"optimizer": {"name": "muon", "lr": 1e-2, "adam_lr": 5e-3}} if case == "muon" else {}
    found = {}
    for name, plan in (("straight", [(2, 0)]), ("resized", [(2, 4), (1, 8), (2, 0)])):
        folder = tmp_path / name
        folder.mkdir()
        raw, run = begun(folder, max_steps=10, **changes)
        settings = json.loads(Path(raw["training"]["deepspeed"]).read_text())
        if case == "several sub-groups":
            settings["zero_optimization"]["sub_group_size"] = 2000
        if case == "offloaded":
            settings["zero_optimization"] |= {
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            }
        Path(raw["training"]["deepspeed"]).write_text(json.dumps(settings))
        if case == "adapters":
            raw["training"]["lora"] = {"r": 4, "alpha": 8}
        for workers, stop in plan:
            train(folder, raw, PHASE, workers, stop=stop)
        found[name] = run
    assert losses(found["resized"], PHASE) == pytest.approx(losses(found["straight"], PHASE), rel=1e-4)


def test_storage_that_does_not_answer_is_no_damage(tmp_path: Path) -> None:
    raw, run = begun(tmp_path, max_steps=EVERY)
    train(tmp_path, raw, PHASE, 1)
    before = store(run).newest()
    assert before[0] is not None

    class Failing(Storage):
        def read(self, key: str) -> bytes | None:
            raise RunFailed(f"{key}: cannot be read: 503")

    with pytest.raises(RunFailed, match="503"):
        CheckpointStore(Failing(run.storage.url), PHASE, None).newest()
    assert store(run).newest() == before


def test_where_every_checkpoint_is_damaged_training_does_not_begin_anew(tmp_path: Path) -> None:
    raw, run = begun(tmp_path)
    train(tmp_path, raw, PHASE, 1, stop=EVERY)
    for file in (run.root / "checkpoints" / PHASE).rglob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(RunFailed, match=r"every checkpoint is damaged .*optim_states.pt: missing"):
        job_of(raw, PHASE)


def test_checkpoints_are_written_by_time_too(tmp_path: Path) -> None:
    raw, run = begun(tmp_path, checkpoint_every=1000, checkpoint_seconds=0.01, keep_checkpoints=3)
    train(tmp_path, raw, PHASE, 2)
    assert len(list((run.root / "checkpoints" / PHASE).glob("step-*/state.json"))) == 3


def stall(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Five attempts of one command have ended before their first checkpoint."""
    if dist.get_rank() == 0:
        job = job_of(raw, phase)
        for _ in range(5):
            claim(job.storage, f"events/{phase}/attempts", job.launch).began_at(0)
    dist.barrier()
    train_phase(raw, phase, stop)


def test_attempts_that_get_nowhere_end_the_phase(tmp_path: Path) -> None:
    raw, run = begun(tmp_path)
    train(tmp_path, raw, PHASE, 1, work=stall)
    message = run.storage.read_json(job_of(raw, PHASE).stopped_key)["message"]
    assert "5 attempts in a row have failed before the first checkpoint after step 0" in message


def test_training_goes_on_before_a_checkpoint_is_committed(tmp_path: Path) -> None:
    raw, run = begun(tmp_path, max_steps=EVERY + 2)
    train(tmp_path, raw, PHASE, 2, work=with_storage_that_waits_for_the_next_step)
    committed = store(run).newest()[0]
    assert committed is not None
    assert committed.state.step == EVERY + 2


def with_storage_that_waits_for_the_next_step(raw: dict[str, Any], phase: str, stop: int) -> None:
    real, metrics = Storage.upload, Path(raw["run"]["dir"]) / "events" / phase / "metrics.jsonl"

    def slow(self: Storage, key: str, file: Path) -> None:
        while f"step-{EVERY:08d}" in key and f'"step": {EVERY + 1},' not in metrics.read_text():
            time.sleep(0.05)
        real(self, key, file)

    Storage.upload = slow  # type: ignore[method-assign]
    train_phase(raw, phase, stop)
