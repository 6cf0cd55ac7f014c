"""What a phase trains: its start, its groups and its steps, from the config and from what is committed."""

from __future__ import annotations

from typing import Literal

import pyarrow.compute as pc

from plad_dist.config import Config, Model, Phase, fingerprint
from plad_dist.data.models import context_length, model_identity
from plad_dist.data.prompts import train_prompts
from plad_dist.data.store import Dataset, Manifest
from plad_dist.errors import RunFailed, UserError
from plad_dist.phases import ROUND_PHASE, SEQKD, TEACHER, WARMUP
from plad_dist.rundir import RunDir, require_model
from plad_dist.training.batching import steps_per_epoch
from plad_dist.training.deepspeed_config import load_deepspeed
from plad_dist.training.groups import DataSpec
from plad_dist.training.loop import PhaseJob
from plad_dist.training.scratch import make_model

Kind = Literal["references", "teacher", "pairs", "chosen"]

# Keys of a phase that do not change what it trains.
_OPERATIONAL = ("checkpoint_every", "keep_checkpoints")


def plan_phase(name: str, config: Config, run: RunDir) -> PhaseJob:
    """Everything about a phase. A model from scratch is made if it is not there.

    Raises:
        UserError: the phase's inputs are missing.
    """
    training = config.training
    role = "teacher" if name == TEACHER else "student"
    settings = config.trained(role)
    phase = _phase(name, config)
    calibrates = name in (ROUND_PHASE, SEQKD)
    start = run.student(config) if calibrates else _first_model(role, settings, config, run)
    require_model(start, f"train --phase {WARMUP}")
    kind, source = _data(name, config, run)
    manifest = source.require("run")
    context = context_length(start, settings)
    decides = {key: value for key, value in phase.model_dump(mode="json").items() if key not in _OPERATIONAL}
    steps = _equal_compute_steps(config, source) if name == SEQKD else _steps(phase, _count(kind, source, manifest))
    identity = [
        decides, steps, manifest.fingerprint, manifest.facts.get("content"), model_identity(start, settings), settings.template, kind, context,
        config.run.seed, training.dtype,
    ]  # fmt: skip
    return PhaseJob(
        name=name,
        start=start,
        settings=settings,
        phase=phase,
        data=DataSpec(kind, source.path, context),
        heldout=DataSpec("pairs", run.heldout_pairs().path, context) if calibrates else None,
        heldout_limit=training.heldout_pairs,
        seed=config.run.seed,
        steps=steps,
        deepspeed=load_deepspeed(training.deepspeed),
        dtype=training.dtype,
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_checkpointing=training.gradient_checkpointing,
        storage=run.storage,
        fingerprint=fingerprint(identity),
    )


def _phase(name: str, config: Config) -> Phase:
    training = config.training
    phase = {TEACHER: training.teacher, WARMUP: training.warmup, ROUND_PHASE: training.round, SEQKD: training.seqkd}[
        name
    ]
    if phase is None:
        raise UserError(f"this config has no phase {name}: it has no section training.{name}")
    return phase


def _first_model(role: str, settings: Model, config: Config, run: RunDir) -> str:
    start = run.start_of(role, settings)
    if settings.scratch is not None:
        prompts = train_prompts(run.storage)
        manifest = prompts.require("prepare")
        made_of = str(manifest.facts["content"])
        make_model(settings.scratch, prompts.read(), made_of, config.run.seed, run.model(f"{role}-init"))
    return start


def _data(name: str, config: Config, run: RunDir) -> tuple[Kind, Dataset]:
    if name == ROUND_PHASE:
        return "pairs", run.pairs()
    if name == SEQKD:
        return "chosen", run.pairs()
    if name == WARMUP and config.training.warmup is not None and config.training.warmup.data == "teacher":
        return "teacher", run.samples("teacher")
    return "references", train_prompts(run.storage)


def _count(kind: Kind, source: Dataset, manifest: Manifest) -> int:
    """Groups that a phase has."""
    match kind:
        case "references":
            return int(pc.count(source.read(["reference"])["reference"]).as_py())
        case "teacher":
            reasons = source.read(["finish_reason"])["finish_reason"]
            return int(pc.sum(pc.equal(reasons, "stop")).as_py() or 0)
        case _:
            return manifest.rows


def _steps(phase: Phase, groups: int) -> int:
    if not groups:
        raise RunFailed(
            "nothing to train on: no references, no finished teacher outputs, or no pairs (see `plad pair`)"
        )
    steps = max(1, round(phase.epochs * steps_per_epoch(groups, phase.batch_groups)))
    return min(steps, phase.max_steps or steps)


def _equal_compute_steps(config: Config, pairs: Dataset) -> int:
    """Steps of sequence-level KD that compute as many tokens as the round does on both sides of the pairs.

    A group's prompt is computed once; each response's last token is predicted but not computed.
    """
    columns = pairs.read(["prompt_token_ids", "chosen_token_ids", "rejected_token_ids"])
    prompt, chosen, rejected = (pc.mean(pc.list_value_length(column)).as_py() for column in columns.columns)
    round_, seqkd = config.training.round, config.training.seqkd
    assert seqkd is not None
    tokens = _steps(round_, columns.num_rows) * round_.batch_groups * (prompt + chosen + rejected - 2)
    return max(1, round(tokens / ((prompt + chosen - 1) * seqkd.batch_groups)))
