"""Repair of a run directory: bad parts are set aside, and the next run redoes only them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plad_dist.data.claims import check_owned
from plad_dist.data.dataset import DAMAGED, Dataset
from plad_dist.data.manifest import Manifest
from plad_dist.errors import RunFailed
from plad_dist.rundir import RunDir, load_run
from plad_dist.training.checkpoints.store import CheckpointStore
from plad_dist.verify.models import is_damaged
from plad_dist.verify.parts import check_dataset
from plad_dist.verify.result import CheckpointsResult, CheckResult, DatasetResult


def repair(url: str, results: Sequence[CheckResult]) -> list[str]:
    """Set aside the bad parts and checkpoints of a run directory. Sound parts keep their checksums.

    No part is deleted: bad ones move to `damaged/` beside the others. The repair claims the run, so
    that a command that is at work on it ends.

    Returns:
        What was done, a line for each part.
    """
    actions: list[str] = []
    damaged = [result for result in results if result.bad]
    if not damaged:
        return actions
    run = RunDir.at(url).claimed("plad verify --repair")
    checkpoints = run.checkpoints(load_run(url).config)
    for result in damaged:
        check_owned(run.storage)
        match result:
            case CheckpointsResult():
                actions += _repair_checkpoints(CheckpointStore(checkpoints, result.phase, None), result)
            case DatasetResult():
                actions += _repair_dataset(run, result)
    return actions


def _repair_dataset(run: RunDir, result: DatasetResult) -> list[str]:
    dataset, entry = replace(result.dataset, storage=run.storage), result.entry
    # A part that was committed since the check is not bad any more.
    bad = (result.bad & check_dataset(dataset, entry).bad) | result.wrong_rows
    if not bad:
        return []
    moved = dataset.reopen(_readable_manifest(dataset), bad)
    actions = [
        f"{result.path}/{name}: {f'moved to {result.path}/{DAMAGED}/' if name in moved else 'will be rebuilt'}"
        for name in sorted(bad)
    ]
    if entry is not None and entry.is_heldout:
        actions += _delete_figures(run.at_round(entry.round), result.path)
    result.reset("incomplete")
    return actions


def _readable_manifest(dataset: Dataset) -> Manifest | None:
    try:
        return dataset.manifest()
    except RunFailed:
        return None


def _delete_figures(run: RunDir, path: str) -> list[str]:
    """Delete the figures and the report of a round, of which a dataset is to be rebuilt."""
    keys = [key for key in (run.metrics, run.report) if run.storage.exists(key)]
    for key in keys:
        run.storage.delete(key)
    return [f"{key}: deleted, because it was made from {path}" for key in keys]


def _repair_checkpoints(store: CheckpointStore, result: CheckpointsResult) -> list[str]:
    """Revoke the commits of damaged checkpoints.

    Their files stay until the next checkpoints are pruned.
    """
    actions = []
    for name in sorted(result.bad):
        step = int(name.rpartition("-")[2])
        if is_damaged(store, step):  # training may have committed it again since the check
            store.set_aside(step)
            actions.append(f"{result.path}/{name}: no longer counts as a checkpoint")
    result.reset("complete")
    return actions
