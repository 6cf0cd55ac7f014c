"""What of a run is committed, read from storage alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from plad_dist.config import LlmJudge
from plad_dist.config_file import parse_config
from plad_dist.data.models import model_marker, weights_problems
from plad_dist.data.prompts import heldout_prompts, rows_by_block, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.data.store import MANIFEST, Dataset, Manifest, Part
from plad_dist.errors import RunFailed
from plad_dist.evaluation.judges import judge_answers
from plad_dist.evaluation.stage import systems_of, trained_systems
from plad_dist.phases import phase_names
from plad_dist.rundir import RUN_FILE, RunDir, load_run
from plad_dist.training.checkpoints.store import CheckpointStore


def status_table(path: str) -> Table:
    """One line per dataset, phase and figure of a run directory. Raises :class:`UserError` where it is none."""
    document = load_run(path)
    config = parse_config(document["config"], f"{path}/{RUN_FILE}")
    run = RunDir.at(path)
    table = Table("what", "state", "rows or steps", title=f"{path} ({document['fingerprint'][:12]})")
    for dataset in (train_prompts(run.storage), heldout_prompts(run.storage)):
        table.add_row(*_dataset_row(dataset))
    checkpoints = run.checkpoints(config)
    for phase in phase_names(config):
        table.add_row(*_phase_row(phase, run, checkpoints))
    blocks = _blocks(train_prompts(run.storage), config.sampling.limit)
    heldout = _blocks(heldout_prompts(run.storage), config.evaluation.limit)
    for each in (run.at_round(number) for number in range(config.rounds.most)):
        roles = ("student",) if each.round else ("teacher", "student")
        for dataset in [*map(each.samples, roles), each.pairs()]:
            table.add_row(*_dataset_row(dataset, blocks))
        for dataset in [*map(each.heldout_samples, roles), each.heldout_pairs()]:
            table.add_row(*_dataset_row(dataset))
        for system in trained_systems(config, each) if each.round else systems_of(config, each):
            for name in config.system_decodings(system):
                table.add_row(*_dataset_row(each.system_samples(system, name), heldout))
        if config.candidates:
            scored = [each.scored("candidates", system) for system in trained_systems(config, each)]
            for dataset in [*([] if each.round else [run.candidates()]), *scored]:
                table.add_row(*_dataset_row(dataset))
        for name, judge in config.evaluation.judges.items():
            for dataset in judge_answers(each, name) if isinstance(judge, LlmJudge) else ():
                table.add_row(*_dataset_row(dataset))
        table.add_row(each.metrics, *_figures_row(run.storage, each.metrics))
        table.add_row(each.report, "complete" if run.storage.read(each.report) is not None else "-", "")
    return table


def _blocks(prompts: Dataset, limit: int | None) -> int | None:
    """How many blocks are sampled, None while the prompts are not complete."""
    try:
        manifest = prompts.manifest()
    except RunFailed:
        return None
    return len(rows_by_block(manifest, limit)) if manifest else None


def _dataset_row(dataset: Dataset, blocks: int | None = None) -> tuple[str, str, str]:
    try:
        manifest = dataset.manifest()
    except RunFailed:
        return dataset.path, "damaged", f"{MANIFEST} cannot be read; see `plad verify {dataset.storage.url}`"
    if manifest is not None and (harm := _harm(dataset, manifest)):
        return dataset.path, "damaged", f"{harm}; see `plad verify {dataset.storage.url}`"
    if manifest is not None:
        return dataset.path, "complete", f"{manifest.rows:,} rows in {_progress(len(manifest.parts), manifest.parts)}"
    parts = dataset.committed()
    known = [part for part in parts.values() if part]
    if not parts:
        return dataset.path, "-", ""
    return dataset.path, "begun", _progress(len(parts), known, blocks)


def _harm(dataset: Dataset, manifest: Manifest) -> str:
    """What the names and sizes in storage say against a manifest; nothing is read."""
    sizes = dataset.storage.sizes(dataset.path)
    missing = sum(part.name not in sizes for part in manifest.parts)
    cut = sum(sizes.get(part.name, part.bytes) != part.bytes for part in manifest.parts)
    told = [(missing, "missing"), (cut, "of another size")]
    return ", ".join(f"{count:,} part{'s' * (count > 1)} {what}" for count, what in told if count)


def _progress(parts: int, known: Sequence[Part], blocks: int | None = None) -> str:
    """Parts, and what their counts say."""
    counts = {name: sum(part.counts.get(name, 0) for part in known) for name in ("tokens", "errors", "cost_micros")}
    told = [
        f"{parts:,} of {blocks:,} parts" if blocks else f"{parts:,} parts",
        f"{counts['tokens']:,} tokens" if counts["tokens"] else "",
        f"{counts['errors']:,} error rows" if counts["errors"] else "",
        f"cost {counts['cost_micros'] / 1e6:,.2f}" if counts["cost_micros"] else "",
    ]
    return ", ".join(filter(None, told))


def _figures_row(storage: Storage, key: str) -> tuple[str, str]:
    try:
        return ("complete" if storage.read_json(key) is not None else "-"), ""
    except RunFailed as error:
        return "damaged", str(error)


def _phase_row(phase: str, run: RunDir, checkpoints: Storage) -> tuple[str, str, str]:
    marker = None if run.storage.local_root is None else model_marker(run.storage.local_root / "models" / phase)
    if marker is not None:
        harm = weights_problems(run.root / "models" / phase)
        state = "damaged" if harm else "complete"
        return f"models/{phase}", state, harm[0] if harm else f"{marker['facts'].get('step', 0):,} steps"
    try:
        found, damaged = CheckpointStore(checkpoints, phase, None).newest()
    except RunFailed as error:
        return f"models/{phase}", "damaged", str(error)
    if found is None:
        return f"models/{phase}", "-", ""
    told = f"checkpoint of step {found.state.step:,} of {found.state.workers} workers"
    return f"models/{phase}", "begun", told + (f"; {len(damaged)} damaged ones after it" if damaged else "")
