"""Description of one dataset of samples, and the seed of each sample."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from plad_dist.config import Decoding
from plad_dist.data.dataset import Dataset
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.data.storage import Storage


@dataclass(frozen=True)
class SamplingJob:
    """One dataset of samples: responses of one model to prompts, with one decoding.

    Plain values, sent from the driver to the actors.

    Attributes:
        prompts: path of the prompts dataset in the run directory.
        output: path of the samples dataset in the run directory.
        role: `role` of the samples: `teacher`, `student` or `judge`.
        model: `model` of the samples.
        weights: folder or hub name of the weights. An engine with other weights changes them.
        n: samples of each prompt.
        seed: seed of the run.
        round: `round` of the samples.
        seed_round: keeps the seeds of different purposes apart.
        fingerprint: fingerprint of everything that decides the rows.
        cut: number of prompts to sample of each block that is not sampled as a whole.
        responses: path of a samples dataset with `n` responses to each prompt, which are scored. If
            None, responses are drawn.
        own_tokens: True if the scored responses are in this model's tokens. Otherwise their texts
            are tokenized.
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
        """Return the prompts dataset."""
        return Dataset(storage, self.prompts, PROMPTS)

    def dataset(self, storage: Storage) -> Dataset:
        """Return the samples dataset."""
        return Dataset(storage, self.output, SAMPLES)


def sample_seed(run_seed: int, round_: int, role: str, prompt_id: str, index: int) -> int:
    """Return the seed of one sample, which decides it together with prompt, model and decoding.

    It has 31 bits, which every engine accepts.
    """
    text = f"{run_seed}\0{round_}\0{role}\0{prompt_id}\0{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
