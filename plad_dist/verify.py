"""Whether a run directory holds what its manifests say: every part there, whole, unaltered, and of one origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
from rich.table import Table

from plad_dist.config_file import parse_config
from plad_dist.data.models import model_marker
from plad_dist.data.schemas import PAIRS, PROMPTS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import JOURNAL, MANIFEST, Dataset, Part, check_part, open_part, part_block, part_facts
from plad_dist.errors import RunFailed
from plad_dist.rundir import RUN_FILE, RunDir, load_run

_THREADS = 8
_ROOTS = ("prompts", "samples", "pairs", "eval")


@dataclass
class Checked:
    """One dataset and what is wrong with it.

    Attributes:
        state: complete, incomplete (a stage was interrupted), or damaged.
    """

    path: str
    parts: int
    rows: int
    state: str
    problems: list[str] = field(default_factory=list)


def verify(url: str) -> tuple[list[Checked], list[str]]:
    """Check every dataset of a run directory, reading every byte. Writes nothing.

    Returns:
        What was checked, and what else is wrong with the run directory.

    Raises:
        UserError: it is no run directory.
    """
    run = RunDir.at(url)
    document = load_run(url)
    problems = []
    fingerprint = parse_config(document["config"], f"{url}/{RUN_FILE}").fingerprint()
    if fingerprint != document["fingerprint"]:
        problems.append(f"{RUN_FILE}: its fingerprint is not that of its config: one of the two was altered")
    checked = [_check(Dataset(run.storage, path, schema)) for path, schema in _datasets(run.storage)]
    _check_order(checked)
    for path in _samples(checked):
        found = next(item for item in checked if item.path == path)
        if found.state == "complete" and not found.problems:
            found.problems += _check_samples(run.storage, path)
    for item in checked:
        item.state = "damaged" if item.problems else item.state
    return checked, problems + _check_models(run)


def _datasets(storage: Storage) -> Iterator[tuple[str, pa.Schema]]:
    """Every folder that holds parts or a manifest, with the schema that its place demands."""
    folders = list(_ROOTS)
    while folders:
        folder = folders.pop(0)
        names = storage.sizes(folder)
        if MANIFEST in names or any(part_block(name) is not None for name in names):
            yield folder, _schema(folder)
        folders += [f"{folder}/{name[:-1]}" for name in sorted(names) if name.endswith("/") and name != f"{JOURNAL}/"]


def _schema(path: str) -> pa.Schema:
    if path in ("prompts", "eval/prompts"):
        return PROMPTS
    return PAIRS if path.split("/")[0] == "pairs" or path.endswith("/pairs") else SAMPLES


def _check(dataset: Dataset) -> Checked:
    names = dataset.storage.sizes(dataset.path)
    there = {name for name in names if part_block(name) is not None}
    try:
        manifest = dataset.manifest()
    except RunFailed as error:
        return Checked(dataset.path, len(there), 0, "damaged", [str(error)])
    checked = Checked(dataset.path, len(there), 0, "complete" if manifest else "incomplete")
    listed = {part.name: part for part in manifest.parts} if manifest else {}
    if manifest is not None:
        checked.problems += [f"{name}: missing" for name in sorted(listed.keys() - there)]
        checked.problems += [
            f"{name}: surplus: the manifest does not list it" for name in sorted(there - listed.keys())
        ]
    with ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(lambda name: _check_one(dataset, name, listed.get(name)), sorted(there)))
    fingerprints = Counter(found.fingerprint for found in results if found.fingerprint)
    expected = manifest.fingerprint if manifest else fingerprints.most_common(1)[0][0] if fingerprints else ""
    for found in results:
        checked.rows += found.rows
        checked.problems += found.problems
        if found.fingerprint and found.fingerprint != expected:
            checked.problems.append(
                f"{found.name}: made by another config or of other inputs: fingerprint {found.fingerprint[:12]}, expected "
                f"{expected[:12]}"
            )
    return checked


@dataclass
class _Found:
    name: str
    rows: int = 0
    fingerprint: str = ""
    problems: list[str] = field(default_factory=list)


def _check_one(dataset: Dataset, name: str, listed: Part | None) -> _Found:
    """One part by its bytes."""
    found = _Found(name)
    try:
        data = dataset.storage.view(f"{dataset.path}/{name}")
        if data is None:
            found.problems.append(f"{name}: missing")
            return found
        if listed is not None:
            check_part(listed, data, name)
        facts, found.rows = part_facts(data, name)
        found.fingerprint = facts.fingerprint
        schema = open_part(data, name).schema
        if not schema.equals(dataset.schema, check_metadata=False):
            found.problems.append(f"{name}: its columns are not those of {dataset.path}: {', '.join(schema.names)}")
        if listed is not None and listed.rows != found.rows:
            found.problems.append(f"{name}: has {found.rows:,} rows, the manifest says {listed.rows:,}")
    except RunFailed as error:
        found.problems.append(str(error))
    return found


def _check_order(checked: list[Checked]) -> None:
    """A dataset from which a complete one was made must itself be complete."""
    by_path = {item.path: item for item in checked}
    for item in checked:
        if item.state != "complete" or item.path in ("prompts", "eval/prompts"):
            continue
        if item.path.startswith("pairs/"):
            sources = [f"samples/{role}/{item.path.partition('/')[2]}" for role in ("teacher", "student")]
        else:
            sources = ["prompts" if item.path.startswith("samples/") else "eval/prompts"]
        for source in sources:
            if source not in by_path or by_path[source].state == "incomplete":
                owner = by_path.get(source, item)
                problem = f"{source}/{MANIFEST}: missing, though {item.path} was made from it"
                if problem not in owner.problems:
                    owner.problems.append(problem)


def _samples(checked: list[Checked]) -> list[str]:
    return [item.path for item in checked if _schema(item.path) is SAMPLES]


def _check_samples(storage: Storage, path: str) -> list[str]:
    """Every prompt of each block has its samples, each exactly once, in the order of the prompts."""
    samples = Dataset(storage, path, SAMPLES)
    prompts = Dataset(storage, "prompts" if path.startswith("samples/") else "eval/prompts", PROMPTS)
    if prompts.manifest() is None:
        return []
    manifest = samples.require("sample")
    asked = prompts.require("prepare")
    total = sum(part.rows for part in manifest.parts)
    problems = []
    n = 0
    for block, part in enumerate(manifest.parts):
        table = samples.read_block(block).select(["prompt_id", "sample_index"])
        found = list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
        n = n or max((index for _, index in found), default=0) + 1
        ids = prompts.read_block(block)["prompt_id"].to_pylist()
        last = block == len(manifest.parts) - 1
        expected = [(prompt, index) for prompt in ids for index in range(n)]
        if found != (expected[: len(found)] if last and len(found) % n == 0 else expected):
            problems.append(_what_differs(part.name, found, expected))
    if len(manifest.parts) > len(asked.parts):
        problems.append(f"{total:,} samples in {len(manifest.parts)} parts of {len(asked.parts)} blocks of prompts")
    return problems


def _what_differs(name: str, found: list[tuple[str, int]], expected: list[tuple[str, int]]) -> str:
    twice = [key for key, count in Counter(found).items() if count > 1]
    lacking = [key for key in expected if key not in set(found)]
    detail = f"{twice[0]} is there twice" if twice else f"{lacking[0]} is missing" if lacking else "in another order"
    return f"{name}: not exactly one sample for each prompt and index: {detail}"


def _check_models(run: RunDir) -> list[str]:
    """Every finished model has weights."""
    problems = []
    for name in run.storage.sizes("models"):
        if name.startswith(".") or not name.endswith("/"):
            continue
        folder = f"models/{name[:-1]}"
        if run.storage.local_root is None or model_marker(run.storage.local_root / folder) is None:
            continue
        if not any(file.endswith(".safetensors") and size for file, size in run.storage.sizes(folder).items()):
            problems.append(f"{folder}: has no weights (*.safetensors)")
    return problems


def verify_table(url: str, checked: list[Checked]) -> Table:
    """One line for each dataset."""
    table = Table("dataset", "state", "parts", "rows", title=url)
    for item in checked:
        table.add_row(item.path, item.state, f"{item.parts:,}", f"{item.rows:,}")
    return table
