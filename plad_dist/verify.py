"""Whether a run directory holds what its manifests say: every part there, whole, unaltered, and of one origin.

What is found to be wrong can be set aside, so that the next run makes it anew and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
from rich.table import Table

from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data.models import model_marker, model_problems
from plad_dist.data.prompts import rows_by_block
from plad_dist.data.schemas import INITIAL_LOGPS, PAIRS, PROMPTS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import (
    DAMAGED,
    JOURNAL,
    MANIFEST,
    DamagedManifest,
    DamagedPart,
    Dataset,
    Manifest,
    Part,
    check_part,
    open_part,
    part_block,
    part_facts,
)
from plad_dist.errors import RunFailed
from plad_dist.rundir import RUN_FILE, RunDir, load_run, round_of
from plad_dist.training.checkpoints.store import CheckpointStore, DamagedCheckpoint, step_name

_THREADS = 8
_ROOTS = ("prompts", "samples", "pairs", "eval")


@dataclass
class Checked:
    """One dataset and what is wrong with it.

    Attributes:
        parts, rows: those that can be read.
        state: complete, incomplete (a stage was interrupted, or bad parts were set aside), or damaged.
        bad: names of parts that are missing or not what they should be; `wrong_rows` those among them that are sound files.
        unknown: what could not be checked, because the storage did not answer.
    """

    path: str
    parts: int
    rows: int
    state: str
    problems: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    wrong_rows: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
    begun: bool = False

    def blame(self, part: str, problem: str) -> None:
        """A part is not what it should be. `problem` names it."""
        self.problems.append(problem)
        self.bad.add(part)


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
    config = parse_config(document["config"], f"{url}/{RUN_FILE}")
    fingerprint = config.fingerprint()
    if fingerprint != document["fingerprint"]:
        problems.append(
            f"{RUN_FILE}: its fingerprint is not that of its config: one of the two was altered. Put the file back as it was"
        )
    checked = [_check(Dataset(run.storage, path, schema)) for path, schema in _datasets(run.storage)]
    _check_order(checked)
    sound = {item.path for item in checked if item.state == "complete" and not item.problems}
    for item in checked:
        if item.path in sound and _schema(item.path) is SAMPLES and _prompts_of(item.path) in sound:
            _check_samples(run.storage, item, config)
    for item in checked:
        item.state = "damaged" if item.problems else item.state
    checked += _check_checkpoints(run.checkpoints(config))
    return checked, problems + _check_models(run) + _check_figures(run)


class Verification:
    """Result of checking a run directory, as `plad verify` reports and repairs it.

    Attributes:
        datasets: state of every dataset, and of the checkpoints of every phase.

    Raises:
        UserError: the folder is not a run directory.
    """

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self.datasets, self._other_problems = verify(run_dir)

    @property
    def problems(self) -> list[str]:
        """All problems of the run directory, one message each."""
        return [f"{item.path}: {text}" for item in self.datasets for text in item.problems] + self._other_problems

    @property
    def _unchecked(self) -> list[str]:
        """Errors of the storage that kept parts from being checked."""
        return [line for item in self.datasets for line in item.unknown]

    def summary(self) -> str:
        """Return the problems, or the commands that complete the datasets if there are none."""
        if problems := self.problems:
            return f"{self._run_dir}: {len(problems)} problem{'s' * (len(problems) > 1)}:{_indented(problems)}"
        incomplete = [
            f"{item.path} (`plad {command_for(item.path)}`)" for item in self.datasets if item.state == "incomplete"
        ]
        suffix = f"; not complete yet: {', '.join(incomplete)}" if incomplete else ""
        return f"{self._run_dir}: nothing {'else ' if self._unchecked else ''}is wrong{suffix}"

    def repair(self) -> str | None:
        """Set bad parts aside and return what was done; None if nothing could be repaired."""
        done = repair(self._run_dir, self.datasets)
        return f"Repaired; run again to redo:{_indented(done)}" if done else None

    def raise_for_problems(self, *, repaired: bool) -> None:
        """Raise :class:`RunFailed` if problems remain or parts could not be checked.

        Args:
            repaired: `repair` was called, so the problems that remain need the user.
        """
        if self._unchecked:
            raise RunFailed(f"{self._run_dir}: could not be checked in full:{_indented(self._unchecked)}")
        if not self.problems:
            return
        if repaired:
            raise RunFailed(f"{self._run_dir}: cannot be repaired here:{_indented(self.problems)}")
        if any(item.bad for item in self.datasets):
            raise RunFailed(
                f"{self._run_dir}: `plad verify {self._run_dir} --repair` sets bad parts aside; the next run redoes only their blocks"
            )
        raise RunFailed(f"{self._run_dir}: see above")


def _indented(lines: list[str], limit: int = 50) -> str:
    """Return at most `limit` lines, each indented on a line of its own, and the number of omitted lines."""
    omitted = [f"and {len(lines) - limit:,} more"] if len(lines) > limit else []
    return "".join(f"\n  {line}" for line in [*lines[:limit], *omitted])


def _datasets(storage: Storage) -> Iterator[tuple[str, pa.Schema]]:
    """Every folder that holds parts or a manifest, with the schema that its place demands."""
    folders = list(_ROOTS)
    while folders:
        folder = folders.pop(0)
        names = storage.sizes(folder)
        left = {f"{JOURNAL}/", f"{DAMAGED}/"} & names.keys()  # of a dataset whose only part was set aside, say
        if MANIFEST in names or left or any(part_block(name) is not None for name in names):
            yield folder, _schema(folder)
        inner = (name[:-1] for name in sorted(names) if name.endswith("/"))
        folders += [f"{folder}/{name}" for name in inner if name not in (JOURNAL, DAMAGED)]


def _schema(path: str) -> pa.Schema:
    if path in ("prompts", "eval/prompts") or (_is_of_a_judge(path) and path.endswith("/prompts")):
        return PROMPTS
    if path.rpartition("/")[2].startswith("initial-logps-"):
        return INITIAL_LOGPS
    return PAIRS if path.split("/")[0] == "pairs" or path.endswith("/pairs") else SAMPLES


def _is_of_a_judge(path: str) -> bool:
    return "/judges/" in path


def _check(dataset: Dataset) -> Checked:
    checked = Checked(dataset.path, 0, 0, "incomplete")
    manifest = None
    try:
        manifest = dataset.manifest()  # before the names: a writer may be at work
        names = dataset.storage.sizes(dataset.path)
    except DamagedManifest as error:
        checked.blame(MANIFEST, str(error).removeprefix(f"{dataset.url}/"))
        names = dataset.storage.sizes(dataset.path)
    except RunFailed as error:
        checked.unknown.append(str(error))
        return checked
    there = {name for name in names if part_block(name) is not None}
    checked.state = "complete" if manifest else "incomplete"
    checked.begun = bool({f"{JOURNAL}/", f"{DAMAGED}/"} & names.keys())
    listed = {part.name: part for part in (manifest.parts if manifest else dataset.journaled())}
    if manifest is not None:
        for name in sorted(listed.keys() - there):
            checked.blame(name, f"{name}: missing")
        for name in sorted(there - listed.keys()):
            checked.blame(name, f"{name}: surplus: the manifest does not list it")
    with ThreadPoolExecutor(_THREADS) as threads:
        wanted = sorted(there & listed.keys() if manifest else there)
        results = list(threads.map(lambda name: _check_one(dataset, name, listed.get(name)), wanted))
    fingerprints = Counter(found.fingerprint for found in results if found.fingerprint)
    expected = manifest.fingerprint if manifest else fingerprints.most_common(1)[0][0] if fingerprints else ""
    for found in results:
        checked.parts += found.readable
        checked.rows += found.rows
        checked.unknown += found.unknown
        for problem in found.problems:
            checked.blame(found.name, problem)
        if found.fingerprint and found.fingerprint != expected:
            checked.blame(
                found.name,
                f"{found.name}: made by another config or of other inputs: fingerprint {found.fingerprint[:12]}, expected "
                f"{expected[:12]}",
            )
    return checked


@dataclass
class _Found:
    name: str
    readable: bool = False
    rows: int = 0
    fingerprint: str = ""
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def _check_one(dataset: Dataset, name: str, listed: Part | None) -> _Found:
    """One part by its bytes."""
    found = _Found(name)
    try:
        data = dataset.storage.view(f"{dataset.path}/{name}")
        if data is None:
            found.problems.append(f"{name}: missing")
            return found
        if listed is not None:
            check_part(listed, data)
        facts, found.rows = part_facts(data)
        found.fingerprint = facts.fingerprint
        schema = open_part(data).schema
        if not schema.equals(dataset.schema, check_metadata=False):
            found.problems.append(f"{name}: its columns are not those of {dataset.path}: {', '.join(schema.names)}")
        if listed is not None and listed.rows != found.rows:
            found.problems.append(f"{name}: has {found.rows:,} rows, the manifest says {listed.rows:,}")
        found.readable = True
    except DamagedPart as error:
        found.problems.append(f"{name}: {error}")
    except RunFailed as error:  # the storage does not answer
        found.unknown.append(str(error))
    except (pa.ArrowException, ValueError, OSError) as error:  # names of columns that are no text, say
        found.problems.append(f"{name}: damaged: not a readable Arrow file ({error})")
    return found


def _check_order(checked: list[Checked]) -> None:
    """A dataset from which a complete one was made must itself be complete."""
    by_path = {item.path: item for item in checked}
    for item in checked:
        if item.state != "complete" or _schema(item.path) in (PROMPTS, INITIAL_LOGPS):
            continue
        if item.path.startswith("pairs/"):  # the teacher is sampled once
            sources = ["samples/teacher/round-0", f"samples/student/{item.path.partition('/')[2]}"]
        else:
            sources = [_prompts_of(item.path)]
        for source in sources:
            if source not in by_path or (by_path[source].state == "incomplete" and not by_path[source].begun):
                owner = by_path.get(source, item)
                problem = f"{source}/{MANIFEST}: missing, though {item.path} was made from it"
                if problem not in owner.problems:
                    owner.problems.append(problem)


def _prompts_of(path: str) -> str:
    """The prompts that a dataset of samples answers."""
    if _is_of_a_judge(path):
        return f"{path.rpartition('/')[0]}/prompts"
    return "prompts" if path.startswith("samples/") else "eval/prompts"


def _check_samples(storage: Storage, checked: Checked, config: Config) -> None:
    """Every prompt of each block has its samples, each exactly once, in the order of the prompts."""
    samples, prompts = Dataset(storage, checked.path, SAMPLES), Dataset(storage, _prompts_of(checked.path), PROMPTS)
    n, limit = _how_many(checked.path, config)
    rows = rows_by_block(prompts.require("prepare"), limit)
    parts = samples.require("sample").parts
    if len(parts) != len(rows):
        names = f"{len(parts):,} parts, where {len(rows):,} blocks of prompts were to be sampled"
        checked.blame(MANIFEST, f"{MANIFEST}: lists {names}")
        checked.wrong_rows.add(MANIFEST)
    for block, (part, count) in enumerate(zip(parts, rows, strict=False)):
        try:
            ids = prompts.read_block(block)["prompt_id"].slice(0, count).to_pylist()
            table = samples.read_block(block).select(["prompt_id", "sample_index"])
        except RunFailed as error:  # since it was found to be sound
            checked.blame(part.name, str(error))
            continue
        found = list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
        expected = [(prompt, index) for prompt in ids for index in range(n)]
        if found != expected:
            checked.blame(part.name, _what_differs(part.name, found, expected))
            checked.wrong_rows.add(part.name)


def _how_many(path: str, config: Config) -> tuple[int, int | None]:
    """Samples of each prompt, and how many prompts at most."""
    if path.startswith("samples/"):
        role = config.sampling.teacher if path.startswith("samples/teacher/") else config.sampling.student
        return role.n, config.sampling.limit
    if _is_of_a_judge(path):
        return 1, None
    of_candidates = path.endswith("/candidates") or "/scored/candidates/" in path
    return config.candidates if of_candidates else 1, config.evaluation.limit


def _what_differs(name: str, found: list[tuple[str, int]], expected: list[tuple[str, int]]) -> str:
    counts = Counter(found)
    twice = [key for key, count in counts.items() if count > 1]
    lacking = [key for key in expected if key not in counts]
    detail = (
        f"{twice[0]} is there twice" if twice
        else f"{lacking[0]} is missing" if lacking
        else "in another order" if len(found) == len(expected)
        else f"{len(found) - len(expected)} too many"
    )  # fmt: skip
    return f"{name}: not exactly one sample for each prompt and index: {detail}"


def repair(url: str, checked: list[Checked]) -> list[str]:
    """Set aside what was found to be bad, so that the next run makes it anew. Sound parts keep their checksums.

    Bad parts are not deleted: they go to `damaged/` beside the others. Returns what was done, a line for each part.
    """
    storage = RunDir.at(url).storage
    done = []
    for item in checked:
        if not item.bad:
            continue
        if item.path.startswith("checkpoints/"):
            done += _set_aside_checkpoints(url, item)
            continue
        dataset = Dataset(storage, item.path, _schema(item.path))
        bad = (item.bad & _check(dataset).bad) | item.wrong_rows  # what was committed since is not bad any more
        if not bad:
            continue
        moved = dataset.reopen(_readable_manifest(dataset), bad)
        done += [
            f"{item.path}/{name}: {f'moved to {item.path}/{DAMAGED}/' if name in moved else 'is to be made anew'}"
            for name in sorted(bad)
        ]
        if item.path.startswith("eval/"):  # figures of what is to be made anew
            done += [f"{name}: deleted, it was made of {item.path}" for name in _figures_of(storage, item.path)]
        item.problems, item.bad, item.state = [], set(), "incomplete"
    return done


def _figures_of(storage: Storage, path: str) -> list[str]:
    """Delete the figures and the report of the round that a dataset of `eval/` belongs to."""
    found = [f"{'/'.join(path.split('/')[:2])}/{name}" for name in ("metrics.json", "report.html")]
    found = [key for key in found if storage.holds(key)]
    for key in found:
        storage.delete(key)
    return found


def _set_aside_checkpoints(url: str, item: Checked) -> list[str]:
    """Damaged checkpoints are no longer committed; their files stay until the next ones are pruned."""
    run = RunDir.at(url)
    storage = run.checkpoints(parse_config(load_run(url)["config"], url))
    store = CheckpointStore(storage, item.path.rpartition("/")[2], None)
    names, item.bad, item.problems, item.state = sorted(item.bad), set(), [], "complete"
    done = []
    for name in names:
        step = int(name.rpartition("-")[2])
        if _is_damaged(store, step):  # training may have committed it anew since
            store.set_aside(step)
            done.append(f"{item.path}/{name}: is no longer taken for a checkpoint")
    return done


def _is_damaged(store: CheckpointStore, step: int) -> bool:
    try:
        found = store.at(step)
    except DamagedCheckpoint:
        return True
    return found is not None and (store.harm(found) or store.alteration(found)) is not None


def _readable_manifest(dataset: Dataset) -> Manifest | None:
    try:
        return dataset.manifest()
    except RunFailed:
        return None


def _check_models(run: RunDir) -> list[str]:
    """Every finished model has its config, its tokenizer and whole weights, by their headers."""
    problems = []
    for name in run.storage.sizes("models"):
        if name.startswith(".") or not name.endswith("/"):
            continue
        folder = f"models/{name[:-1]}"
        root = run.storage.local_root
        if root is not None and model_marker(root / folder) is not None:
            problems += [
                f"{folder}: {problem}. Delete {folder} and run again: it is made anew, a trained one from its last checkpoint"
                for problem in model_problems(root / folder)
            ]
    return problems


def _check_figures(run: RunDir) -> list[str]:
    """Every round's figures can be read, and what they were made of is there."""
    problems = []
    for name in sorted(run.storage.sizes("eval")):
        number = round_of(name.rstrip("/"))
        if number is None:
            continue
        at = run.at_round(number)
        try:
            figures = at.figures()
        except RunFailed:
            problems.append(
                f"{at.metrics}: not valid JSON, or no figures. Delete it and run `plad evaluate` again: it is made anew from what was sampled"
            )
            continue
        rows = figures["systems"] if figures is not None else []
        gone = [path for row in rows if (path := _is_gone(at, row["system"], row["decoding"])) is not None]
        gone += [f"models/{name[:-1]}"] if rows and model_marker(at.model(name[:-1])) is None else []
        problems += [
            f"{path}: missing, though {at.metrics} was made of it. Put it back from a copy; or delete {at.metrics} and run again: "
            "both are made anew"
            for path in gone
        ]
    return problems


def _is_gone(run: RunDir, system: str, decoding: str) -> str | None:
    """The path of a system's answers where nothing of them is there."""
    dataset = run.system_samples(system, decoding)
    return None if run.storage.sizes(dataset.path) else dataset.path


def _check_checkpoints(storage: Storage) -> list[Checked]:
    """Every committed checkpoint has its files, by their checksums. One line a phase; its parts are checkpoints, its rows steps."""
    found = []
    for phase in sorted(storage.sizes("checkpoints")):
        store = CheckpointStore(storage, phase.rstrip("/"), None)
        checked = Checked(store.folder, 0, 0, "complete")
        for step in store.steps():
            try:
                checkpoint = store.at(step)
                harm = (store.harm(checkpoint) or store.alteration(checkpoint)) if checkpoint else None
            except DamagedCheckpoint as error:
                checkpoint, harm = None, str(error)
            if harm is not None and store.is_committed(step):  # and was not pruned in between
                name = step_name(step)
                checked.blame(name, f"{name}: {harm}. Training leaves it out and goes on from the one before")
            elif checkpoint is not None:
                checked.parts, checked.rows = checked.parts + 1, max(checked.rows, step)
        if checked.parts or checked.problems:
            checked.state = "damaged" if checked.problems else "complete"
            found.append(checked)
    return found


def command_for(path: str) -> str:
    """The command that makes a dataset."""
    if path.startswith("checkpoints/") or path.rpartition("/")[2].startswith("initial-logps-"):
        return "train"
    if path == "pairs" or path.startswith("pairs/") or path.endswith("/pairs"):
        return "pair"
    if "prompts" in path.split("/")[:2]:
        return "prepare"
    of_evaluation = ("/samples/seqkd/", "/samples/plad/", "/scored/", "/judges/")
    return "evaluate" if any(part in path for part in of_evaluation) else "sample"


def verify_table(url: str, checked: list[Checked]) -> Table:
    """One line for each dataset."""
    table = Table("dataset", "state", "readable parts", "rows or steps", title=url)
    for item in checked:
        table.add_row(item.path, item.state, f"{item.parts:,}", f"{item.rows:,}")
    return table
