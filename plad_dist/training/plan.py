"""What a phase trains: its start, its groups and its steps, from the config and from what is committed."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from plad_dist.config import Config, Model, Phase
from plad_dist.data.models import context_length, load_model_config, model_fingerprint, model_identity, vocabulary_size
from plad_dist.data.prompts import train_prompts
from plad_dist.data.store import Manifest
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError
from plad_dist.fingerprint import fingerprint
from plad_dist.phases import SEQKD, TEACHER, WARMUP, phases_of
from plad_dist.rundir import RunDir, require_model, round_of
from plad_dist.training.batches.check import check_pairs, check_texts
from plad_dist.training.batches.groups import DataSpec, group_counts
from plad_dist.training.batches.packing import steps_per_epoch
from plad_dist.training.checkpoints.store import OWNER, CheckpointStore
from plad_dist.training.job import PhaseJob
from plad_dist.training.model.attention import attention_of, check_rope
from plad_dist.training.model.deepspeed_config import load_deepspeed
from plad_dist.training.model.scratch import make_model

Kind = Literal["references", "teacher", "pairs", "lists", "chosen"]

# Keys of a phase that do not change what it trains.
_OPERATIONAL = ("checkpoint_every", "checkpoint_seconds", "keep_checkpoints")


def plan_phase(name: str, config: Config, run: RunDir) -> PhaseJob:
    """Everything about a phase. A model from scratch is made if it is not there.

    Raises:
        UserError: the phase's inputs are missing, or pairs or texts cannot be trained on.
        RunFailed: there is nothing to train on.
    """
    training, number = config.training, round_of(name)
    run = run.at_round(number or 0)
    role = "teacher" if name == TEACHER else "student"
    settings = config.trained(role)
    phase = _phase(name, config)
    calibrates = number is not None or name == SEQKD
    start = run.student(config) if calibrates else _first_model(role, settings, config, run)
    require_model(start, run.student_made_by)
    context = context_length(start, settings)
    model, renderer = load_model_config(start, settings), Renderer(start, settings)
    check_rope(model, context, role)
    check_vocabulary(start, renderer, vocabulary_size(model))
    _check_partitions(config)
    kind, path = _data(name, config, run)
    shares = attention_of(model, training.max_group_tokens).layout.shares
    data = DataSpec(
        kind=kind,
        path=path,
        context=context,
        longest=training.max_group_tokens,
        shares=shares,
        over_long=training.over_long or ("fail" if calibrates else "truncate"),
        end_ids=tuple(sorted(renderer.end_ids)) if kind == "lists" else (),
    )
    heldout = replace(data, kind="pairs", path=run.heldout_pairs().path) if calibrates else None
    manifest = data.dataset(run.storage).require("run")
    if calibrates and manifest.facts.get("tokenizer") not in (None, renderer.identity):
        raise UserError(
            f"{path}: these pairs are in the tokens of another student than {start}. Delete {path} and {run.heldout_pairs().path} to have "
            "them made anew, or restore the student."
        )
    kept = run.checkpoints(config)
    decides = {key: value for key, value in phase.model_dump(mode="json").items() if key not in _OPERATIONAL}
    groups = sum(group_counts(data, manifest.parts))
    steps = _equal_compute_steps(config, manifest, shares=shares) if name == SEQKD else _steps(phase, groups)
    identity = fingerprint(
        "phase",
        settings=decides,
        steps=steps,
        data={"kind": kind, "contents": manifest.contents, "content": manifest.facts.get("content")},
        start=model_identity(start, settings),
        template=settings.template,
        tokenizer=renderer.identity,
        context=context,
        longest=data.longest,
        over_long=data.over_long,
        end_ids=data.end_ids,
        seed=config.run.seed,
        dtype=training.dtype,
        lora=training.lora.model_dump(mode="json") if training.lora else None,
    )
    job = PhaseJob(
        name=name,
        start=start,
        settings=settings,
        phase=phase,
        data=data,
        heldout=heldout,
        heldout_limit=training.heldout_pairs,
        seed=config.run.seed,
        steps=steps,
        deepspeed=load_deepspeed(training.deepspeed),
        dtype=training.dtype,
        micro_batch_tokens=training.micro_batch_tokens,
        longest=training.max_group_tokens,
        attention=training.attention,
        lora=training.lora,
        gradient_checkpointing=training.gradient_checkpointing,
        divergence_factor=training.divergence_factor,
        trackers=tuple(training.trackers),
        storage=run.storage,
        checkpoints=kept,
        staging=training.staging_dir,
        watch=training.watch,
        fingerprint=identity,
    )
    if not CheckpointStore(kept, name, None).steps() and model_fingerprint(run.model(name)) != job.fingerprint:
        _check_data(job, groups)  # what is or was trained on has been looked at before
    _check_checkpoints(CheckpointStore(kept, name, job.fingerprint), run)
    return job


def _check_data(job: PhaseJob, groups: int) -> None:
    """Raise :class:`UserError` for pairs or texts that cannot be trained on."""
    if job.heldout is not None:
        for spec in (job.data, job.heldout):
            check_pairs(spec, job.storage, job.start, job.settings, job.phase.loss, job.micro_batch_tokens)
    elif job.steps >= steps_per_epoch(groups, job.phase.batch_groups):  # else few of them are read at all
        check_texts(job.data, job.storage, job.start, job.settings, job.micro_batch_tokens)


def _check_checkpoints(store: CheckpointStore, run: RunDir) -> None:
    """Raise :class:`UserError` for checkpoints of another phase or run, before they are touched."""
    store.newest()
    if store.storage == run.storage:
        return
    key, own = f"{store.folder}/{OWNER}", run.storage.url.encode()
    if not store.storage.create(key, own) and store.storage.read(key) != own:
        owner = (store.storage.read(key) or b"").decode(errors="replace")
        raise UserError(
            f"training.checkpoint_url: {store.storage.url}: has the checkpoints of another run, {owner}. Give each run its own; if it is "
            f"this one under its old name, delete {key} there"
        )


def check_vocabulary(model: str, renderer: Renderer, vocabulary: int) -> None:
    """Raise :class:`UserError` where the tokenizer has tokens that the model has not."""
    tokens = int(renderer.tokenizer.vocab_size)  # without added ones, such as padding
    if tokens > vocabulary:
        raise UserError(
            f"{model}: its tokenizer has {tokens:,} tokens, the model's embeddings {vocabulary:,}: it is the tokenizer of another "
            "model. Put the right one into the folder."
        )


def _check_partitions(config: Config) -> None:
    """Raise :class:`UserError` for a second partition of ZeRO (hpZ) that the workers cannot be divided into.

    An elastic group takes the largest one that divides its size.
    """
    zero = load_deepspeed(config.training.deepspeed)["zero_optimization"]
    fewest, most = config.training.workers
    size = min(int(zero.get("zero_hpz_partition_size", 1)), most)
    if fewest == most and size > 1 and most % size:
        raise UserError(
            f"training.num_workers={most} is no multiple of zero_hpz_partition_size={size} (training.deepspeed: "
            f"{config.training.deepspeed}): set one that is, or another DeepSpeed config"
        )
    if config.training.watch is not None and zero["stage"] != 3:
        raise UserError(
            f"training.watch: looks at checkpoints of ZeRO stage 3, training.deepspeed: {config.training.deepspeed} has stage "
            f"{zero['stage']}: set another DeepSpeed config, or leave training.watch empty"
        )
    if fewest < most and zero["stage"] != 3:
        raise UserError(
            f"training.num_workers: an elastic group needs ZeRO stage 3, training.deepspeed: {config.training.deepspeed} has "
            f"stage {zero['stage']}: set another DeepSpeed config, or a single number of workers"
        )


def _phase(name: str, config: Config) -> Phase:
    phase = phases_of(config).get(name)
    if phase is None:
        raise UserError(f"this config has no phase {name}: it has no section training.{name}")
    return phase


def _first_model(role: str, settings: Model, config: Config, run: RunDir) -> str:
    start = run.start_of(role, settings)
    if settings.scratch is not None:
        prompts = train_prompts(run.storage)
        manifest = prompts.require("prepare")
        input_fingerprint = str(manifest.facts["content"])
        make_model(settings.scratch, prompts, input_fingerprint, config.run.seed, run.model(f"{role}-init"))
    return start


def _data(name: str, config: Config, run: RunDir) -> tuple[Kind, str]:
    if round_of(name) is not None:
        return ("lists" if config.training.round.loss.name == "listwise" else "pairs"), run.pairs().path
    if name == SEQKD:
        return "chosen", run.pairs().path
    if name == WARMUP and config.training.warmup is not None and config.training.warmup.data == "teacher":
        return "teacher", run.samples("teacher").path
    return "references", ""


def _steps(phase: Phase, groups: int) -> int:
    if not groups:
        raise RunFailed(
            "nothing to train on: no references, no finished teacher outputs, or no pairs (see `plad pair`)"
        )
    steps = max(1, round(phase.epochs * steps_per_epoch(groups, phase.batch_groups)))
    return min(steps, phase.max_steps or steps)


def _equal_compute_steps(config: Config, pairs: Manifest, *, shares: bool) -> int:
    """Steps of sequence-level KD that compute as many tokens as the round does on both sides of the pairs.

    A group's prompt is computed once where responses share it, else for each of them; each response's last token is predicted
    but not computed.
    """
    # Over all groups, as they are in the manifest; groups over training.max_group_tokens are few.
    chosen, rejected = (
        pairs.count(f"tokens:{side}") - pairs.count(f"responses:{side}") for side in ("chosen", "rejected")
    )
    if shares:
        both, alone = (pairs.count("tokens:prompt") + responses for responses in (chosen + rejected, chosen))
    else:
        alone = pairs.count("tokens:prompts_of_chosen") + chosen
        both = alone + pairs.count("tokens:prompts_of_rejected") + rejected
    round_, seqkd = config.training.round, config.training.seqkd
    assert seqkd is not None
    tokens = _steps(round_, pairs.count("groups")) * round_.batch_groups * both
    return max(1, round(tokens / (alone * seqkd.batch_groups)))
