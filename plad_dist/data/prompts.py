"""Stage `prepare`: prompts from their source into the run directory, training and held-out rows apart, as a stream.

Blocks are committed as they fill. A second attempt reads the sources again and compares: what is committed already must
be what it would write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pyarrow as pa

from plad_dist.config import Config, PythonFunctionsSource, is_operational
from plad_dist.data.files import expand, local_bytes
from plad_dist.data.schemas import PROMPTS
from plad_dist.data.selection import HELDOUT, TRAIN, Router, Selection
from plad_dist.data.sources import FilesSource, Prompt, read_prompts
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Manifest, Part, part_name
from plad_dist.errors import UserError
from plad_dist.fingerprint import fingerprint

logger = logging.getLogger("plad")

_READ_FIRST_BYTES = 256 << 20
_SAY_EVERY_S = 30.0


def train_prompts(storage: Storage) -> Dataset:
    """Prompts that are trained on and sampled for pairs."""
    return Dataset(storage, "prompts", PROMPTS)


def heldout_prompts(storage: Storage) -> Dataset:
    """Prompts that only the evaluation sees."""
    return Dataset(storage, "eval/prompts", PROMPTS)


def prepare(config: Config, storage: Storage) -> dict[str, int]:
    """Write both prompt datasets and return their row counts.

    The manifests' `facts` hold `content`, the SHA-256 of (prompt_id, reference, teacher) of all rows in order, the counts
    of `duplicates`, `over_long` and `truncated` prompts, and those `dropped` by reason.

    Raises:
        UserError: for bad prompts, and for sources that are not what they were when the run began.
    """
    datasets = {TRAIN: train_prompts(storage), HELDOUT: heldout_prompts(storage)}
    if not all(dataset.manifest() for dataset in datasets.values()):
        _write(config, datasets)
    manifests = {name: dataset.manifest() for name, dataset in datasets.items()}
    return {name: manifest.rows for name, manifest in manifests.items() if manifest}


def _write(config: Config, datasets: dict[str, Dataset]) -> None:
    writers = {name: _Writer(dataset, config) for name, dataset in datasets.items()}
    # A bad row may be the last one of a terabyte, so rows are committed before all are read. Files that are soon read are
    # read twice instead: what is wrong with them is said before anything is written, and may be mended in the config.
    if not any(writer.resumed for writer in writers.values()) and _is_soon_read(config):
        check_prompts(config, all_rows=True)
    selection, last = Selection(config), 0.0
    for name, prompt in selection:
        writers[name].add(prompt)
        # From the first prompt on: a harvest tells how it goes itself, and gives its first one when it is done.
        last = last or time.monotonic()
        if time.monotonic() - last > _SAY_EVERY_S:
            last = time.monotonic()
            logger.info("prepare: %s prompts taken", f"{sum(counts['rows'] for counts in selection.counts.values()):,}")
    for name, writer in writers.items():
        writer.finish(selection.counts[name])
    if said := selection.summary():
        logger.info("prompts: %s", said)


def _is_soon_read(config: Config) -> bool:
    total = 0
    for key, source in _sources(config):
        size = local_bytes(expand(source.paths, key)) if isinstance(source, FilesSource) else None
        if size is None:
            return False
        total += size
    return total <= _READ_FIRST_BYTES


def _sources(config: Config) -> list[tuple[str, Any]]:
    named = [("prompts.source", config.prompts.source), ("prompts.heldout", config.prompts.heldout)]
    return [(key, source) for key, source in named if source is not None]


def check_prompts(config: Config, *, all_rows: bool) -> str | None:
    """Raise the errors of :func:`prepare` without writing anything. Returns what it would tell of the rows, where it has read all.

    Args:
        all_rows: read all rows; otherwise the first of each source. Python functions are not harvested for it.
    """
    Router(config)
    if all_rows and not isinstance(config.prompts.source, PythonFunctionsSource):
        selection = Selection(config)
        _exhaust(selection)
        return selection.summary()
    for key, source in _sources(config):
        if not isinstance(source, PythonFunctionsSource):
            _exhaust(islice(read_prompts(source, key), None if all_rows else 1))
    return None


def _exhaust(rows: Iterable[Any]) -> None:
    deque(rows, maxlen=0)


def teacher_blocks(manifest: Manifest) -> dict[str, list[int]]:
    """The blocks of each teacher that has some; all are `teacher`'s where there is a single one."""
    blocks: dict[str, list[int]] = {}
    for block, part in enumerate(manifest.parts):
        names = [name.removeprefix("teacher.") for name in part.counts if name.startswith("teacher.")]
        blocks.setdefault(names[0] if names else "teacher", []).append(block)
    return blocks


def _input_fingerprint(config: Config) -> str:
    """Fingerprint of what decides which rows are taken from the sources, and how. Their content is in the facts."""
    prompts = {
        key: value for key, value in config.flat().items() if key.startswith("prompts.") and not is_operational(key)
    }
    teachers = {name: {"share": teacher.share, "filter": teacher.filter} for name, teacher in config.teachers.items()}
    # Models whose tokenizers say which prompts are too long.
    measured = [model for model in (*config.all_teachers().values(), config.student) if model.path is not None]
    lengths = [
        {"path": model.path, "revision": model.revision, "template": model.template, "max_length": model.max_length}
        for model in measured
    ]
    return fingerprint("prompts", keys=prompts, seed=config.run.seed, teachers=teachers, lengths=lengths)


class _Writer:
    """Writes one dataset block by block.

    A block has the prompts of one teacher. Blocks are numbered in the order in which they are full, those that are left
    at the end in the order in which they were begun.
    """

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self._dataset, self._block_size, self._input_fingerprint = (
            dataset,
            config.prompts.block_size,
            _input_fingerprint(config),
        )
        self._attempt = uuid.uuid4().hex
        self._there = self._parts_to_keep()
        self._open: dict[str | None, list[Prompt]] = {}
        self._known: list[Part] = []
        self._blocks = 0
        self._content = hashlib.sha256()

    def _parts_to_keep(self) -> set[int]:
        """Blocks that an earlier attempt committed. Those of another config, of which nothing was made yet, are deleted."""
        there = set(self._dataset.committed())
        if (
            not there
            or self._dataset.manifest() is not None
            or self._dataset.origin(min(there)) == self._input_fingerprint
        ):
            return there
        logger.info("prepare: what was begun in %s with another config is begun anew", self._dataset.path)
        for block in there:
            self._dataset.storage.delete(f"{self._dataset.path}/{part_name(block)}")
        return set()

    @property
    def resumed(self) -> bool:
        """Whether something was committed by an earlier attempt."""
        return bool(self._there)

    def add(self, prompt: Prompt) -> None:
        rows = self._open.setdefault(prompt.teacher, [])
        rows.append(prompt)
        if len(rows) == self._block_size:
            self._commit(prompt.teacher)

    def finish(self, counts: Counter[str]) -> None:
        for teacher in list(self._open):
            self._commit(teacher)
        if beyond := [block for block in self._there if block >= self._blocks]:
            raise self._changed(min(beyond))
        facts = {name: counts[name] for name in ("duplicates", "over_long", "truncated")}
        dropped = {name.removeprefix("dropped."): n for name, n in counts.items() if n and name.startswith("dropped.")}
        self._dataset.finish(
            self._blocks,
            fingerprint=self._input_fingerprint,
            facts={"content": self._content.hexdigest(), **facts, "dropped": dropped},
            known=self._known,
        )

    def _commit(self, teacher: str | None) -> None:
        rows, block = self._open.pop(teacher), self._blocks
        self._blocks += 1
        for row in rows:
            self._content.update(json.dumps([row.prompt_id, row.reference, row.teacher]).encode() + b"\n")
        table = _table(rows)
        if block not in self._there:
            part, first = self._dataset.commit(
                block,
                table,
                fingerprint=self._input_fingerprint,
                attempt=self._attempt,
                counts={"references": sum(row.reference is not None for row in rows)}
                | ({} if teacher is None else {f"teacher.{teacher}": len(rows)}),
            )
            self._known.append(part)
            if first:
                return
        if not self._is_committed(block, table):
            raise self._changed(block)

    def _is_committed(self, block: int, table: pa.Table) -> bool:
        """Whether the rows of a committed block are those of a table."""
        data = self._dataset.storage.view(f"{self._dataset.path}/{part_name(block)}")
        return self._dataset.origin(block) == self._input_fingerprint and bool(
            pa.ipc.open_file(pa.BufferReader(data)).read_all().equals(table)
        )

    def _changed(self, block: int) -> UserError:
        return UserError(
            f"{self._dataset.storage.url}/{self._dataset.path}/{part_name(block)}: holds other rows than the prompt sources "
            "give now: they, or the config, changed since the run began. Restore them, or use another run.dir."
        )


def _table(rows: list[Prompt]) -> pa.Table:
    columns = [
        [row.prompt_id for row in rows],
        [row.messages for row in rows],
        [row.reference for row in rows],
        [json.dumps(row.meta, sort_keys=True, default=str) for row in rows],
        [row.teacher for row in rows],
    ]
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, PROMPTS, strict=True)], schema=PROMPTS
    )


def rows_by_block(manifest: Manifest, limit: int | None) -> list[int]:
    """Prompts of each block that are sampled.

    A limit takes the first prompts of every teacher in proportion to what each has, so it may cut one block of each short.
    """
    blocks_of = teacher_blocks(manifest)
    if limit is None or limit >= manifest.rows:
        return [part.rows for part in manifest.parts]
    shares = _shares(limit, [sum(manifest.parts[block].rows for block in blocks) for blocks in blocks_of.values()])
    rows = [0] * len(manifest.parts)
    for blocks, left in zip(blocks_of.values(), shares, strict=True):
        for block in blocks:
            rows[block] = min(manifest.parts[block].rows, left)
            left -= rows[block]
    while rows and not rows[-1]:
        rows.pop()
    return rows


def _shares(total: int, sizes: list[int]) -> list[int]:
    """`total` in proportion to the sizes, in whole numbers that add up to it: the largest remainders are rounded up."""
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda index: (shares[index] - exact[index], index))
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares
