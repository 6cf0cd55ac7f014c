"""Snapshots of checkpoints, and training that ends at a collapse, with real DeepSpeed workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plad_dist.data.models import model_marker
from plad_dist.training.checkpoints.snapshot import write_snapshot
from plad_dist.training.checkpoints.store import Checkpoint
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord
from tests.numerics.crash import EVERY, PHASE, commit_before_the_next_step, prepared_run, store, weights
from tests.numerics.workers import job_of, train

pytestmark = pytest.mark.engine
START = CheckpointProbe(0, 5.0, 1.0, 0.0)


def snapshot(raw: dict[str, Any], checkpoint: Checkpoint | None, folder: Path) -> dict[str, torch.Tensor]:
    assert checkpoint is not None
    write_snapshot(job_of(raw, PHASE), checkpoint, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
def test_a_snapshot_of_the_last_checkpoint_is_the_exported_model(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    raw, run = prepared_run(tmp_path, max_steps=EVERY)
    raw["training"]["lora"] = lora
    train(tmp_path, raw, PHASE, 2)
    written = snapshot(raw, store(run).at(EVERY), tmp_path / "snapshot")
    expected = weights(run)
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(written[name], weight, rtol=0, atol=0 if lora is None else 1e-6)


def test_a_collapse_ends_training_and_the_latest_sound_checkpoint_becomes_the_model(tmp_path: Path) -> None:
    """That checkpoint is kept however old it is, and a later command trains no further either."""
    raw, run = prepared_run(tmp_path, max_steps=6 * EVERY, keep_checkpoints=1)
    raw["training"] |= {"watch": {}, "heldout_pairs": 0}  # so that no checkpoint is kept as the best one
    train(tmp_path, raw, PHASE, 2, stop=EVERY)
    expected = snapshot(raw, store(run).at(EVERY), tmp_path / "snapshot")
    record = CollapseRecord(job_of(raw, PHASE).fingerprint, START, [CheckpointProbe(EVERY, 5.0, 1.0, 0.0)], sound=EVERY)
    record.write(run.storage, PHASE)
    train(tmp_path, raw, PHASE, 2, stop=2 * EVERY)
    train(tmp_path, raw, PHASE, 2, stop=3 * EVERY)
    assert {step for step in store(run).steps() if store(run).is_committed(step)} == {EVERY, 3 * EVERY}
    CollapseRecord(**{**vars(record), "collapse": "at step 15 its responses are empty"}).write(run.storage, PHASE)
    train(tmp_path, raw, PHASE, 2)
    marker = model_marker(run.model(PHASE))
    assert marker is not None
    assert marker["facts"]["step"] == EVERY
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(run).items())


def test_a_collapse_ends_training_in_the_middle(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path, max_steps=6 * EVERY)
    raw["training"]["watch"] = {}
    train(tmp_path, raw, PHASE, 2, work=collapsed_later)
    marker = model_marker(run.model(PHASE))
    assert marker is not None
    assert marker["facts"]["step"] == EVERY


def collapsed_later(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train a phase whose second checkpoint is recorded as collapsed while training continues."""
    from plad_dist.training.worker.loop import Worker, train_loop

    commit_before_the_next_step()
    job = job_of(raw, phase)
    real = Worker.save

    def save(self: Worker) -> None:
        if self.state.step == 2 * EVERY and self.rank == 0:
            probes = [CheckpointProbe(EVERY, 5.0, 1.0, 0.0), CheckpointProbe(2 * EVERY, 90.0, 0.0, 0.9)]
            CollapseRecord(job.fingerprint, START, probes, sound=EVERY, collapse="it never ends").write(
                job.storage, phase
            )
        real(self)

    Worker.save = save  # type: ignore[method-assign]
    train_loop(job)


def test_a_collapse_without_a_sound_checkpoint_names_the_keys_to_change(tmp_path: Path) -> None:
    raw, run = prepared_run(tmp_path, max_steps=2 * EVERY)
    raw["training"]["watch"] = {}
    job = job_of(raw, PHASE)
    CollapseRecord(job.fingerprint, START, [CheckpointProbe(EVERY, 90.0, 0.0, 0.9)], collapse="it never ends").write(
        run.storage, PHASE
    )
    train(tmp_path, raw, PHASE, 1)
    assert not run.model(PHASE).exists()
    message = run.storage.read_json(job.stopped_key)["message"]
    assert "it never ends" in message
    assert "training.watch" in message
