"""Checks of a run's inputs, before anything is written or started."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from plad_dist.compat.vllm import reasoning_parser_names
from plad_dist.config import Config, LlmJudge, Lora, Model, Pretrained, RewardJudge, ScratchModel, Student, TeacherJudge
from plad_dist.data.chat_templates import check_template
from plad_dist.data.model_checks import check_vocabulary, template_warnings
from plad_dist.data.models import (
    check_local_model,
    check_weights,
    context_length,
    load_model_config,
    positions,
    vocabulary_size,
)
from plad_dist.data.prompts import check_prompts, train_prompts
from plad_dist.data.templates import Renderer
from plad_dist.decoding_checks import (
    check_decoding,
    check_pair_length,
    check_rejected_length,
    decoding_notes,
    sampled_models,
)
from plad_dist.errors import UserError
from plad_dist.reuse import reused_run
from plad_dist.rundir import RunDir, check_same_run
from plad_dist.sampling.engine_arguments import check_cpu_heads, check_engine_args, generates_by_transformers
from plad_dist.sampling.engine_choice import check_chosen_engine, chosen_engine, missing_architecture
from plad_dist.sampling.engine_placement import engines_use_gpus
from plad_dist.training.cut.config import check_cut, config_of
from plad_dist.training.model.meta import build_without_weights

logger = logging.getLogger("plad")

# A check raises UserError. The prefix, a config key or empty, precedes the error's message.
Check = tuple[str, Callable[[], object]]


def check_inputs(config: Config, run: RunDir, *, all_rows: bool = False, command: str | None = None) -> None:
    """Raise :class:`UserError` with all problems of a run's inputs in one message. Writes nothing.

    Args:
        all_rows: read every prompt. Otherwise only the first prompt of each source is read, since
            `prepare` reads all.
        command: the command that is about to run, None for all. Commands that create no model work
            on an object store too; the others need a file system.
    """
    if command not in ("prepare", "sample", "pair"):
        _ = run.root
    check_same_run(config, run)
    problems: dict[str, None] = {}  # an ordered set
    for prefix, check in _checks(config, run):
        try:
            check()
        except UserError as error:
            problems[f"{prefix}{error}"] = None
    if len(problems) > 1:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(problems))
    if problems:
        raise UserError(*problems)
    for key, model, *_ in config.responders():
        if model.endpoint is not None and model.endpoint.exposes_key:
            logger.warning("%s.endpoint: %s gets its key unencrypted; use https", key, model.endpoint.url)
    if command in (None, "sample"):
        for note in (*_engine_notes(config), *decoding_notes(config)):
            logger.info("%s", note)
    if all_rows and train_prompts(run.storage).manifest() is None:
        for line in check_prompts(config, all_rows=True):  # last, because it needs the tokenizers of sound models
            logger.info("prompts: %s", line)


def check_engines(config: Config) -> None:
    """Raise :class:`UserError` for engine arguments that the engine does not accept, or that
    contain a secret."""
    for key, arguments in _engine_arguments(config):
        check_engine_args(arguments, key)


def _engine_arguments(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the engine arguments of a config with their keys."""
    yield "sampling.teacher.engine", config.sampling.teacher.engine
    yield "sampling.student.engine", config.sampling.student.engine
    for name, teacher in config.teachers.items():
        if teacher.sampling:
            yield f"teachers.{name}.sampling.engine", teacher.sampling.engine
    for name, judge in config.evaluation.judges.items():
        if isinstance(judge, LlmJudge):
            yield f"evaluation.judges.{name}.sampling.engine", judge.sampling.engine


def _engine_notes(config: Config) -> Iterator[str]:
    """Yield a line for every model that transformers generates because vLLM lacks it."""
    for _, model, section, sampling in config.responders():
        if chosen_engine(model, sampling.engine) != sampling.engine:
            yield f"{section}: vLLM has no {missing_architecture(model)}; transformers generates, which is slower"


def _checks(config: Config, run: RunDir) -> Iterator[Check]:
    """Yield the checks of everything that a config names, cheap ones first."""
    from plad_dist.pairing.scores import check_scorer
    from plad_dist.training.model.deepspeed_config import check_deepspeed, check_optimizers, check_workers
    from plad_dist.training.worker.trackers import check_trackers

    yield "", partial(_check_run_dir, run)
    yield "", partial(reused_run, config)
    yield "", partial(check_optimizers, config.training.deepspeed, config.training)
    yield "", partial(check_workers, config.training)
    yield "", partial(check_trackers, config.training.trackers)
    for key, arguments in _engine_arguments(config):
        yield "", partial(check_engine_args, arguments, key)
    yield "", partial(check_scorer, config.pairing)
    for name, judge in config.evaluation.judges.items():
        yield from _judge_checks(f"evaluation.judges.{name}", judge)
    models = config.named_models()
    if train_prompts(run.storage).manifest() is not None:  # the run has started, and checked the rest then
        for key, model in models.items():
            if (source := model.pretrained()) is not None:
                yield f"{key}.{source.key}: ", partial(check_local_model, source.path)
                yield f"{key}.{source.key}: ", partial(check_weights, source.path)
        return
    yield "", partial(check_deepspeed, config.training.deepspeed)
    yield "", partial(check_prompts, config, all_rows=False)
    for key, model in models.items():
        yield from _model_checks(key, model)
    for key, model, section, sampling in config.responders():
        yield "", partial(check_chosen_engine, model, sampling.engine, f"{section}.engine", key)
        yield "", partial(_check_context, model, key)
        engine = chosen_engine(model, sampling.engine)
        if model.scratch is not None:
            yield f"{key}.", partial(_check_scratch, model.scratch, engine)
        if (source := model.pretrained()) is not None and key != "student" and generates_by_transformers(engine):
            yield "", partial(_check_rope, source, key)
    for sampled in sampled_models(config):
        yield "", partial(check_decoding, sampled)
    yield "", partial(check_pair_length, config)
    yield "", partial(check_rejected_length, config)
    if (source := config.student.pretrained()) is not None:
        yield "", partial(_check_rope, source, "student")
        if config.training.lora is not None:
            yield "", partial(check_adapters, source, config.training.lora)
    if config.training.router_aux_loss:
        yield "", partial(check_student_balance, config.student)


def _check_scratch(scratch: ScratchModel, engine: Mapping[str, Any]) -> None:
    from plad_dist.training.model.scratch import check_architecture

    config = check_architecture(scratch)
    if not engines_use_gpus() and not generates_by_transformers(engine):
        try:
            check_cpu_heads(config)
        except UserError as error:
            raise UserError(f"scratch.architecture: {error}") from None


def _check_context(model: Model, key: str) -> None:
    """Raise :class:`UserError` if nothing bounds the sequences of an encoder-decoder."""
    config = _readable_config(model)
    if config is not None and config.is_encoder_decoder and model.max_length is None and positions(config) is None:
        raise UserError(
            f"{key}.max_length: is required, because the config of the model names no context length; set the most "
            "tokens of a prompt with its response, such as 512"
        )


def _check_rope(source: Pretrained, key: str) -> None:
    """Check that no other sequence of a batch changes a sequence's rotary embeddings.

    Training would refuse such a student only after sampling, and the engine of transformers would
    draw responses that depend on one another.
    """
    from plad_dist.training.model.attention import check_rope

    try:
        config = load_model_config(source.path, source.settings)
    except UserError:  # the checks of the model report it
        return
    check_rope(config, context_length(source.path, source.settings), key)


def check_adapters(student: Pretrained, lora: Lora) -> None:
    """Raise :class:`UserError` if the targets that `training.lora` names are not the student's.

    Models that cannot be built without their weights are not checked here.
    """
    from plad_dist.training.model.adapters import adapter_targets

    try:
        model = build_without_weights(config_of(student), remote=student.settings.trust_remote_code)
    except Exception:  # noqa: BLE001 - model families raise all kinds of errors, which other checks report
        return
    adapter_targets(model, lora)


def check_student_balance(student: Student) -> None:
    """Raise :class:`UserError` if no auxiliary loss can balance the experts of the student."""
    from plad_dist.training.model.probe import check_balance

    config, source = _readable_config(student), student.pretrained()
    if config is not None:
        check_balance(config, remote=bool(source and source.settings.trust_remote_code))


def _readable_config(model: Model) -> Any:
    """Return the transformers config of a model, or None if it has none or it cannot be read.

    The checks of the model report a config that cannot be read.
    """
    from plad_dist.training.model.scratch import check_architecture

    source = model.pretrained()
    try:
        return check_architecture(model.scratch) if model.scratch else source and config_of(source)
    except UserError:
        return None


def _judge_checks(key: str, judge: RewardJudge | TeacherJudge | LlmJudge) -> Iterator[Check]:
    from plad_dist.evaluation.judges import load_template
    from plad_dist.pairing.reward import open_reward_model

    if isinstance(judge, RewardJudge):
        yield "", partial(open_reward_model, judge, key)
    if isinstance(judge, LlmJudge):
        yield "", partial(load_template, judge, key)
        yield from _model_checks(f"{key}.model", judge.model)


def _check_run_dir(run: RunDir) -> None:
    """Raise :class:`UserError` for a folder that cannot be written, without writing.

    Object stores are not checked.
    """
    root = run.storage.local_root
    if root is None:
        return
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {root}: cannot be written; use another folder, or give this user write access")


def _model_checks(key: str, model: Model) -> Iterator[Check]:
    if model.template is not None:
        yield "", partial(check_template, model.template, key, tuple(model.template_kwargs))
    if model.reasoning_parser is not None:
        yield f"{key}.reasoning_parser: ", partial(_check_reasoning_parser, model.reasoning_parser)
    if (source := model.pretrained()) is not None:
        prefix = f"{key}.{source.key}: "
        yield prefix, partial(load_model_config, source.path, source.settings)
        yield prefix, partial(_check_tokens, key, source.path, source.settings)
        yield prefix, partial(check_weights, source.path)
        if source.layers is not None:
            yield "", partial(_check_layers, source)


def _check_tokens(key: str, path: str, model: Model) -> None:
    """Check tokenizer and template of a model, and log what is strange about the template."""
    renderer = Renderer(path, model)
    for warning in template_warnings(renderer, model):
        logger.warning("%s: %s", key, warning)
    try:
        rows = vocabulary_size(load_model_config(path, model))
    except UserError:  # another check reports it
        return
    check_vocabulary(path, renderer, rows)


def _check_layers(source: Pretrained) -> None:
    """Check that the layers of a student can be cut out of its model."""
    try:
        load_model_config(source.path, source.settings)
    except UserError:  # another check reports it
        return
    check_cut(source)


def _check_reasoning_parser(name: str) -> None:
    if name not in (known := reasoning_parser_names()):
        raise UserError(f"{name!r}: vLLM has no such parser; it has {', '.join(sorted(known))}")
