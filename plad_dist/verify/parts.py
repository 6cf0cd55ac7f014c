"""Check of datasets by their bytes: parts are complete, unaltered and of one fingerprint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from plad_dist.catalog import DatasetEntry
from plad_dist.data.dataset import DAMAGED, Dataset
from plad_dist.data.journal import JOURNAL, damaged_pages
from plad_dist.data.manifest import MANIFEST, DamagedManifest, Manifest
from plad_dist.data.parts import DamagedPart, Part, check_part, open_part, part_block, read_header
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.sampling.spool import damaged_files
from plad_dist.verify.result import DatasetResult

_THREADS = 8
_ROOTS = ("prompts", "samples", "pairs", "eval")
_ANY_COLUMNS = pa.schema([])


def check_datasets(storage: Storage, entries: Mapping[str, DatasetEntry]) -> list[DatasetResult]:
    """Check every folder of a run directory that holds parts or a manifest.

    Args:
        entries: the catalog's datasets by path. The columns of other datasets are not checked.
    """
    results = []
    for path in _dataset_folders(storage):
        entry = entries.get(path)
        dataset = entry.dataset if entry is not None else Dataset(storage, path, _ANY_COLUMNS)
        results.append(check_dataset(dataset, entry))
    return results


def _dataset_folders(storage: Storage) -> Iterator[str]:
    folders = list(_ROOTS)
    while folders:
        folder = folders.pop(0)
        names = storage.sizes(folder)
        # A dataset whose only part was set aside has no parts and no manifest.
        remains = {f"{JOURNAL}/", f"{DAMAGED}/"} & names.keys()
        if MANIFEST in names or remains or any(part_block(name) is not None for name in names):
            yield folder
        subfolders = (name[:-1] for name in sorted(names) if name.endswith("/"))
        folders += [f"{folder}/{name}" for name in subfolders if name not in (JOURNAL, DAMAGED)]


def check_dataset(dataset: Dataset, entry: DatasetEntry | None = None) -> DatasetResult:
    """Check the parts of a dataset against its manifest, or its journal if it is incomplete."""
    command = entry.recipe.command if entry is not None else "run"
    result = DatasetResult(path=dataset.path, command=command, dataset=dataset, entry=entry)
    manifest = None
    try:
        manifest = dataset.manifest()  # read before the names, because a writer may be at work
        names = dataset.storage.sizes(dataset.path)
    except DamagedManifest as error:
        result.add_problem(MANIFEST, str(error).removeprefix(f"{dataset.url}/"))
        names = dataset.storage.sizes(dataset.path)
    except RunFailed as error:
        result.unchecked.append(str(error))
        return result
    stored = {name for name in names if part_block(name) is not None}
    result.state = "complete" if manifest else "incomplete"
    result.is_started = bool({f"{JOURNAL}/", f"{DAMAGED}/"} & names.keys())
    if f"{JOURNAL}/" in names:
        pages = damaged_pages(dataset.storage, f"{dataset.path}/{JOURNAL}")
        result.harmless += [
            f"{JOURNAL}/{name}: damaged ({problem}); its parts are read instead" for name, problem in pages
        ]
    for name, problem in damaged_files(dataset):
        result.problems.append(
            f"{name}: {problem}; its responses will be paid for again. Restore it from a copy, or run again"
        )
    listed = {part.name: part for part in (manifest.parts if manifest else dataset.journaled())}
    if manifest is not None:
        for name in sorted(listed.keys() - stored):
            result.add_problem(name, f"{name}: missing")
        for name in sorted(stored - listed.keys()):
            result.add_problem(name, f"{name}: surplus: the manifest does not list it")
    readable = sorted(stored & listed.keys() if manifest else stored)
    with ThreadPoolExecutor(_THREADS) as threads:
        checks = list(threads.map(lambda name: _check_part(dataset, name, listed.get(name)), readable))
    _add_part_checks(result, checks, manifest)
    return result


def _add_part_checks(result: DatasetResult, checks: list[_PartCheck], manifest: Manifest | None) -> None:
    """Add up the checks of parts, and report parts with another fingerprint than the dataset.

    Without a manifest, the dataset has the fingerprint of most parts.
    """
    fingerprints = Counter(check.fingerprint for check in checks if check.fingerprint)
    expected = manifest.fingerprint if manifest else fingerprints.most_common(1)[0][0] if fingerprints else ""
    for check in checks:
        result.parts += check.is_readable
        result.rows += check.rows
        result.unchecked += check.unchecked
        for problem in check.problems:
            result.add_problem(check.name, f"{check.name}: {problem}")
        if check.fingerprint and check.fingerprint != expected:
            result.add_problem(
                check.name,
                f"{check.name}: made by another config or from other inputs: fingerprint {check.fingerprint[:12]}, "
                f"expected {expected[:12]}",
            )


@dataclass
class _PartCheck:
    """Check of one part."""

    name: str
    is_readable: bool = False
    rows: int = 0
    fingerprint: str = ""
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def _check_part(dataset: Dataset, name: str, listed: Part | None) -> _PartCheck:
    """Read a part and compare it with its entry in the manifest or journal, if it has one.

    Problems are returned, not raised: a missing or damaged part, other columns, another number of
    rows. A storage that does not respond leaves the part unchecked.
    """
    check = _PartCheck(name)
    try:
        data, checksum = dataset.storage.read_with_checksum(f"{dataset.path}/{name}") or (None, "")
        if data is None:
            check.problems.append("missing")
            return check
        if listed is not None:
            check_part(listed, len(data), checksum)
        header = read_header(data)
        check.rows, check.fingerprint = header.rows, header.fingerprint
        table = open_part(data).read_all()
        table.validate(full=True)
        schema = table.schema
        if dataset.schema != _ANY_COLUMNS and not schema.equals(dataset.schema, check_metadata=False):
            check.problems.append(f"its columns are not those of {dataset.path}: {', '.join(schema.names)}")
        if listed is not None and listed.rows != check.rows:
            check.problems.append(f"has {check.rows:,} rows, the manifest lists {listed.rows:,}")
        check.is_readable = True
    except DamagedPart as error:
        check.problems.append(str(error))
    except RunFailed as error:  # the storage does not respond
        check.unchecked.append(str(error))
    except (pa.ArrowException, ValueError, OSError) as error:  # such as column names that are not text
        check.problems.append(f"damaged: not a readable Arrow file ({error})")
    return check
