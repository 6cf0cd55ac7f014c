"""Pair building as blocks of work: the job that names the inputs, and the actor."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from plad_dist.config import Model, Pairing
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import context_length
from plad_dist.data.parts import Part
from plad_dist.data.schemas import PAIRS, PROMPTS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError
from plad_dist.fleet.protocol import BlockJob, BlockResult, Heartbeat, Hints
from plad_dist.pairing.forms import PairForms
from plad_dist.pairing.pairs import PairBuilder
from plad_dist.pairing.scores import add_to_import_path, load_scorer


@dataclass(frozen=True)
class PairJob:
    """One dataset of pairs. Its blocks are those of the prompts and of both samples datasets.

    Attributes:
        prompts: path of the prompts dataset in the run directory.
        teacher: path of the teacher's samples.
        student: path of the rejected samples.
        output: path of the pairs dataset.
        fingerprint: fingerprint of everything that decides the rows.
        round: value of the column `round`.
        forms: how the samples become responses of the student.
    """

    prompts: str
    teacher: str
    student: str
    output: str
    fingerprint: str
    round: int = 0
    forms: PairForms = field(default_factory=PairForms)

    def dataset(self, storage: Storage) -> Dataset:
        return Dataset(storage, self.output, PAIRS)

    def read(self, storage: Storage, block: int) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Return a block of the prompts, of the teacher's samples and of the rejected samples."""
        paths = ((self.prompts, PROMPTS), (self.teacher, SAMPLES), (self.student, SAMPLES))
        prompts, teacher, student = (Dataset(storage, path, schema).read_block(block) for path, schema in paths)
        return prompts, teacher, student


class PairWorker:
    """Builds pairs, one block at a time. The next block is read meanwhile.

    Args:
        student: folder or hub name of the student, whose tokenizer the pairs use.
        settings: config section of the student.
        forms: how the samples become responses of the student.
        working_directory: the driver's, from which `pairing.score_function` is imported.
    """

    def __init__(
        self,
        storage: Storage,
        student: str,
        settings: Model,
        pairing: Pairing,
        forms: PairForms,
        working_directory: str,
    ) -> None:
        self._storage, self._student, self._settings, self._forms = storage, student, settings, forms
        self._pairing, self._working_directory = pairing, working_directory
        self._build_thread = ThreadPoolExecutor(1)  # tokenizers and models are not thread-safe
        self._finished = self._in_flight = 0

    async def start(self) -> str | None:
        """Load tokenizer and scorer. Return what the user must correct, None if all is well."""
        try:
            await asyncio.to_thread(self._load)
        except UserError as error:
            return str(error)
        return None

    def _load(self) -> None:
        add_to_import_path(self._working_directory)
        self._builder = PairBuilder(
            self._pairing,
            Renderer(self._student, self._settings),
            context_length(self._student, self._settings),
            load_scorer(self._pairing),
            self._forms,
        )

    async def work(self, job: BlockJob, block: int, attempt: str, hints: Hints) -> BlockResult:
        """Build the pairs of a block and commit its part. Errors name the block and the reason.

        Raises:
            UserError: the score function or the reward model cannot be used.
            RunFailed: any other failure.
        """
        assert isinstance(job, PairJob)
        started = time.monotonic()
        try:
            part, first = await self._build(job, block, attempt)
        except (UserError, RunFailed) as error:
            raise type(error)(f"{job.output}: block {block}: {error}") from None
        except Exception as error:
            # A plain type, because the user's own exception may not be picklable.
            raise RunFailed(f"{job.output}: block {block}: {type(error).__name__}: {error}") from error
        return BlockResult(part, first, time.monotonic() - started)

    async def _build(self, job: PairJob, block: int, attempt: str) -> tuple[Part, bool]:
        tables = await asyncio.to_thread(job.read, self._storage, block)
        prompts = tables[0].num_rows
        self._in_flight += prompts
        try:
            loop = asyncio.get_running_loop()
            pairs, counts = await loop.run_in_executor(self._build_thread, self._builder.build, *tables, job.round)
            committed = await asyncio.to_thread(
                job.dataset(self._storage).commit,
                block,
                pairs,
                fingerprint=job.fingerprint,
                attempt=attempt,
                counts={name: count for name, count in sorted(counts.items()) if count},
            )
        finally:
            self._in_flight -= prompts
        self._finished += prompts
        return committed

    async def heartbeat(self) -> Heartbeat:
        """Report the prompts that are finished and in flight."""
        return Heartbeat(self._finished, self._in_flight)

    async def stop(self) -> None:
        """Start no further block. The current one may finish."""
        self._build_thread.shutdown(wait=False, cancel_futures=True)
