"""The stage `pair`: a fleet of workers builds the pairs of all blocks from committed samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plad_dist.config import Config, Model, Pairing, flatten, is_operational
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import context_length, model_identity, resolve_model
from plad_dist.data.parts import Part
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.fingerprint import fingerprint
from plad_dist.pairing.facts import PairFacts
from plad_dist.pairing.forms import REJECTED, PairForms, pair_forms
from plad_dist.pairing.reward import as_model
from plad_dist.pairing.worker import PairJob, PairWorker
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir, require_model


def build_pairs(config: Config, run: RunDir, progress: Progress) -> PairFacts:
    """Build the pairs and the held-out pairs, and return the facts about the pairs.

    Raises:
        UserError: samples are missing, or the scorer cannot be used.
        RunFailed: a block failed, or no pair was left.
    """
    run_pair_jobs(pair_jobs(config, run), config, run, progress)
    return PairFacts.from_manifest(run.pairs().require("pair"))


def is_paired(config: Config, run: RunDir) -> bool:
    """Return True if the pairs and the held-out pairs are committed.

    Raises:
        UserError: complete pairs are those of another config, or of other samples.
    """
    outputs = [(dataset, dataset.manifest()) for dataset in (run.pairs(), run.heldout_pairs())]
    expected = _inputs(config, run)
    for dataset, manifest in outputs:
        made_from = manifest.facts.get("inputs") if manifest is not None else None
        if None not in (expected, made_from) and made_from != expected:
            raise UserError(
                f"{dataset.url}: complete, but made by another config or from other samples. Nothing was changed; "
                "restore them, or use another run.dir"
            )
    return all(manifest is not None for _, manifest in outputs)


def _inputs(config: Config, run: RunDir) -> str | None:
    """Return the fingerprint of what decides pairs, apart from tokenizers; None without samples.

    It needs no tokenizer, so that a finished run is skipped quickly.
    """
    sampled = run.of_samples(config)
    datasets = [
        samples(role) for samples in (sampled.samples, sampled.heldout_samples) for role in ("teacher", "student")
    ]
    samples = [dataset.manifest() for dataset in datasets]
    if None in samples:
        return None
    keys = flatten(config.pairing.model_dump(mode="json"), "pairing")
    writers: dict[str, Model] = {**config.all_teachers()}
    if (other := config.rejected_writer()) is not None:
        writers[REJECTED] = other.model
    return fingerprint(
        "inputs of pairs",
        keys={key: value for key, value in keys if not is_operational(key)},
        samples=[manifest.fingerprint for manifest in samples if manifest is not None],
        student=model_identity(run.student(config), config.student),
        rendering=config.student.rendering(),
        keep_thought=[name for name, writer in writers.items() if writer.reasoning == "keep"],
    )


def require_inputs(config: Config, run: RunDir) -> None:
    """Raise :class:`UserError` if samples of uncommitted pairs, or the student, are missing."""
    sampled = run.of_samples(config)
    outputs = ((sampled.samples, run.pairs()), (sampled.heldout_samples, run.heldout_pairs()))
    missing = [samples for samples, output in outputs if output.manifest() is None]
    for samples in missing:
        for role in ("teacher", "student"):
            samples(role).require("sample")
    if missing:
        require_model(run.student(config), run.student_made_by)


def pair_jobs(config: Config, run: RunDir) -> list[tuple[PairJob, list[int]]]:
    """Return the jobs of uncommitted datasets, each with the number of prompts in every block.

    Raises:
        UserError: samples or the student are missing.
    """
    sampled = run.of_samples(config)
    datasets = (
        (train_prompts(run.storage), sampled.samples, run.pairs(), config.sampling.student.n),
        (heldout_prompts(run.storage), sampled.heldout_samples, run.heldout_pairs(), 1),
    )
    missing = [dataset for dataset in datasets if dataset[2].manifest() is None]
    if not missing:
        return []
    require_inputs(config, run)
    forms = pair_forms(config, run)
    return [
        _job(config, run, prompts, samples("teacher"), samples("student"), output, forms, n)
        for prompts, samples, output, n in missing
    ]


def pair_worker_args(
    config: Config, run: RunDir, forms: PairForms | None = None
) -> tuple[Storage, str, Model, Pairing, PairForms, str]:
    """Return the arguments of :class:`PairWorker`.

    Paths are absolute, because workers have other working directories.

    Args:
        forms: forms of the jobs, which take the tokenizers of all models to compute; None to
            compute them.
    """
    pairing = config.pairing
    if pairing.reward_model is not None:
        path = resolve_model(as_model(pairing.reward_model))
        pairing = pairing.model_copy(update={"reward_model": pairing.reward_model.model_copy(update={"path": path})})
    forms = forms or pair_forms(config, run)
    return run.storage, run.student(config), config.student, pairing, forms, str(Path.cwd())


def run_pair_jobs(jobs: Sequence[tuple[PairJob, list[int]]], config: Config, run: RunDir, progress: Progress) -> None:
    """Build the missing blocks of the jobs, and write the manifests."""
    from plad_dist.fleet.driver import run_fleets
    from plad_dist.fleet.fleet import Assignment, Fleet
    from plad_dist.fleet.placement import Placement

    if not jobs:
        return
    pairing = config.pairing
    fleet = Fleet(
        name="pairs",
        assignments=tuple(Assignment(job, range(len(prompts)), prompts) for job, prompts in jobs),
        worker=PairWorker,
        arguments=pair_worker_args(config, run, jobs[0][0].forms),
        placement=Placement(pairing.cpus_per_worker, gpus=pairing.gpus_per_worker),
        replicas=pairing.workers,
        environment={"OMP_NUM_THREADS": str(max(1, int(pairing.cpus_per_worker)))},
    )

    def facts(parts: Sequence[Part]) -> dict[str, Any]:
        return PairFacts.from_parts(parts).as_dict() | {
            "tokenizer": Renderer(run.student(config), config.student).identity,
            "inputs": _inputs(config, run),
        }

    run_fleets(config, run.storage, [fleet], progress, stage="pair", unit="prompts", facts=facts)


def _job(
    config: Config,
    run: RunDir,
    prompts: Dataset,
    teacher: Dataset,
    student: Dataset,
    output: Dataset,
    forms: PairForms,
    n: int,
) -> tuple[PairJob, list[int]]:
    """Return the job of one dataset, and the number of prompts in each block.

    Args:
        n: rejected samples per prompt.
    """
    samples = [dataset.require("sample") for dataset in (teacher, student)]
    path = run.student(config)
    keys = flatten(config.pairing.model_dump(mode="json"), "pairing")
    reward = as_model(config.pairing.reward_model) if config.pairing.reward_model is not None else None
    rejected = {} if forms.rejected is None else {"rejected": forms.rejected.to_json()}
    input_fingerprint = fingerprint(
        "pairs",
        keys={key: value for key, value in keys if not is_operational(key)},
        teacher_samples=samples[0].fingerprint,
        student_samples=samples[1].fingerprint,
        student=model_identity(path, config.student),
        rendering=config.student.rendering(),
        teachers=forms.teachers.to_json(),
        context=context_length(path, config.student),
        reward_model=model_identity(resolve_model(reward), reward) if reward is not None else None,
        **rejected,
    )
    job = PairJob(prompts.path, teacher.path, student.path, output.path, input_fingerprint, run.round, forms)
    return job, [part.rows // n for part in samples[1].parts]
