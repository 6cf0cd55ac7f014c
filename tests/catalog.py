"""Comparison of a run directory with its catalog, for unit and integration tests."""

from __future__ import annotations

from pathlib import Path

from plad_dist.catalog import DatasetEntry, FiguresEntry, ModelEntry, products_of
from plad_dist.config import Config
from plad_dist.data.claims import RUN_CLAIMS
from plad_dist.rundir import RunDir
from plad_dist.sampling.endpoint.ledger import FOLDER


def folders_without_entry(config: Config, run: RunDir) -> set[str]:
    """Return the folders with files in a run directory that the catalog does not account for.

    A dataset accounts for its own folder alone, as other datasets may be stored below it. A model
    accounts for everything in its folders. Claims, ledgers and Ray Train's folder are left out.
    """
    shallow, deep = {".", "logs"}, set[str]()
    for product in products_of(config, run):
        match product:
            case DatasetEntry():
                shallow.add(product.path)
            case FiguresEntry():
                shallow.add(str(Path(product.path).parent))
            case ModelEntry():
                deep |= {*product.folders, f"checkpoints/{product.name}"}
    folders = {file.parent.relative_to(run.root) for file in run.root.rglob("*") if file.is_file()}
    return {
        str(folder)
        for folder in folders
        if folder.parts[:1] not in ((".ray-train",), (RUN_CLAIMS,), (FOLDER,))
        and str(folder) not in shallow
        and deep.isdisjoint(map(str, (folder, *folder.parents)))
    }


def entries_without_folder(config: Config, run: RunDir) -> set[str]:
    """Return the paths of the catalog that do not exist in a run directory."""
    paths = {
        f"{product.path}/manifest.json" if isinstance(product, DatasetEntry) else product.path
        for product in products_of(config, run)
    }
    return {path for path in paths if not (run.root / path).exists()}
