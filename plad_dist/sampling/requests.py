"""Requests for datasets of samples, and the assignment of their blocks to responders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plad_dist.config import Config, Decoding
from plad_dist.data.dataset import Dataset
from plad_dist.data.manifest import Manifest
from plad_dist.data.prompts import rows_by_block, teacher_blocks
from plad_dist.fingerprint import fingerprint
from plad_dist.fleet.fleet import Assignment
from plad_dist.rundir import RunDir
from plad_dist.sampling.job import SamplingJob
from plad_dist.sampling.responders import Responder


@dataclass(frozen=True)
class DatasetRequest:
    """A dataset of samples to produce.

    Attributes:
        limit: largest number of prompts; None for all.
        n: samples of each prompt.
        seed_round: keeps the seeds of different purposes apart.
        decoding: None for the responder's own, as for pairs.
        responses: dataset of responses to score. If None, responses are drawn.
        own_tokens: True if the scored responses are in the responder's own tokens.
    """

    prompts: Dataset
    output: Dataset
    limit: int | None
    n: int
    seed_round: int
    decoding: Decoding | None = None
    responses: Dataset | None = None
    own_tokens: bool = True


def assign_blocks(
    config: Config, run: RunDir, responders: Sequence[Responder], request: DatasetRequest
) -> dict[str, Assignment]:
    """Return the assignment of each responder, by its name.

    Several teachers share a dataset: each samples the blocks of its own prompts.

    Raises:
        UserError: the prompts, or the responses to score, are not complete yet.
    """
    manifest = request.prompts.require("prepare")
    rows = rows_by_block(manifest, request.limit)
    cut = {block: count for block, count in enumerate(rows) if count < manifest.parts[block].rows}
    decodings = [request.decoding or responder.decoding() for responder in responders]
    input_fingerprint = _fingerprint(config, responders, decodings, request, manifest, rows, cut)
    if request.responses is not None:
        # The responses may have been repaired since, so that an old score is of another text.
        request.output.set_aside_unless(input_fingerprint)
    role = responders[0].role
    blocks_of = teacher_blocks(manifest) if role == "teacher" else {responders[0].name: range(len(rows))}
    assignments = {}
    for responder, decoding in zip(responders, decodings, strict=True):
        job = SamplingJob(
            prompts=request.prompts.path,
            output=request.output.path,
            role=role,
            model=responder.path,
            weights=responder.path,
            decoding=decoding,
            n=request.n,
            seed=config.run.seed,
            round=run.round,
            seed_round=request.seed_round,
            fingerprint=input_fingerprint,
            cut=cut,
            responses=request.responses.path if request.responses else None,
            own_tokens=request.own_tokens,
        )
        blocks = [block for block in blocks_of.get(responder.name, []) if block < len(rows)]
        assignments[responder.name] = Assignment(job, blocks, [count * request.n for count in rows])
    return assignments


def _fingerprint(
    config: Config,
    responders: Sequence[Responder],
    decodings: Sequence[Decoding],
    request: DatasetRequest,
    manifest: Manifest,
    rows: Sequence[int],
    cut: dict[int, int],
) -> str:
    """Return the fingerprint of everything that decides the samples.

    Args:
        manifest: manifest of the prompts.
        rows: prompts to sample of each block.
        cut: prompts to sample of each block that is not sampled as a whole.
    """
    scored: dict[str, Any] | None = None
    if request.responses is not None:
        scored = {"contents": request.responses.require("sample").contents, "own_tokens": request.own_tokens}
    return fingerprint(
        "samples",
        prompts={"fingerprint": manifest.fingerprint, "content": manifest.facts.get("content")},
        rows=sum(rows),
        cut={str(block): count for block, count in cut.items()},
        models=[responder.identity for responder in responders],
        decodings=[decoding.model_dump(mode="json") for decoding in decodings],
        n=request.n,
        seed=config.run.seed,
        seed_round=request.seed_round,
        role=responders[0].role,
        scored=scored,
    )
