"""Stage `pair`: pseudo-preference pairs, the teacher's response over the student's, in the student's tokens."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from plad_dist.config import Config, Pairing, fingerprint
from plad_dist.data.models import context_length, model_identity
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.schemas import PAIRS
from plad_dist.data.store import Dataset, Manifest
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError
from plad_dist.evaluation.metrics import rouge_l
from plad_dist.progress import Progress
from plad_dist.rundir import ROUND, RunDir, require_model


def build_pairs(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Build the pairs and the held-out pairs from committed samples, and return the facts in the pairs' manifest.

    Raises:
        UserError: samples are missing.
        RunFailed: not one pair was left.
    """
    facts = _build(config, run, "train", progress)
    _build(config, run, "heldout", progress)
    return facts


def is_paired(run: RunDir) -> bool:
    """Whether both pair datasets are committed."""
    return all(dataset.manifest() is not None for dataset in (run.pairs(), run.heldout_pairs()))


def _build(config: Config, run: RunDir, which: str, progress: Progress) -> dict[str, Any]:
    train = which == "train"
    prompts = train_prompts(run.storage) if train else heldout_prompts(run.storage)
    samples = {role: run.samples(role) if train else run.heldout_samples(role) for role in ("teacher", "student")}
    output = run.pairs() if train else run.heldout_pairs()
    if (done := output.manifest()) is not None:
        return done.facts
    manifests = {role: _required(dataset) for role, dataset in samples.items()}
    student = run.student(config)
    require_model(student, "train --phase warmup")
    builder = PairBuilder(config.pairing, Renderer(student, config.student), context_length(student, config.student))
    made_of = fingerprint(
        [config.pairing.model_dump(mode="json"), [manifest.fingerprint for manifest in manifests.values()],
         model_identity(student, config.student), config.student.template]
    )  # fmt: skip
    blocks = len(manifests["teacher"].parts)
    attempt, committed, known = uuid.uuid4().hex, output.committed(), []
    counts: Counter[str] = Counter()
    progress.start(f"pair {which}", blocks, "blocks")
    for block in range(blocks):
        rows, block_counts = builder.build(
            prompts.read_block(block), samples["teacher"].read_block(block), samples["student"].read_block(block)
        )
        counts += block_counts
        if block not in committed:
            table = pa.Table.from_pylist(rows, schema=PAIRS)
            part, _ = output.commit(block, table, fingerprint=made_of, attempt=attempt)
            known.append(part)
        progress.advance(1)
    facts = pair_facts(counts)
    if not facts["pairs"]:
        raise RunFailed(
            f"{output.path}: no pair was left of {facts['prompts']:,} prompts. Dropped, by reason: {facts['drops']}"
        )
    output.finish(blocks, fingerprint=made_of, facts=facts, known=known)
    return facts


def _required(samples: Dataset) -> Manifest:
    manifest = samples.manifest()
    if manifest is None:
        raise UserError(f"{samples.storage.url}/{samples.path}: not complete yet; run `plad sample` first")
    return manifest


def pair_facts(counts: Counter[str]) -> dict[str, Any]:
    """What the pair builder found, for the manifest and the report. The teacher's share of wins tells the capacity gap."""
    scored = counts["better"] + counts["worse"] + counts["equal"]
    return {
        "prompts": counts["prompts"],
        "pairs": counts["pairs"],
        "drops": {key.removeprefix("drop:"): count for key, count in sorted(counts.items()) if key.startswith("drop:")},
        "teacher_better_share": counts["better"] / scored if scored else None,
        "teacher_worse_share": counts["worse"] / scored if scored else None,
        "scored": scored,
    }


@dataclass(frozen=True)
class PairBuilder:
    """Pairs of one block, and why the others were dropped."""

    pairing: Pairing
    renderer: Renderer
    context: int

    def build(
        self, prompts: pa.Table, teacher: pa.Table, student: pa.Table
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Rows of the pairs dataset, and counts: prompts, pairs, `drop:<reason>`, and who had the better score."""
        answers = {name: _by_prompt(table) for name, table in (("teacher", teacher), ("student", student))}
        rows: list[dict[str, Any]] = []
        counts: Counter[str] = Counter()
        answered = {
            name for name, rows in answers["student"].items() if any(row["finish_reason"] != "error" for row in rows)
        }
        asked = prompts.to_pylist()
        # A prompt that the student's template cannot render has no answer of the student, and is not rendered here either.
        rendered = self.renderer.prompt_ids([prompt["messages"] for prompt in asked if prompt["prompt_id"] in answered])
        ids_of = iter(rendered)
        all_ids = [next(ids_of) if prompt["prompt_id"] in answered else [] for prompt in asked]
        for prompt, prompt_ids in zip(asked, all_ids, strict=True):
            chosen, rejected = (answers[name].get(prompt["prompt_id"], []) for name in ("teacher", "student"))
            if not chosen and not rejected:
                continue  # past sampling.limit
            counts["prompts"] += 1
            rows += self._pairs_of(prompt, prompt_ids, chosen, rejected, counts)
        counts["pairs"] += len(rows)
        return rows, counts

    def _pairs_of(
        self,
        prompt: dict[str, Any],
        prompt_ids: list[int],
        chosen: list[dict[str, Any]],
        rejected: list[dict[str, Any]],
        counts: Counter[str],
    ) -> Iterator[dict[str, Any]]:
        kept = 0
        for better, worse in _combinations(chosen, rejected):
            if kept == self.pairing.max_pairs_per_prompt:
                counts["drop:over_max_pairs_per_prompt"] += 1
                continue
            row = self._pair(prompt, prompt_ids, better, worse, counts)
            if isinstance(row, str):
                counts[f"drop:{row}"] += 1
            else:
                kept += 1
                yield row

    def _pair(
        self,
        prompt: dict[str, Any],
        prompt_ids: list[int],
        better: dict[str, Any],
        worse: dict[str, Any],
        counts: Counter[str],
    ) -> dict[str, Any] | str:
        """The pair, or the reason for which it is dropped."""
        reason = self._unusable(better, worse)
        if reason is not None:
            return reason
        (chosen_ids,) = self.renderer.response_ids([better["text"]])
        rejected_ids = self._own_ids(worse)
        limit = min(self.pairing.max_tokens or self.context, self.context)
        if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > limit:
            return "too_long"
        if chosen_ids == rejected_ids:
            return "identical"
        scores = self._scores(prompt["reference"], better["text"], worse["text"], counts)
        return {
            "prompt_id": prompt["prompt_id"],
            "prompt_token_ids": prompt_ids,
            "chosen_token_ids": chosen_ids,
            "rejected_token_ids": rejected_ids,
            "chosen_text": better["text"],
            "rejected_text": worse["text"],
            "chosen_score": scores[0],
            "rejected_score": scores[1],
            "round": ROUND,
        }

    def _unusable(self, better: dict[str, Any], worse: dict[str, Any]) -> str | None:
        if better["finish_reason"] == "error" or worse["finish_reason"] == "error":
            return "error"
        if better["finish_reason"] == "length":
            return "chosen_truncated"
        if worse["finish_reason"] == "length" and self.pairing.truncated_rejected == "drop":
            return "rejected_truncated"
        if not better["text"].strip():
            return "chosen_empty"
        if not worse["token_ids"]:
            return "rejected_empty"
        return "identical" if better["text"].strip() == worse["text"].strip() else None

    def _own_ids(self, sample: dict[str, Any]) -> list[int]:
        """The student's own tokens as it wrote them, with the end-of-sequence that a finished response has."""
        ids = list(sample["token_ids"])
        if sample["finish_reason"] == "stop" and ids[-1] not in self.renderer.end_ids:
            ids.append(self.renderer.eos_id)
        return ids

    def _scores(
        self, reference: str | None, better: str, worse: str, counts: Counter[str]
    ) -> tuple[float | None, float | None]:
        if reference is None or self.pairing.score == "none":
            return None, None
        chosen, rejected = rouge_l(reference, better), rouge_l(reference, worse)
        counts["better" if chosen > rejected else "worse" if chosen < rejected else "equal"] += 1
        return chosen, rejected


def _by_prompt(samples: pa.Table) -> dict[str, list[dict[str, Any]]]:
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in samples.select(["prompt_id", "sample_index", "text", "token_ids", "finish_reason"]).to_pylist():
        answers.setdefault(row["prompt_id"], []).append(row)
    return answers


def _combinations(
    chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """All pairs of samples; those that use every sample once come first."""
    for shift in range(len(rejected)):
        for index, better in enumerate(chosen):
            yield better, rejected[(index + shift) % len(rejected)]
