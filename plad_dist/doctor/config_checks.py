"""Checks of what a config needs: memory and disk, its inputs, and models whose parts agree."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

from plad_dist.config import Config, Model
from plad_dist.data.conversation import Conversation
from plad_dist.doctor.findings import Finding, fail, format_size, ok, run_check, warn
from plad_dist.doctor.machine_checks import existing_ancestor
from plad_dist.doctor.node import HERE, models_of
from plad_dist.errors import RunFailed, UserError
from plad_dist.evaluation.formatting import layers_phrase
from plad_dist.planning.disk import disk_bytes
from plad_dist.planning.fit import check_fits, shortest_context, sizes_of
from plad_dist.planning.hardware import Hardware, local_hardware
from plad_dist.planning.workload import workload_of
from plad_dist.rundir import RUN_FILE, RunDir

if TYPE_CHECKING:
    from plad_dist.data.templates import Renderer

_CONFIG_REMEDY = "correct the config, or provide what it names; `plad validate` checks it again"


def check_fit(config: Config, cluster: Hardware | None = None) -> Iterator[Finding]:
    """Check that memory and disk suffice for a config.

    Args:
        cluster: None to check this machine, from which the run may only be submitted.
    """
    try:
        hardware = cluster or local_hardware()
        problems = check_fits(config, hardware)
    except UserError as error:  # does not stop a run either
        yield warn(f"memory cannot be planned: {error}", "see `plad plan`, or measure")
        return
    if problems and cluster is None:
        yield warn(
            f"this machine cannot run it: {problems[0].description}", "name a cluster by --address, or see `plad plan`"
        )
    else:
        for problem in problems:
            yield (fail if problem.always else warn)(problem.description, "; or ".join(problem.remedies))
    if not problems:
        yield ok(f"memory for every stage, on {hardware.name}")
    yield from _check_disk_of_run(config, hardware)


def _check_disk_of_run(config: Config, hardware: Hardware) -> Iterator[Finding]:
    """Compare the free space at run.dir with what the whole run will take.

    Skips runs that have started.
    """
    root, sizes = RunDir.of(config).storage.local_root, sizes_of(config, hardware.device)
    if root is None or (root / RUN_FILE).exists():
        return
    work = workload_of(config, context=shortest_context(sizes))
    bytes_by_kind = disk_bytes(config, work, sizes, hardware.device)
    if config.training.checkpoint_url is not None:
        del bytes_by_kind["checkpoints"]
    needed = sum(bytes_by_kind.values())
    folder = existing_ancestor(root)
    free = shutil.disk_usage(folder).free
    uncounted = "" if work.prompts is not None else ", prompts and samples not counted"
    if needed > free:
        yield warn(
            f"run.dir: the whole run takes {format_size(needed)} of disk{uncounted}, {format_size(free)} are free at "
            f"{folder}",
            "free some space, use another location, or lower keep_checkpoints of the phases, whose checkpoints take "
            "most",
        )
    else:
        yield ok(f"run.dir: {format_size(needed)} of disk for the whole run{uncounted}, {format_size(free)} are free")


def check_config(config: Config) -> list[Finding]:
    """Check the inputs that a config names, and that tokenizers, templates and embeddings of its
    models agree."""
    inputs = list(run_check("inputs", HERE, partial(_check_inputs, config)))
    unreadable = [
        key
        for key, _ in models_of(config)
        if any(finding.text.startswith((f"{key}.path: ", f"{key}.from.path: ")) for finding in inputs)
    ]
    return [*inputs, *run_check("models", HERE, partial(check_models, config, unreadable))]


def _check_inputs(config: Config) -> Iterator[Finding]:
    from plad_dist.preflight import check_inputs

    try:
        check_inputs(config, RunDir.of(config))
    except (UserError, RunFailed) as error:
        for problem in split_problems(str(error)):
            yield fail(problem, _CONFIG_REMEDY)
    else:
        yield ok("prompts, models, arguments and run directory exist and fit together")


def split_problems(message: str) -> list[str]:
    """Return the problems in a message, each with its indented lines.

    A list has the heading `N problems:`, which is left out. Any other message is one problem.
    """
    heading, _, body = message.partition("\n")
    return re.split(r"\n(?!\s)", body) if re.fullmatch(r"\d+ problems:", heading) else [message]


def check_models(config: Config, unreadable: Collection[str]) -> Iterator[Finding]:
    """Check every model of a config, and compare the teachers' tokenizers with the student's.

    Args:
        unreadable: keys of models to skip, because the check of the inputs has reported them.
    """
    from plad_dist.data.templates import Renderer

    identities = {}
    for key, model in models_of(config):
        if model.scratch is not None:
            yield ok(f"{key}: created by the run, with a tokenizer of {model.scratch.vocab_size:,} tokens")
        elif (source := model.pretrained()) is not None and key not in unreadable:
            try:
                renderer = Renderer(source.path, source.settings)
                yield from _check_tokens(key, source.path, source.settings, renderer)
            except UserError as error:
                yield fail(f"{key}.{source.key}: {error}", _CONFIG_REMEDY)
            else:
                identities[key] = renderer.identity
                if source.layers is not None:
                    yield ok(f"{key}: created by the run from {layers_phrase(source.layers)} of {source.path}")
    student = identities.get("student")
    for key, identity in identities.items():
        if student is not None and identity != student and key.startswith(("teacher", "sampling.rejected")):
            yield ok(
                f"{key} has another tokenizer than the student: its responses are re-encoded with the student's "
                "tokenizer"
            )


def _check_tokens(key: str, path: str, model: Model, renderer: Renderer) -> Iterator[Finding]:
    """Check that a model has embeddings for all tokens of its tokenizer and its template."""
    from plad_dist.data.model_checks import check_vocabulary, template_warnings
    from plad_dist.data.models import load_model_config, vocabulary_size

    embeddings, tokenizer = vocabulary_size(load_model_config(path, model)), renderer.tokenizer
    check_vocabulary(path, renderer, embeddings)
    known_tokens = set(tokenizer.get_vocab().values())
    prompt = renderer.prompt_ids([Conversation([{"role": "user", "content": "Hello"}])])[0]
    bos = tokenizer.bos_token_id
    if bad_ends := sorted(token for token in renderer.end_ids if token not in known_tokens or token >= embeddings):
        yield fail(
            f"{key}: ends responses with the tokens {bad_ends}, which are not in its tokenizer or have no embeddings",
            "correct eos_token_id in its generation_config.json and tokenizer_config.json",
        )
    if missing := sorted({token for token in prompt if token >= embeddings}):
        yield fail(
            f"{key}: its template writes the tokens {missing}, but the model has {embeddings:,} embeddings",
            "use the template and the tokenizer that belong to the model",
        )
    if bos is not None and prompt[:2] == [bos, bos]:
        yield warn(
            f"{key}: its prompts begin with {tokenizer.bos_token} twice",
            f"remove it from the template: set {key}.template, or correct the tokenizer's chat template",
        )
    for warning in template_warnings(renderer, model):
        yield warn(f"{key}: {warning}", "see `plad validate`")
    if not bad_ends and not missing:
        padded = f", padded to {embeddings:,}" if embeddings > len(tokenizer) else ""
        template = "its own chat template" if model.template is None else "the config's template"
        yield ok(
            f"{key}: tokenizer of {len(tokenizer):,} tokens{padded}; {template}; ends with {sorted(renderer.end_ids)}"
        )
