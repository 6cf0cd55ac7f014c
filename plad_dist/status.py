"""What of a run is committed, read from storage alone."""

from __future__ import annotations

import json
from datetime import datetime

from rich.table import Table

from plad_dist.config_file import parse_config
from plad_dist.data.models import model_marker
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.store import Dataset
from plad_dist.evaluation.stage import METRICS, REPORT, systems_of
from plad_dist.phases import phase_names
from plad_dist.rundir import RUN_FILE, RunDir, load_run
from plad_dist.sampling.stage import system_decodings


def status_table(path: str) -> Table:
    """One line per dataset, phase and figure of a run directory. Raises :class:`UserError` where it is none."""
    document = load_run(path)
    config = parse_config(document["config"], f"{path}/{RUN_FILE}")
    run = RunDir.at(path)
    table = Table("what", "state", "rows or steps", title=f"{path} ({document['fingerprint'][:12]})")
    for dataset in (train_prompts(run.storage), heldout_prompts(run.storage)):
        table.add_row(*_dataset_row(dataset))
    for phase in phase_names(config):
        table.add_row(*_phase_row(phase, run))
    for dataset in [run.samples("teacher"), run.samples("student"), run.pairs()]:
        table.add_row(*_dataset_row(dataset))
    for system in systems_of(config):
        for name in system_decodings(config, system):
            table.add_row(*_dataset_row(run.system_samples(system, name)))
    for key in (METRICS, REPORT):
        table.add_row(key, "complete" if run.storage.read(key) is not None else "-", "")
    return table


def _dataset_row(dataset: Dataset) -> tuple[str, str, str]:
    manifest = dataset.manifest()
    if manifest is not None:
        return dataset.path, "complete", f"{manifest.rows:,} rows in {len(manifest.parts)} parts"
    parts = len(dataset.committed())
    return dataset.path, "begun" if parts else "-", f"{parts} parts" if parts else ""


def _phase_row(phase: str, run: RunDir) -> tuple[str, str, str]:
    marker = model_marker(run.model(phase))
    if marker is not None:
        return f"models/{phase}", "complete", f"{marker['facts']['step']:,} steps"
    latest = run.root / "checkpoints" / phase / "latest.json"
    if not latest.is_file():
        return f"models/{phase}", "-", ""
    when = datetime.fromtimestamp(latest.stat().st_mtime).strftime("%H:%M:%S")
    return f"models/{phase}", "begun", f"checkpoint of step {json.loads(latest.read_bytes())['step']:,}, written {when}"
