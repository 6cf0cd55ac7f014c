"""Plan of a phase from the config and committed data: starting model, groups, number of steps.

:func:`plan_phase` works in three steps: it checks that the inputs fit the model, computes the
fingerprint of all that decides the trained model, and describes the phase as a
:class:`~plad_dist.training.job.PhaseJob`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plad_dist.compat.muon import unnamed_embeddings
from plad_dist.config import Config, Model, Phase, Training
from plad_dist.data.manifest import Manifest
from plad_dist.data.model_checks import check_vocabulary
from plad_dist.data.models import context_length, load_model_config, model_fingerprint, model_identity, vocabulary_size
from plad_dist.data.prompts import train_prompts
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.errors import RunFailed, UserError
from plad_dist.fingerprint import fingerprint
from plad_dist.pairing.forms import teacher_forms
from plad_dist.phases import SEQKD, TEACHER, WARMUP, phases_of
from plad_dist.rundir import RunDir, require_model, round_of
from plad_dist.training.batches.check import check_pairs, check_texts
from plad_dist.training.batches.groups import DataSpec, GroupKind, group_counts
from plad_dist.training.batches.micro_batch import RowSupport
from plad_dist.training.batches.schedule import steps_per_epoch
from plad_dist.training.checkpoints.store import OWNER, CheckpointStore
from plad_dist.training.cut.model import make_cut_model
from plad_dist.training.job import PhaseJob
from plad_dist.training.model.attention import attention_of, check_rope
from plad_dist.training.model.deepspeed_config import check_workers, load_deepspeed
from plad_dist.training.model.experts import is_mixture
from plad_dist.training.model.families import row_support
from plad_dist.training.model.meta import build_without_weights
from plad_dist.training.model.scratch import make_model

# Keys of a phase that do not influence the trained model.
_OPERATIONAL = ("checkpoint_every", "checkpoint_seconds", "keep_checkpoints")


def plan_phase(name: str, config: Config, run: RunDir) -> PhaseJob:
    """Return the description of a phase. A model that the run creates is written if the phase
    starts from it.

    Raises:
        UserError: an input of the phase is missing or does not fit the model, its pairs or texts
            cannot be trained on, or its checkpoints belong to another phase or run.
        RunFailed: the phase has no groups.
    """
    run = run.at_round(round_of(name) or 0)
    inputs = _checked_inputs(name, config, run)
    groups = sum(group_counts(inputs.data, inputs.manifest.parts))
    steps = _equal_compute_steps(config, inputs) if name == SEQKD else _steps(inputs.phase, groups)
    job = _job(inputs, config, run, steps, _identity(inputs, config, steps))
    if (
        not CheckpointStore(job.checkpoints, name, None).steps()
        and model_fingerprint(run.model(name)) != job.fingerprint
    ):
        _check_data(job, groups)  # data of a phase that has checkpoints or a model has passed this check before
    _check_checkpoints(CheckpointStore(job.checkpoints, name, job.fingerprint), run)
    return job


# -- inputs


@dataclass(frozen=True)
class _PhaseInputs:
    """Inputs of a phase, checked to fit one another.

    Attributes:
        start: folder or hub name of the starting model.
        tokenizer: identity of the tokenizer with its template.
        row_support: rows in which the model's log-likelihoods are exact.
        manifest: manifest of the dataset whose parts count the groups.
    """

    name: str
    phase: Phase
    start: str
    settings: Model
    tokenizer: str
    row_support: RowSupport
    data: DataSpec
    heldout: DataSpec | None
    manifest: Manifest


def _checked_inputs(name: str, config: Config, run: RunDir) -> _PhaseInputs:
    """Return the inputs of a phase after the checks that they fit the model."""
    phase = _phase(name, config)
    is_calibration = round_of(name) is not None or name == SEQKD
    role = "teacher" if name == TEACHER else "student"
    settings = config.trained(role)
    start = run.student(config) if is_calibration else _first_model(role, settings, config, run)
    require_model(start, run.student_made_by)
    context = context_length(start, settings)
    model, renderer = load_model_config(start, settings), Renderer(start, settings)
    check_rope(model, context, role)
    check_vocabulary(start, renderer, vocabulary_size(model))
    check_workers(config.training)
    support = row_support(model, remote=settings.trust_remote_code)
    kind, path = _data(name, config, run)
    data = DataSpec(
        kind=kind,
        path=path,
        context=context,
        max_group_tokens=config.training.max_group_tokens,
        layout=attention_of(model, support, config.training.max_group_tokens).layout.rules,
        over_long=config.training.over_long or ("fail" if is_calibration else "truncate"),
        end_ids=tuple(sorted(renderer.end_ids)) if kind == "lists" else (),
        forms=teacher_forms(config, run, start) if kind == "teacher" else TeacherForms(),
    )
    heldout = replace(data, kind="pairs", path=run.heldout_pairs().path) if is_calibration else None
    manifest = data.dataset(run.storage).require("run")
    if heldout is not None and manifest.facts.get("tokenizer") not in (None, renderer.identity):
        raise UserError(
            f"{path}: the pairs hold the tokens of another student than {start}; delete {path} and {heldout.path} to "
            "rebuild them, or restore the student"
        )
    return _PhaseInputs(name, phase, start, settings, renderer.identity, support, data, heldout, manifest)


def _phase(name: str, config: Config) -> Phase:
    phase = phases_of(config).get(name)
    if phase is None:
        raise UserError(f"training.{name}: the config has no such section, so there is no phase {name} to train")
    return phase


def _first_model(role: str, settings: Model, config: Config, run: RunDir) -> str:
    """Return the configured model of a role, and write it if it is one that the run creates."""
    start = run.start_of(role, settings)
    source = settings.pretrained()
    if source is not None and source.layers is not None:
        make_cut_model(source, run.model(f"{role}-init"))
    if settings.scratch is not None:
        prompts = train_prompts(run.storage)
        input_fingerprint = str(prompts.require("prepare").facts["content"])
        make_model(settings.scratch, prompts, input_fingerprint, config.run.seed, run.model(f"{role}-init"))
    return start


def _data(name: str, config: Config, run: RunDir) -> tuple[GroupKind, str]:
    """Return the kind of the groups of a phase and the path of their dataset."""
    if round_of(name) is not None:
        return ("lists" if config.training.round.loss.name == "listwise" else "pairs"), run.pairs().path
    if name == SEQKD:
        return "chosen", run.pairs().path
    if name == WARMUP and config.training.warmup is not None and config.training.warmup.data == "teacher":
        return "teacher", run.samples("teacher").path
    return "references", ""


def phase_inputs(name: str, config: Config, run: RunDir) -> str | None:
    """Return the fingerprint of what decides a phase's model, apart from the bytes of its data.

    It loads no model and no tokenizer, so that a finished run is skipped quickly, and it stays the
    same if the data is repaired.

    Returns:
        None if the data or the starting model is missing.
    """
    run = run.at_round(round_of(name) or 0)
    phase, training = _phase(name, config), config.training
    is_calibration = round_of(name) is not None or name == SEQKD
    role = "teacher" if name == TEACHER else "student"
    settings = config.trained(role)
    start = run.student(config) if is_calibration else run.start_of(role, settings)
    data = DataSpec(*_data(name, config, run), context=0, max_group_tokens=0).dataset(run.storage).manifest()
    if data is None or (start.startswith("/") and not Path(start).is_dir()):
        return None
    return fingerprint(
        "inputs of a phase",
        settings=_deciding_keys(phase),
        data=data.fingerprint,
        start=model_identity(start, settings),
        rendering=settings.rendering(),
        seed=config.run.seed,
        dtype=training.dtype,
        **_keys_of_all_phases(training),
        longest=training.max_group_tokens,
        over_long=training.over_long,
    )


# -- steps, identity, job


def _deciding_keys(phase: Phase) -> dict[str, Any]:
    return {key: value for key, value in phase.model_dump(mode="json").items() if key not in _OPERATIONAL}


def _keys_of_all_phases(training: Training) -> dict[str, Any]:
    """Return the keys outside the phases that decide a model, by the names that fingerprints use.

    A later key that has no effect is left out, so that it changes no fingerprint.
    """
    keys: dict[str, Any] = {"lora": training.lora.model_dump(mode="json") if training.lora else None}
    if training.lora and not training.lora.target_parameters:
        del keys["lora"]["target_parameters"]
    return keys | ({"router_aux_loss": training.router_aux_loss} if training.router_aux_loss else {})


def _steps(phase: Phase, groups: int) -> int:
    if not groups:
        raise RunFailed(
            "the phase has no groups to train on: no references, no finished teacher responses, or no pairs "
            "(see `plad pair`)"
        )
    steps = max(1, round(phase.epochs * steps_per_epoch(groups, phase.batch_groups)))
    return min(steps, phase.max_steps or steps)


def _equal_compute_steps(config: Config, inputs: _PhaseInputs) -> int:
    """Return the number of steps in which seqkd computes as many tokens as the round.

    The round computes both responses of the pairs, seqkd only the chosen ones. A prompt is computed
    once for a group if its responses share it, otherwise once for each response. Without an
    encoder, the last token of a response is predicted but not computed. All groups of the manifest
    count, because few of them exceed training.max_group_tokens.
    """
    count, layout = inputs.manifest.count, inputs.data.layout
    last = int(layout.decoder_start is None)
    chosen, rejected = (count(f"tokens:{side}") - last * count(f"responses:{side}") for side in ("chosen", "rejected"))
    if layout.shares_prompts:
        round_tokens, seqkd_tokens = count("tokens:prompt") + chosen + rejected, count("tokens:prompt") + chosen
    else:
        seqkd_tokens = count("tokens:prompts_of_chosen") + chosen
        round_tokens = seqkd_tokens + count("tokens:prompts_of_rejected") + rejected
    round_, seqkd = config.training.round, config.training.seqkd
    assert seqkd is not None
    budget = _steps(round_, count("groups")) * round_.batch_groups * round_tokens
    return max(1, round(budget / (seqkd_tokens * seqkd.batch_groups)))


def _identity(inputs: _PhaseInputs, config: Config, steps: int) -> str:
    """Return the fingerprint of all that decides the trained model."""
    training, data, facts = config.training, inputs.data, inputs.manifest.facts
    further: dict[str, Any] = {}
    if inputs.phase.optimizer.name == "muon" and unnamed_embeddings(_model_without_weights(inputs)):
        further["muon"] = "hidden matrices"  # checkpoints from when Muon took these embeddings do not fit
    if training.lora is not None and is_mixture(_model_without_weights(inputs)):
        further["adapted"] = "named layers"  # checkpoints from when peft changed the targets do not fit
    return fingerprint(
        "phase",
        settings=_deciding_keys(inputs.phase),
        steps=steps,
        data={"kind": data.kind, "contents": inputs.manifest.contents, "content": facts.get("content")},
        start=model_identity(inputs.start, inputs.settings),
        rendering=inputs.settings.rendering(),
        tokenizer=inputs.tokenizer,
        context=data.context,
        longest=data.limit_identity,
        over_long=data.over_long,
        end_ids=data.end_ids,
        teachers=data.forms.to_json(),
        seed=config.run.seed,
        dtype=training.dtype,
        **_keys_of_all_phases(training),
        **further,
    )


def _model_without_weights(inputs: _PhaseInputs) -> Any:
    config, remote = load_model_config(inputs.start, inputs.settings), inputs.settings.trust_remote_code
    return build_without_weights(config, remote=remote)


def _job(inputs: _PhaseInputs, config: Config, run: RunDir, steps: int, identity: str) -> PhaseJob:
    training = config.training
    return PhaseJob(
        name=inputs.name,
        start=inputs.start,
        settings=inputs.settings,
        phase=inputs.phase,
        data=inputs.data,
        heldout=inputs.heldout,
        heldout_limit=training.heldout_pairs,
        seed=config.run.seed,
        steps=steps,
        deepspeed=load_deepspeed(training.deepspeed),
        dtype=training.dtype,
        micro_batch_tokens=training.micro_batch_tokens,
        max_group_tokens=training.max_group_tokens,
        row_support=inputs.row_support,
        attention=training.attention,
        lora=training.lora,
        router_aux_loss=training.router_aux_loss,
        gradient_checkpointing=training.gradient_checkpointing,
        divergence_factor=training.divergence_factor,
        trackers=tuple(training.trackers),
        storage=run.storage,
        checkpoints=run.checkpoints(config),
        staging=training.staging_dir,
        watch=training.watch,
        fingerprint=identity,
        inputs=phase_inputs(inputs.name, config, run),
    )


# -- stored data and checkpoints


def _check_data(job: PhaseJob, groups: int) -> None:
    """Raise :class:`UserError` if pairs or texts of the phase cannot be trained on."""
    if job.heldout is not None:
        for spec in (job.data, job.heldout):
            check_pairs(spec, job.storage, job.start, job.settings, job.phase.loss, job.micro_batch_tokens)
    elif job.steps >= steps_per_epoch(groups, job.phase.batch_groups):
        # A shorter phase reads too few of its texts to justify the check.
        check_texts(job.data, job.storage, job.start, job.settings, job.micro_batch_tokens)


def _check_checkpoints(store: CheckpointStore, run: RunDir) -> None:
    """Raise :class:`UserError` if the stored checkpoints belong to another phase or run."""
    store.newest()
    if store.storage.url == run.storage.url:
        return
    key, own = f"{store.folder}/{OWNER}", run.storage.url.encode()
    if not store.storage.create(key, own) and store.storage.read(key) != own:
        owner = (store.storage.read(key) or b"").decode(errors="replace")
        raise UserError(
            f"training.checkpoint_url: {store.storage.url}: has the checkpoints of another run, {owner}; give each "
            f"run a URL of its own, or delete {key} there if this run was moved"
        )
