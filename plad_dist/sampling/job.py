"""What is to be sampled: plain values that travel between the driver and the actors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from plad_dist.config import Decoding, Model
from plad_dist.data.prompts import PROMPTS
from plad_dist.data.schemas import SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Part


@dataclass(frozen=True)
class SamplingJob:
    """One dataset of samples: a range of prompts, answered by one model with one decoding.

    Attributes:
        prompts: path of the prompts dataset in the run directory.
        output: path of the samples dataset.
        role: `teacher` or `student`, as the samples say it.
        model: the model's name, as the samples say it.
        weights: folder or hub name of the weights; engines change to them where they hold others.
        round: as the samples say it; `seed_round` keeps the seeds of other purposes apart.
        limit: how many of the prompts' rows are sampled.
        block_size: rows of a block.
        fingerprint: of all that decides the rows.
    """

    prompts: str
    output: str
    role: str
    model: str
    weights: str
    decoding: Decoding
    n: int
    seed: int
    round: int
    seed_round: int
    limit: int
    block_size: int
    fingerprint: str

    @property
    def blocks(self) -> int:
        return -(-self.limit // self.block_size)

    def rows_in(self, block: int) -> int:
        """Prompts of a block; the last may be short."""
        return min(self.block_size, self.limit - block * self.block_size)

    def input(self, storage: Storage) -> Dataset:
        return Dataset(storage, self.prompts, PROMPTS)

    def dataset(self, storage: Storage) -> Dataset:
        return Dataset(storage, self.output, SAMPLES)


@dataclass(frozen=True)
class Fleet:
    """The engines of one model and what they sample.

    Attributes:
        settings: the model's config section.
        path: folder or hub name that the engines start with.
        engine: engine arguments by vLLM's names.
    """

    name: str
    settings: Model
    path: str
    jobs: tuple[SamplingJob, ...]
    engine: dict[str, object] = field(default_factory=dict)
    replicas: int = 1
    cpus: float = 1.0


@dataclass(frozen=True)
class BlockResult:
    """What an actor did for one block. `part` is None where another attempt had committed it first."""

    part: Part | None
    rows: int
    errors: int
    first_error: str | None
    tokens: int
    seconds: float


def sample_seed(run_seed: int, round_: int, role: str, prompt_id: str, index: int) -> int:
    """Seed of one sample: the same sample is drawn again from the same place. 31 bits, which every engine takes."""
    text = f"{run_seed}\0{round_}\0{role}\0{prompt_id}\0{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
