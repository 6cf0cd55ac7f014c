"""Stage `sample`: the teacher's and the student's answers to the prompts.

While a model is loaded it also answers the held-out prompts, so that a large teacher is loaded once: the same way as for
pairs, for the held-out pairs, and in every decoding that the evaluation shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from plad_dist.config import Config, Decoding, Model, RoleSampling, fingerprint
from plad_dist.data.models import model_identity
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.store import Dataset
from plad_dist.errors import UserError
from plad_dist.progress import Progress
from plad_dist.rundir import ROUND, RunDir, require_model
from plad_dist.sampling.job import Fleet, SamplingJob
from plad_dist.sampling.run import run_fleets

HELDOUT_ROUND = -1  # keeps the seeds of held-out samples apart from those of training samples


def sample(config: Config, run: RunDir, progress: Progress, roles: tuple[str, ...] = ("teacher", "student")) -> None:
    """Sample what the roles have not sampled yet. Raises :class:`UserError` and :class:`RunFailed` as `run_fleets`."""
    run_fleets(config, run.storage, [_role_fleet(config, run, role) for role in roles], progress)


def is_sampled(config: Config, run: RunDir, roles: tuple[str, ...] = ("teacher", "student")) -> bool:
    """Whether everything that the roles sample is committed."""
    jobs = [job for role in roles for job in _role_fleet(config, run, role).jobs]
    return all(job.dataset(run.storage).manifest() is not None for job in jobs)


def sample_systems(config: Config, run: RunDir, systems: dict[str, str], progress: Progress) -> None:
    """Sample the held-out prompts from trained students, by name; they share engines, which change weights."""
    jobs = [job for name, path in systems.items() for job in system_jobs(config, run, name, path, config.student)]
    first = next(iter(systems.values()))
    run_fleets(config, run.storage, [_fleet(config, "student", first, jobs)], progress)


def _role_fleet(config: Config, run: RunDir, role: str) -> Fleet:
    settings, wanted = _role(config, role)
    path = run.teacher(config) if role == "teacher" else run.student(config)
    require_model(path, f"train --phase {'teacher' if role == 'teacher' else 'warmup'}")
    maker = _JobMaker(config, run, role, path, settings)
    decoding = Decoding(**{name: getattr(wanted, name) for name in Decoding.model_fields})
    jobs = [
        maker.job(train_prompts(run.storage), run.samples(role), decoding, wanted.n, ROUND, config.sampling.limit),
        maker.job(heldout_prompts(run.storage), run.heldout_samples(role), decoding, 1, HELDOUT_ROUND,
                  config.evaluation.limit),
        *system_jobs(config, run, "teacher" if role == "teacher" else "warmup", path, settings),
    ]  # fmt: skip
    return _fleet(config, role, path, jobs)


def system_jobs(config: Config, run: RunDir, system: str, path: str, settings: Model) -> list[SamplingJob]:
    """What the evaluation samples from one system: every decoding, and for the warm-up student lower temperatures too."""
    maker = _JobMaker(config, run, "teacher" if system == "teacher" else "student", path, settings)
    return [
        maker.job(heldout_prompts(run.storage), run.system_samples(system, name), decoding, 1, HELDOUT_ROUND - 1,
                  config.evaluation.limit)
        for name, decoding in system_decodings(config, system).items()
    ]  # fmt: skip


def system_decodings(config: Config, system: str) -> dict[str, Decoding]:
    """The decodings of a system, by name."""
    decodings = config.decodings()
    if system == "warmup":
        base = Decoding(**{name: getattr(config.sampling.student, name) for name in Decoding.model_fields})
        for temperature in config.evaluation.warmup_temperatures:
            decodings[f"t{temperature:g}"] = base.model_copy(update={"temperature": temperature})
    return decodings


def _role(config: Config, role: str) -> tuple[Model, RoleSampling]:
    return (
        (config.trained("teacher"), config.sampling.teacher)
        if role == "teacher"
        else (config.student, config.sampling.student)
    )


def _fleet(config: Config, role: str, path: str, jobs: list[SamplingJob]) -> Fleet:
    settings, wanted = _role(config, role)
    return Fleet(
        role,
        settings,
        path,
        tuple(jobs),
        dict(wanted.engine),
        1 if wanted.replicas == "auto" else wanted.replicas,
        wanted.cpus,
    )


@dataclass(frozen=True)
class _JobMaker:
    """Jobs of one model."""

    config: Config
    run: RunDir
    role: str
    path: str
    settings: Model

    def job(
        self, prompts: Dataset, output: Dataset, decoding: Decoding, n: int, round_: int, limit: int | None
    ) -> SamplingJob:
        manifest = prompts.manifest()
        if manifest is None:
            raise UserError(f"{prompts.storage.url}/{prompts.path}: not complete yet; run `plad prepare` first")
        rows = min(manifest.rows, limit or manifest.rows)
        seed = self.config.run.seed
        decides = [
            manifest.fingerprint, rows, model_identity(self.path, self.settings), self.settings.template,
            self.settings.max_length, _role(self.config, self.role)[1].deciding_engine(), decoding.model_dump(mode="json"), n, seed, round_, self.role,
        ]  # fmt: skip
        return SamplingJob(
            prompts=prompts.path,
            output=output.path,
            role=self.role,
            model=self.path,
            weights=self.path,
            decoding=decoding,
            n=n,
            seed=seed,
            round=max(round_, ROUND),
            seed_round=round_,
            limit=rows,
            block_size=self.config.prompts.block_size,
            fingerprint=fingerprint(decides),
        )
