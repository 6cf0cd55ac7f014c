"""Checkpoints of real DeepSpeed workers: deaths, damage, resizes, superseded attempts."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.table import Table

from plad_dist.config_file import parse_config
from plad_dist.data.sealed import sealed_json, unsealed_json
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import RunDir, open_run
from plad_dist.status import status_table
from plad_dist.training.checkpoints.attempts import Attempt, claim
from plad_dist.training.checkpoints.store import CheckpointStore
from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.training.worker.loop import Worker
from plad_dist.verify.repair import repair
from plad_dist.verify.run import verify
from tests.numerics.crash import (
    EVERY,
    PHASE,
    POINTS,
    STEPS,
    alter,
    commit_before_the_next_step,
    cut,
    first_step_of_last_attempt,
    killed_at,
    lose,
    prepared_run,
    resized_in_the_middle,
    resized_with,
    skipped_when_damaged,
    store,
    undisturbed_run,
)
from tests.numerics.workers import job_of, losses, train, train_phase
from tests.s3 import environment

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


# The other points are in tests/chaos.
@pytest.mark.parametrize("point", random.Random(5).sample(sorted(POINTS), 2))
def test_a_worker_killed_in_a_commit_costs_at_most_one_interval(
    tmp_path: Path, undisturbed: RunDir, point: str
) -> None:
    killed_at(point, tmp_path, undisturbed)


def test_the_student_is_the_same_after_resizes_in_the_middle(tmp_path: Path, undisturbed: RunDir) -> None:
    resized_in_the_middle(tmp_path, undisturbed)


# -- damage, attempts, other storage


def test_a_damaged_newest_checkpoint_is_skipped_and_the_one_before_it_is_used(
    tmp_path: Path, undisturbed: RunDir
) -> None:
    skipped_when_damaged(alter, tmp_path, undisturbed)


def overtaken(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train while another command claims an attempt before the second checkpoint.

    This is the view of a group that was frozen and wakes up.
    """
    commit_before_the_next_step()
    real = Worker.save

    def save(self: Worker) -> None:
        if self.state.step == 2 * EVERY and self.rank == 0:
            claim(self.job.storage, f"events/{phase}/attempts", "another")
        real(self)

    Worker.save = save  # type: ignore[method-assign]
    train_phase(raw, phase, stop)


def test_a_superseded_attempt_commits_neither_checkpoint_nor_model(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path)
    train(tmp_path, raw, PHASE, 2, work=overtaken)
    assert not run.model(PHASE).exists()
    newest, _ = store(run).newest()
    assert newest is not None
    assert newest.state.step == EVERY
    assert "another command has started to train" in run.storage.read_json(job_of(raw, PHASE).stopped_key)["message"]


def test_a_late_figure_of_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    lines = [(1, 1, 5.0), (2, 1, 6.0), (2, 2, 7.0), (2, 1, 8.0)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "attempt": {attempt}, "loss": {loss}}}\n' for step, attempt, loss in lines)
    )
    assert [row["loss"] for row in read_metrics(tmp_path)[0]] == [5.0, 7.0]


def test_attempts_are_numbered_once_and_the_latest_one_counts(tmp_path: Path) -> None:
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
    assert fourth.failures_before(10) == 0, "it ended on request"
    fifth, sixth = claim(storage, "attempts", "b"), claim(storage, "attempts", "b")
    assert (fifth.failures_before(None), sixth.failures_before(None)) == (1, 2), (
        "both failed before they read a checkpoint"
    )


def test_checkpoints_may_be_kept_on_an_object_store(
    tmp_path: Path,
    undisturbed: RunDir,
    server: str,
    bucket: str,
) -> None:
    """They are read at the same size and at another one."""
    raw, run = prepared_run(tmp_path)
    raw["training"]["checkpoint_url"] = bucket
    open_run(parse_config(raw, "test"))
    reach = environment(server)
    train(tmp_path, raw, PHASE, 2, stop=EVERY, environment=reach)
    assert not list(run.root.glob("checkpoints/*/step-*"))
    train(tmp_path, raw, PHASE, 2, stop=EVERY + 3, environment=reach)
    assert first_step_of_last_attempt(run) == EVERY + 1
    assert losses(run, PHASE) == losses(undisturbed, PHASE)[: EVERY + 3]
    train(tmp_path, raw, PHASE, 1, environment=reach)
    assert losses(run, PHASE) == pytest.approx(losses(undisturbed, PHASE), rel=1e-4)
    newest, damaged = CheckpointStore(Storage(bucket), PHASE, None).newest()
    assert (newest and newest.state.step, damaged) == (STEPS, {})
    checked, problems = verify(run.storage.url)
    assert (problems, [item.problems for item in checked if item.path == f"checkpoints/{PHASE}"]) == ([], [[]])


def test_checkpoints_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        raw, _ = prepared_run(folder)
        raw["training"]["checkpoint_url"] = str(tmp_path / "kept")
        runs.append(raw)
    job_of(runs[0], PHASE)
    with pytest.raises(UserError, match=r"has the checkpoints of another run, .*/one/run"):
        job_of(runs[1], PHASE)


def test_several_sub_groups_are_resized_too(tmp_path: Path) -> None:
    resized_with("several sub-groups", tmp_path)


def test_storage_that_does_not_respond_is_no_damage(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path, max_steps=EVERY)
    train(tmp_path, raw, PHASE, 1)
    before = store(run).newest()
    assert before[0] is not None

    class Failing(Storage):
        def read(self, key: str) -> bytes | None:
            raise RunFailed(f"{key}: cannot be read: 503")

    with pytest.raises(RunFailed, match="503"):
        CheckpointStore(Failing(run.storage.url), PHASE, None).newest()
    assert store(run).newest() == before


def test_training_does_not_restart_from_the_beginning_if_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path)
    train(tmp_path, raw, PHASE, 1, stop=EVERY)
    for file in (run.root / "checkpoints" / PHASE).rglob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(RunFailed, match=r"every checkpoint is damaged .*optim_states.pt: missing"):
        job_of(raw, PHASE)
    assert "every checkpoint is damaged" in _shown(status_table(run.storage.url))
    repair(run.storage.url, verify(run.storage.url)[0])
    with pytest.raises(RunFailed, match=rf"every checkpoint is damaged .*steps {EVERY} were set aside"):
        job_of(raw, PHASE)


def _shown(table: Table) -> str:
    return " ".join(str(cell) for column in table.columns for cell in column.cells)


def test_repair_keeps_a_checkpoint_that_was_committed_again(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path)
    train(tmp_path, raw, PHASE, 1, stop=EVERY)
    (file,) = (run.root / "checkpoints" / PHASE).rglob("*optim_states.pt")
    sound = file.read_bytes()
    cut(file)
    checked = verify(run.storage.url)[0]
    file.write_bytes(sound)
    repair(run.storage.url, checked)
    assert store(run).newest()[0] is not None


def test_a_sound_checkpoint_is_kept_until_training_passes_the_damaged_step(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path, keep_checkpoints=2)
    train(tmp_path, raw, PHASE, 1, stop=EVERY)
    train(tmp_path, raw, PHASE, 1, stop=2 * EVERY)
    (file,) = (run.root / "checkpoints" / PHASE / f"step-{2 * EVERY:08d}").rglob("*optim_states.pt")
    lose(file)
    train(tmp_path, raw, PHASE, 1, stop=EVERY + 1)
    assert [step for step in store(run).steps() if store(run).is_committed(step)] == [EVERY + 1, EVERY]


def test_another_precision_is_refused(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path)
    train(tmp_path, raw, PHASE, 1, stop=EVERY)
    (state,) = (run.root / "checkpoints" / PHASE).rglob("state.json")
    document = unsealed_json(state.read_bytes())
    document["state"]["dtype"] = "bfloat16"
    state.write_bytes(sealed_json(json.dumps(document)))
    train(tmp_path, raw, PHASE, 1)
    stopped = run.storage.read_json(job_of(raw, PHASE).stopped_key)
    assert "was trained in bfloat16, now it would be float32: set training.dtype=bfloat16" in stopped["message"]


def test_checkpoints_are_written_by_time_too(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path, checkpoint_every=1000, checkpoint_seconds=0.01, keep_checkpoints=3)
    train(tmp_path, raw, PHASE, 2, work=without_delay)
    assert len(list((run.root / "checkpoints" / PHASE).glob("step-*/state.json"))) == 3


def without_delay(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train a phase whose checkpoints are all committed before the next step."""
    commit_before_the_next_step()
    train_phase(raw, phase, stop)


def stall(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train a phase after five attempts of the same command have failed without a checkpoint."""
    if dist.get_rank() == 0:
        job = job_of(raw, phase)
        for _ in range(5):
            claim(job.storage, f"events/{phase}/attempts", job.launch).began_at(0)
    dist.barrier()
    train_phase(raw, phase, stop)


def test_attempts_without_progress_end_the_phase(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path)
    train(tmp_path, raw, PHASE, 1, work=stall)
    message = run.storage.read_json(job_of(raw, PHASE).stopped_key)["message"]
    assert "5 attempts in a row have failed before the first checkpoint after step 0" in message


def test_training_continues_before_a_checkpoint_is_committed(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path, max_steps=EVERY + 2)
    train(tmp_path, raw, PHASE, 2, work=with_storage_that_waits_for_the_next_step)
    newest = store(run).newest()[0]
    assert newest is not None
    assert newest.state.step == EVERY + 2


def with_storage_that_waits_for_the_next_step(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train a phase whose first checkpoint is uploaded only after the next step."""
    real, metrics = Storage.upload, Path(raw["run"]["dir"]) / "events" / phase / "metrics.jsonl"

    def slow(self: Storage, key: str, file: Path) -> None:
        while f"step-{EVERY:08d}" in key and f'"step": {EVERY + 1},' not in metrics.read_text():
            time.sleep(0.05)
        real(self, key, file)

    Storage.upload = slow  # type: ignore[method-assign]
    train_phase(raw, phase, stop)
