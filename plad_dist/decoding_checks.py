"""Checks of lengths and sampling parameters against the models that they are for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plad_dist.config import Config, Decoding, Endpoint, Model, RoleSampling
from plad_dist.data.models import (
    check_max_length,
    context_length,
    generation_defaults,
    load_model_config,
    resolve_model,
    vocabulary_size,
)
from plad_dist.errors import UserError

_DISABLED = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # of keys that may be unset


@dataclass(frozen=True)
class SampledModel:
    """A pretrained model that an engine samples.

    Attributes:
        key: config key of the model.
        path: its folder or hub name.
        section: config key of its sampling.
    """

    key: str
    path: str
    settings: Model
    section: str
    sampling: RoleSampling


def sampled_models(config: Config) -> list[SampledModel]:
    """Return the teachers, the student and the judges that an engine samples and that have a
    pretrained tokenizer."""
    return [
        SampledModel(key, resolve_model(source.settings), source.settings, section, sampling)
        for key, model, section, sampling in config.responders()
        if (source := model.pretrained()) is not None
    ]


def check_decoding(model: SampledModel) -> None:
    """Raise :class:`UserError` if the engine would refuse the lengths or tokens of a config."""
    try:
        config = load_model_config(model.path, model.settings)
    except UserError:  # another check reports it
        return
    size, tokens = vocabulary_size(config), model.sampling.stop_token_ids
    if unknown := [token for token in tokens if token >= size]:
        raise UserError(
            f"{model.section}.stop_token_ids: {', '.join(map(str, unknown))}: {model.path} has tokens 0 to {size - 1}"
        )
    engine = model.sampling.engine
    if "hf_overrides" in engine:  # which may extend the context
        return
    check_max_length(model.path, model.settings, model.key)
    length = engine.get("max_model_len")
    if isinstance(length, int):
        settings = model.settings.model_copy(update={"max_length": length})
        try:
            check_max_length(model.path, settings, model.key)
        except UserError as error:
            reason = str(error).removeprefix(f"{model.key}.max_length: ")
            raise UserError(f"{model.section}.engine.max_model_len: {reason}") from None


def check_pair_length(config: Config) -> None:
    """Raise :class:`UserError` if `pairing.max_tokens` exceeds the context of the student.

    A student from scratch is not checked.
    """
    source = config.student.pretrained()
    if source is None:
        return
    try:
        limit = context_length(source.path, source.settings)
    except UserError:  # another check reports it
        return
    if config.pairing.max_tokens is not None and config.pairing.max_tokens > limit:
        raise UserError(
            f"pairing.max_tokens: {config.pairing.max_tokens}: the context of the student is {limit} tokens; set at "
            "most that, or leave it unset"
        )


def check_rejected_length(config: Config) -> None:
    """Raise :class:`UserError` if the context of another writer of rejected responses cannot hold
    `max_tokens` and a prompt.

    Prompts are chosen without regard to this context, so no other check refuses it.
    """
    other = config.rejected_writer()
    if other is None or (source := other.model.pretrained()) is None or "hf_overrides" in other.sampling.engine:
        return
    try:
        limit = context_length(resolve_model(source.settings), source.settings)
    except UserError:  # another check reports it
        return
    if limit <= other.sampling.max_tokens:
        raise UserError(
            f"{other.section}.max_tokens: {other.sampling.max_tokens}: the context of {other.key} is {limit} tokens, "
            "which leaves no room for a prompt; set fewer, or give it a longer context"
        )


def decoding_notes(config: Config) -> Iterator[str]:
    """Yield a line for every setting of the decoding without the effect that a user may expect.

    These are the sampling parameters of a model's own generation config, `max_tokens` over the
    context of a model, candidates of a student that is sampled greedily, and rejected responses of
    a model that does not fit.
    """
    if config.sampling.student.greedy_by and "candidates" in config.evaluation.model_fields_set:
        yield "evaluation.candidates: none are sampled, because all responses of a greedy student are the same"
    yield from _endpoint_notes(config)
    yield from _rejected_notes(config)
    for model in sampled_models(config):
        sampling = model.sampling
        used = {name: getattr(sampling, name) for name in Decoding.model_fields}
        used = {name: _DISABLED.get(name) if value is None else value for name, value in used.items()}
        set_aside = {
            name: value
            for name, value in generation_defaults(model.path, model.settings).items()
            if name not in sampling.model_fields_set and value != used[name]
        }
        if set_aside:
            theirs = ", ".join(f"{name} {value:g}" for name, value in set_aside.items())
            ours = ", ".join(f"{name} {used[name]:g}" for name in set_aside)
            yield (
                f"{model.key}: generation_config.json of {model.path} sets {theirs}, which are not used; "
                f"{model.section} samples with {ours}"
            )
        yield from _length_notes(model, config.prompts.max_tokens)


def _rejected_notes(config: Config) -> Iterator[str]:
    rejected, student = config.sampling.rejected, config.student
    if rejected is not None and rejected.phase is not None and student.is_created:
        origin = "random weights" if student.scratch else "layers of another model"
        yield (
            f"sampling.rejected.phase: {rejected.phase}: before its training, a student of {origin} writes no "
            "sensible text to reject"
        )
    other, source = config.rejected_writer(), student.pretrained()
    if other is None or source is None or (writer := other.model.pretrained()) is None:
        return
    limit, needed = (context_length(resolve_model(item.settings), item.settings) for item in (writer, source))
    if limit < min(needed, config.prompts.max_tokens or needed):
        yield (
            f"{other.key}: its context of {limit} tokens is shorter than that of the student; longer prompts become "
            "error rows, because prompts.over_long goes by the teachers and the student (set prompts.max_tokens)"
        )


def _endpoint_notes(config: Config) -> Iterator[str]:
    responders = list(config.responders())
    with_engine = {section for _, model, section, _ in responders if model.endpoint is None}
    for key, model, section, sampling in responders:
        if model.endpoint is None:
            continue
        if sampling.engine and section not in with_engine:
            yield f"{section}.engine: has no effect, because {key} is behind a server"
        if model.endpoint.mode == "batch":
            for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
                if getattr(model.endpoint, name) != Endpoint.model_fields[name].default:
                    yield f"{key}.endpoint.{name}: has no effect with `mode: batch`"


def _length_notes(model: SampledModel, most_prompt_tokens: int | None) -> Iterator[str]:
    sampling, limit = model.sampling, context_length(model.path, model.settings)
    engine = sampling.engine.get("max_model_len")
    if isinstance(engine, int) and 0 < engine < limit:
        if most_prompt_tokens is None or most_prompt_tokens >= engine:
            yield (
                f"{model.section}.engine.max_model_len: {engine}: shortens the context of {model.key} from {limit} "
                "tokens; longer prompts become error rows, because prompts.over_long goes by the context (set "
                f"{model.key}.max_length instead)"
            )
        limit = engine
    if "max_tokens" in sampling.model_fields_set and sampling.max_tokens >= limit:
        yield (
            f"{model.section}.max_tokens: {sampling.max_tokens}: responses of {model.key} end earlier, at its context "
            f"of {limit} tokens"
        )
