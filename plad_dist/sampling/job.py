"""What is to be sampled: plain values that travel between the driver and the actors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from plad_dist.config import Decoding
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset


@dataclass(frozen=True)
class SamplingJob:
    """One dataset of samples: prompts, answered by one model with one decoding.

    Attributes:
        prompts: path of the prompts dataset in the run directory.
        output: path of the samples dataset.
        role: `teacher` or `student`, as the samples say it.
        model: the model's name, as the samples say it.
        weights: folder or hub name of the weights; engines change to them where they hold others.
        n: samples of each prompt.
        round: as the samples say it; `seed_round` keeps the seeds of other purposes apart.
        responses: path of a samples dataset whose responses are scored instead of drawing any; None to draw. Then `n` is
            how many of each prompt there are.
        own_tokens: the model that scores has the tokens of the one that wrote them; otherwise the texts are tokenized anew.
        cut: how many prompts are sampled of the blocks of which not all are.
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
    fingerprint: str
    cut: Mapping[int, int] = field(default_factory=dict)
    responses: str | None = None
    own_tokens: bool = True

    def input(self, storage: Storage) -> Dataset:
        return Dataset(storage, self.prompts, PROMPTS)

    def dataset(self, storage: Storage) -> Dataset:
        return Dataset(storage, self.output, SAMPLES)


def sample_seed(run_seed: int, round_: int, role: str, prompt_id: str, index: int) -> int:
    """Seed of one sample: the same sample is drawn again from the same place. 31 bits, which every engine takes."""
    text = f"{run_seed}\0{round_}\0{role}\0{prompt_id}\0{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
