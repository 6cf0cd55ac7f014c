"""Status of a run: the committed state of every product, read from storage alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from plad_dist.catalog import DatasetEntry, FiguresEntry, ModelEntry, Purpose, products_of
from plad_dist.data.claims import describe_owner
from plad_dist.data.dataset import Dataset
from plad_dist.data.manifest import MANIFEST, Manifest
from plad_dist.data.models import DamagedModel, model_marker, weights_problems
from plad_dist.data.parts import Part
from plad_dist.data.prompts import rows_by_block
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, first_line
from plad_dist.evaluation.formatting import writer_phrase
from plad_dist.rundir import RunDir, load_run
from plad_dist.sampling.endpoint.ledger import FOLDER as MONEY
from plad_dist.sampling.endpoint.ledger import MICROS, Spending, spending_of_run
from plad_dist.training.checkpoints.store import CheckpointStore
from plad_dist.untrusted import cell

Row = tuple[str, str, str]

# Intermediate results of training and of judges, which the status does not list.
_UNLISTED = {Purpose.INITIAL_LOGPS, Purpose.TEACHER_SCORES, Purpose.QUESTIONS}


def status_table(path: str) -> Table:
    """Return a table with the state of every product of a run.

    Raises:
        UserError: the path is not a run directory.
    """
    stored, run = load_run(path), RunDir.at(path)
    checkpoints = run.checkpoints(stored.config)
    owner = describe_owner(run.storage)
    table = Table(
        "product",
        "state",
        "rows or steps",
        title=cell(f"{path} ({stored.fingerprint[:12]})"),
        caption=cell(owner) if owner else None,
    )
    for product in products_of(stored.config, run):
        match product:
            case DatasetEntry() if product.purpose not in _UNLISTED:
                path, state, note = _dataset_row(product)
                if product.responder == "rejected":
                    note = f"{note}, by {writer_phrase(stored.config.sampling.rejected)}".removeprefix(", ")
                table.add_row(*map(cell, (path, state, note)))
            case ModelEntry(phase=str(phase)):
                table.add_row(*map(cell, _phase_row(phase, run, checkpoints)))
            case FiguresEntry():
                table.add_row(*map(cell, (product.path, *_figures_state(run.storage, product.path))))
                has_report = run.storage.read(product.report) is not None
                table.add_row(cell(product.report), "complete" if has_report else "-", "")
    for row in _money_rows(run.storage):
        table.add_row(*map(cell, row))
    return table


def _money_rows(storage: Storage) -> list[Row]:
    """Return what each model behind a server has cost, responses that were lost included."""
    try:
        return [(f"{MONEY}/{payer}", "-", _money(state)) for payer, state in spending_of_run(storage).items()]
    except RunFailed as error:
        return [(MONEY, "damaged", str(error))]


def _money(state: Spending) -> str:
    reserved = sum(state.open.values())
    note = f", {reserved / MICROS:,.2f} of it reserved by commands and batches at work, or killed" if reserved else ""
    return f"{state.total / MICROS:,.2f} spent{note}"


def _dataset_row(entry: DatasetEntry) -> Row:
    dataset, advice = entry.dataset, f"see `plad verify {entry.dataset.storage.url}`"
    try:
        manifest = dataset.manifest()
    except RunFailed:
        return entry.path, "damaged", f"{MANIFEST} cannot be read; {advice}"
    if manifest is not None and (damage := _damage(dataset, manifest)):
        return entry.path, "damaged", f"{damage}; {advice}"
    if manifest is not None:
        return entry.path, "complete", f"{manifest.rows:,} rows in {_progress(len(manifest.parts), manifest.parts)}"
    parts = dataset.committed()
    if not parts:
        return entry.path, "-", ""
    journaled = [part for part in parts.values() if part]
    return entry.path, "started", _progress(len(parts), journaled, _expected_blocks(entry))


def _expected_blocks(entry: DatasetEntry) -> int | None:
    """Return the number of blocks when complete, or None if the prompts are incomplete."""
    try:
        manifest = entry.prompts.manifest() if entry.prompts is not None else None
    except RunFailed:
        return None
    return len(rows_by_block(manifest, entry.limit)) if manifest is not None else None


def _damage(dataset: Dataset, manifest: Manifest) -> str:
    """Return how names and sizes of the parts differ from the manifest, or an empty text."""
    sizes = dataset.storage.sizes(dataset.path)
    missing = sum(part.name not in sizes for part in manifest.parts)
    resized = sum(sizes.get(part.name, part.bytes) != part.bytes for part in manifest.parts)
    problems = [(missing, "missing"), (resized, "of another size")]
    return ", ".join(f"{count:,} part{'s' * (count > 1)} {problem}" for count, problem in problems if count)


def _progress(parts: int, counted: Sequence[Part], blocks: int | None = None) -> str:
    """Return the number of parts, and the sums of the counts that are available."""
    sums = {name: sum(part.counts.get(name, 0) for part in counted) for name in ("tokens", "errors", "cost_micros")}
    phrases = [
        f"{parts:,} of {blocks:,} parts" if blocks else f"{parts:,} parts",
        f"{sums['tokens']:,} tokens" if sums["tokens"] else "",
        f"{sums['errors']:,} error rows" if sums["errors"] else "",
        f"cost {sums['cost_micros'] / 1e6:,.2f}" if sums["cost_micros"] else "",
    ]
    return ", ".join(filter(None, phrases))


def _figures_state(storage: Storage, key: str) -> tuple[str, str]:
    try:
        return ("complete" if storage.read_json(key) is not None else "-"), ""
    except RunFailed as error:
        return "damaged", str(error)


def _phase_row(phase: str, run: RunDir, checkpoints: Storage) -> Row:
    name = f"models/{phase}"
    try:
        marker = None if run.storage.local_root is None else model_marker(run.model(phase))
    except DamagedModel as error:
        return (name, "damaged", first_line(error))
    if marker is not None:
        problems = weights_problems(run.model(phase))
        return (
            (name, "damaged", problems[0])
            if problems
            else (name, "complete", f"{marker['facts'].get('step', 0):,} steps")
        )
    try:
        checkpoint, damaged = CheckpointStore(checkpoints, phase, None).newest()
    except RunFailed as error:
        return name, "damaged", str(error)
    if checkpoint is None:
        return name, "-", ""
    state = f"checkpoint of step {checkpoint.state.step:,} by {checkpoint.state.workers} workers"
    return name, "started", state + (f"; {len(damaged)} later ones are damaged" if damaged else "")
