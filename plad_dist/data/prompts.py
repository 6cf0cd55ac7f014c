"""Stage `prepare`: stream prompts from their sources into the training and the held-out dataset.

A block is committed as soon as it is full. A resumed stage reads the sources again and compares:
every committed block must hold the rows that the stage would write now. A stage that ends with an
error of the user removes the blocks that it has committed itself, so that the config can be
corrected.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa

from plad_dist.config import Config, FilesSource, PythonFunctionsSource, is_operational
from plad_dist.data.claims import OwnerCheck, check_owned
from plad_dist.data.dataset import DAMAGED, Dataset
from plad_dist.data.manifest import Manifest
from plad_dist.data.parts import DamagedPart, Part, part_name, read_header
from plad_dist.data.schemas import PROMPTS
from plad_dist.data.selection import HELDOUT, TRAIN, Router, Selection
from plad_dist.data.source_files import expand, local_bytes
from plad_dist.data.sources import Prompt, read_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.fingerprint import fingerprint

logger = logging.getLogger("plad")

_MAX_BYTES_READ_TWICE = 256 << 20
_LOG_EVERY_S = 30.0
_READ_THREADS = 16


def train_prompts(storage: Storage) -> Dataset:
    """Return the dataset of the prompts that pairs are sampled for and models are trained on."""
    return Dataset(storage, "prompts", PROMPTS)


def heldout_prompts(storage: Storage) -> Dataset:
    """Return the dataset of the prompts that only the evaluation and the collapse watch use."""
    return Dataset(storage, "eval/prompts", PROMPTS)


def prepare(config: Config, storage: Storage) -> dict[str, int]:
    """Write both prompt datasets and return their row counts.

    The `facts` of a manifest hold `content`, the SHA-256 of (prompt_id, reference, teacher) of all
    rows in order; the numbers of `duplicates`, `over_long` and `truncated` prompts; and the numbers
    of prompts `dropped`, by reason.

    Raises:
        UserError: a prompt is invalid, or a source changed since the run started.
    """
    datasets = {TRAIN: train_prompts(storage), HELDOUT: heldout_prompts(storage)}
    if not all(dataset.manifest() for dataset in datasets.values()):
        _write(config, datasets)
    manifests = {name: dataset.manifest() for name, dataset in datasets.items()}
    return {name: manifest.rows for name, manifest in manifests.items() if manifest}


def is_prepared(config: Config, storage: Storage) -> bool:
    """Return True if both prompt datasets are complete.

    Raises:
        UserError: a complete dataset is that of another config.
    """
    expected = _input_fingerprint(config)
    manifests = [dataset.complete_as(expected) for dataset in (train_prompts(storage), heldout_prompts(storage))]
    return None not in manifests


def _write(config: Config, datasets: dict[str, Dataset]) -> None:
    writers = {name: _Writer(dataset, config) for name, dataset in datasets.items()}
    # Large sources are committed while they are read. Small ones are read twice instead, so that
    # every problem is reported before anything is written and can still be fixed in the config.
    if not any(writer.is_resumed for writer in writers.values()) and _are_sources_small(config):
        check_prompts(config, all_rows=True)
    selection = Selection(config)
    try:
        _add_prompts(selection, writers)
        for name, writer in writers.items():
            writer.finish(selection.counts[name])
    except UserError:
        for writer in writers.values():
            writer.withdraw()
        raise
    for line in selection.summary():
        logger.info("prompts: %s", line)


def _add_prompts(selection: Selection, writers: dict[str, _Writer]) -> None:
    check, last_log = OwnerCheck(writers[TRAIN].storage), 0.0
    for name, prompt in selection:
        check()
        writers[name].add(prompt)
        # The clock starts at the first prompt, because a harvest reports itself before that.
        last_log = last_log or time.monotonic()
        if time.monotonic() - last_log > _LOG_EVERY_S:
            last_log = time.monotonic()
            rows = sum(counts["rows"] for counts in selection.counts.values())
            logger.info("prepare: %s prompts read", f"{rows:,}")


def _are_sources_small(config: Config) -> bool:
    total = 0
    for key, source in _sources(config):
        size = local_bytes(expand(source.paths, key)) if isinstance(source, FilesSource) else None
        if size is None:
            return False
        total += size
    return total <= _MAX_BYTES_READ_TWICE


def _sources(config: Config) -> list[tuple[str, Any]]:
    """Return the configured sources with their config keys."""
    sources = [("prompts.source", config.prompts.source), ("prompts.heldout", config.prompts.heldout)]
    return [(key, source) for key, source in sources if source is not None]


def check_prompts(config: Config, *, all_rows: bool) -> list[str]:
    """Raise the errors of :func:`prepare` without writing anything.

    Args:
        all_rows: read all rows; otherwise only the first row of each source. Python functions are
            never harvested here.

    Returns:
        The summary that :func:`prepare` would log, line by line; none if only the first rows were
        read.
    """
    Router(config)
    if all_rows and not isinstance(config.prompts.source, PythonFunctionsSource):
        selection = Selection(config)
        _consume(selection)
        return selection.summary()
    for key, source in _sources(config):
        if not isinstance(source, PythonFunctionsSource):
            _consume(islice(read_prompts(source, key), None if all_rows else 1))
    return []


def _consume(rows: Iterable[Any]) -> None:
    deque(rows, maxlen=0)


def teacher_blocks(manifest: Manifest) -> dict[str, list[int]]:
    """Return the blocks of every teacher that has any. A single teacher is named `teacher`."""
    blocks: dict[str, list[int]] = {}
    for block, part in enumerate(manifest.parts):
        names = [name.removeprefix("teacher.") for name in part.counts if name.startswith("teacher.")]
        blocks.setdefault(names[0] if names else "teacher", []).append(block)
    return blocks


def _input_fingerprint(config: Config) -> str:
    """Return the fingerprint of everything in the config that decides which rows are kept, and how.

    It does not cover the content of the sources, whose hash is in the manifest's facts.
    """
    prompts = {
        key: value for key, value in config.flat().items() if key.startswith("prompts.") and not is_operational(key)
    }
    teachers = {
        name: {"share": teacher.share, "filter": teacher.filter}
        for name, teacher in config.all_teachers().items()
        if config.teachers
    }
    # The tokenizers of these models decide which prompts are too long.
    sources = filter(None, (model.pretrained() for model in (*config.all_teachers().values(), config.student)))
    models = [source.settings for source in sources]
    lengths = [
        {"path": model.path, "revision": model.revision, "max_length": model.max_length} | model.rendering()
        for model in models
    ]
    return fingerprint("prompts", keys=prompts, seed=config.run.seed, teachers=teachers, lengths=lengths)


class _Writer:
    """Writes one dataset block by block.

    A block holds the prompts of one teacher. Blocks are numbered in the order in which they fill;
    the unfilled blocks at the end follow in the order in which they were opened.
    """

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self._dataset, self._block_size = dataset, config.prompts.block_size
        self._input_fingerprint = _input_fingerprint(config)
        self._attempt = uuid.uuid4().hex
        self._committed = self._committed_earlier()
        self._open: dict[str | None, list[Prompt]] = {}
        self._new_parts: list[Part] = []
        self._blocks = 0
        self._content = hashlib.sha256()

    def _committed_earlier(self) -> set[int]:
        """Return the blocks that an earlier attempt committed.

        The owner of the run sets blocks of another config aside, unless the dataset is complete: as
        long as it is not, nothing is derived from them. They are those of a command that was
        superseded while it committed them.
        """
        storage, blocks = self._dataset.storage, sorted(self._dataset.committed())
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            origins = list(threads.map(self._dataset.origin, blocks))
        foreign = [block for block, origin in zip(blocks, origins, strict=True) if origin != self._input_fingerprint]
        if not foreign or self._dataset.manifest() is not None:
            return set(blocks)
        if storage.claim is None:
            raise self._of_another_config(foreign[0])
        check_owned(storage)
        moved = self._dataset.reopen(None, [part_name(block) for block in foreign])
        logger.warning(
            "prepare: %s: %s of another config, which another command has left; moved to %s/%s/",
            self._dataset.path,
            ", ".join(moved),
            self._dataset.path,
            DAMAGED,
        )
        return set(blocks) - set(foreign)

    @property
    def storage(self) -> Storage:
        """The run directory."""
        return self._dataset.storage

    def withdraw(self) -> None:
        """Remove the parts that this very attempt has committed, if it still owns the run.

        Nothing is derived from them, as the dataset is not complete.
        """
        check_owned(self.storage)
        if self._dataset.manifest() is not None:
            return
        for part in self._new_parts:
            key = f"{self._dataset.path}/{part.name}"
            data = self.storage.read(key)
            try:
                is_own = data is not None and read_header(data).attempt == self._attempt
            except DamagedPart as error:
                logger.warning("%s/%s: %s; it stays, as nothing says who wrote it", self.storage.url, key, error)
                continue
            if is_own:
                self.storage.delete(key)

    @property
    def is_resumed(self) -> bool:
        """True if an earlier attempt committed blocks."""
        return bool(self._committed)

    def add(self, prompt: Prompt) -> None:
        """Add a prompt to the open block of its teacher, and commit the block if it is full."""
        rows = self._open.setdefault(prompt.teacher, [])
        rows.append(prompt)
        if len(rows) == self._block_size:
            self._commit(prompt.teacher)

    def finish(self, counts: Counter[str]) -> None:
        """Commit the open blocks and write the manifest.

        Args:
            counts: counts of the selection for this dataset.
        """
        for teacher in list(self._open):
            self._commit(teacher)
        if surplus := [block for block in self._committed if block >= self._blocks]:
            raise self._sources_changed(min(surplus))
        facts = {name: counts[name] for name in ("duplicates", "over_long", "truncated")}
        dropped = {name.removeprefix("dropped."): n for name, n in counts.items() if n and name.startswith("dropped.")}
        with self._late_parts_explained():
            self._dataset.finish(
                self._blocks,
                fingerprint=self._input_fingerprint,
                facts={"content": self._content.hexdigest(), **facts, "dropped": dropped},
                known_parts=self._new_parts,
            )

    def _commit(self, teacher: str | None) -> None:
        rows, block = self._open.pop(teacher), self._blocks
        self._blocks += 1
        for row in rows:
            self._content.update(json.dumps([row.prompt_id, row.reference, row.teacher]).encode() + b"\n")
        table = _table(rows)
        if block not in self._committed:
            with self._late_parts_explained():
                part, first = self._dataset.commit(
                    block,
                    table,
                    fingerprint=self._input_fingerprint,
                    attempt=self._attempt,
                    counts={"references": sum(row.reference is not None for row in rows)}
                    | ({} if teacher is None else {f"teacher.{teacher}": len(rows)}),
                )
            self._new_parts.append(part)
            if first:
                return
        with self._late_parts_explained():
            committed = self._dataset.read_committed(block, self._input_fingerprint)
        if not committed.equals(table):
            raise self._sources_changed(block)

    @contextmanager
    def _late_parts_explained(self) -> Iterator[None]:
        """Turn the refusal of another config's part into a message that says what to do.

        This command has set aside all such parts that were there when it began. In a complete
        dataset they stay refused.
        """
        try:
            yield
        except UserError as error:
            if self._dataset.manifest() is not None:
                raise
            raise RunFailed(
                f"{error.args[0].rpartition('; ')[0]}. Another command, which this one has superseded, committed it "
                "late. Nothing was overwritten; run again: the part is then set aside, and its block is written again"
            ) from None

    def _of_another_config(self, block: int) -> UserError:
        return UserError(
            f"{self._dataset.url}/{part_name(block)}: made by another config; restore that config, or use another "
            "run.dir"
        )

    def _sources_changed(self, block: int) -> UserError:
        return UserError(
            f"{self._dataset.url}/{part_name(block)}: its rows differ from those that the prompt sources yield now: "
            "the sources, or the config, changed since the run started; restore them, or use another run.dir"
        )


def _table(rows: list[Prompt]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": row.prompt_id,
                "reference": row.reference,
                "meta": json.dumps(row.meta, sort_keys=True, default=str),
                "teacher": row.teacher,
                **row.conversation.to_row(),
            }
            for row in rows
        ],
        schema=PROMPTS,
    )


def rows_by_block(manifest: Manifest, limit: int | None) -> list[int]:
    """Return the number of prompts to sample in each block, without trailing blocks that have none.

    A limit takes the first prompts of every teacher, in proportion to the prompts of each teacher,
    so it can cut one block of each teacher short.

    Args:
        limit: number of prompts in total, or None for all.
    """
    blocks_of = teacher_blocks(manifest)
    if limit is None or limit >= manifest.rows:
        return [part.rows for part in manifest.parts]
    shares = _shares(limit, [sum(manifest.parts[block].rows for block in blocks) for blocks in blocks_of.values()])
    rows = [0] * len(manifest.parts)
    for blocks, share in zip(blocks_of.values(), shares, strict=True):
        for block in blocks:
            rows[block] = min(manifest.parts[block].rows, share)
            share -= rows[block]
    while rows and not rows[-1]:
        rows.pop()
    return rows


def _shares(total: int, sizes: list[int]) -> list[int]:
    """Divide a total in proportion to sizes, by the largest remainder method."""
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda index: (shares[index] - exact[index], index))
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares
