"""Stage `sample`: the teacher's and the student's answers to the prompts.

While a model is loaded it also answers the held-out prompts, so that a large teacher is loaded once: the same way as for
pairs, for the held-out pairs, and in every decoding that the evaluation shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from plad_dist.config import Config, Decoding, LlmJudge, Model, RoleSampling, Teacher
from plad_dist.data.models import model_identity, resolve_model
from plad_dist.data.prompts import heldout_prompts, rows_by_block, teacher_blocks, train_prompts
from plad_dist.data.store import Dataset
from plad_dist.fingerprint import fingerprint
from plad_dist.fleet.driver import run_fleets
from plad_dist.fleet.fleet import Assignment, Fleet
from plad_dist.fleet.placement import Placement
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir, require_model
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.endpoint.backend import EndpointBackend
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.engine_placement import engine_environment, engines_use_gpus, place, window_for
from plad_dist.sampling.job import SamplingJob

_SEQUENCES = 256  # that vLLM answers at once where max_num_seqs is not given, or more on large GPUs
# Keep the seeds of held-out samples apart from those of training samples, which have the number of their round.
_PAIRS_SEED, _SYSTEM_SEED, _CANDIDATES_SEED = -1, -2, -3


def sample(config: Config, run: RunDir, progress: Progress, roles: tuple[str, ...] = ("teacher", "student")) -> None:
    """Sample what the roles have not sampled yet. Raises :class:`UserError` and :class:`RunFailed` as `run_fleets`."""
    fleets = [_fleet(config, run, responder, assignments) for responder, assignments in _role_work(config, run, roles)]
    run_fleets(config, run.storage, fleets, progress)


def score_by_teacher(
    config: Config, run: RunDir, judge: str, responses: dict[str, Dataset], progress: Progress
) -> None:
    """Ask the teacher how likely it finds responses to the held-out prompts, by system."""
    [teacher] = _responders(config, run, "teacher")
    assignments: list[Assignment] = []
    for system, answers in responses.items():
        wanted = DatasetRequest(
            heldout_prompts(run.storage), run.scored(judge, system), config.evaluation.limit, 1, _SYSTEM_SEED,
            responses=answers, own_tokens=False,
        )  # fmt: skip
        assignments += _assignments(config, run, [teacher], wanted)[teacher.name]
    run_fleets(config, run.storage, [_fleet(config, run, teacher, assignments)], progress, stage="evaluate")


def judge_identity(config: Config, name: str, judge: LlmJudge) -> dict[str, Any]:
    """Return the fields that decide a judge's answers, the questions aside."""
    responder = _judge(name, judge)
    return {
        "model": responder.identity,
        "decoding": responder.decoding().model_dump(mode="json"),
        "seed": config.run.seed,
    }


def ask(
    config: Config,
    run: RunDir,
    name: str,
    judge: LlmJudge,
    questions: list[tuple[Dataset, Dataset]],
    earlier: list[Dataset],
    progress: Progress,
) -> None:
    """Ask a judge every prompt of some datasets once.

    Args:
        questions: prompts, and where their answers go.
        earlier: answers of the same judge to other questions, whose cost counts towards its cap.
    """
    responder = _judge(name, judge)
    assignments = [
        assignment
        for prompts, output in questions
        for assignment in _assignments(
            config, run, [responder], DatasetRequest(prompts, output, None, 1, _SYSTEM_SEED)
        )[name]
    ]
    run_fleets(
        config,
        run.storage,
        [_fleet(config, run, responder, assignments, earlier)],
        progress,
        stage="evaluate",
        unit="answers",
    )


def _judge(name: str, judge: LlmJudge) -> Responder:
    model = judge.model
    path = model.endpoint.model if model.endpoint else resolve_model(model)
    return Responder(name, "judge", path, model, judge.sampling)


def is_sampled(config: Config, run: RunDir, roles: tuple[str, ...] = ("teacher", "student")) -> bool:
    """Whether everything that the roles sample is committed."""
    outputs = {
        assignment.job.output: assignment.job.dataset(run.storage)
        for _, assignments in _role_work(config, run, roles)
        for assignment in assignments
    }
    return all(dataset.manifest() is not None for dataset in outputs.values())


def sample_systems(config: Config, run: RunDir, systems: dict[str, str], progress: Progress) -> None:
    """Sample the held-out prompts from trained students, by name, and ask them how likely the candidates are.

    They share actors, one after the other.
    """
    assignments: list[Assignment] = []
    evaluation, heldout = config.evaluation, heldout_prompts(run.storage)
    for name, path in systems.items():
        student = _student(config, path)
        for output, decoding in _system_outputs(config, run, name):
            wanted = DatasetRequest(heldout, output, evaluation.limit, 1, _SYSTEM_SEED, decoding)
            assignments += _assignments(config, run, [student], wanted)[student.name]
        if config.candidates:
            scored = DatasetRequest(
                heldout, run.scored("candidates", name), evaluation.limit, config.candidates, _CANDIDATES_SEED,
                responses=run.candidates(),
            )  # fmt: skip
            assignments += _assignments(config, run, [student], scored)[student.name]
    first = _student(config, next(iter(systems.values())))
    run_fleets(config, run.storage, [_fleet(config, run, first, assignments)], progress)


# --------------------------------------------------------------------------------------------------- who samples what


@dataclass(frozen=True)
class Responder:
    """A model that answers prompts.

    Attributes:
        name: `student`, or the name of a teacher.
        path: folder or hub name of its weights, or its name at a server.
    """

    name: str
    role: str
    path: str
    settings: Model
    sampling: RoleSampling

    @property
    def identity(self) -> list[Any]:
        """What decides its answers, but for the decoding."""
        identity = [model_identity(self.path, self.settings), self.settings.template, self.settings.max_length,
                    self.sampling.deciding_engine()]  # fmt: skip
        return (
            [*identity, self.settings.share, self.settings.filter] if isinstance(self.settings, Teacher) else identity
        )

    def decoding(self) -> Decoding:
        return Decoding(**{name: getattr(self.sampling, name) for name in Decoding.model_fields})


def _student(config: Config, path: str) -> Responder:
    return Responder("student", "student", path, config.student, config.sampling.student)


def _responders(config: Config, run: RunDir, role: str) -> list[Responder]:
    if role == "student":
        path = run.student(config)
        require_model(path, run.student_made_by)
        return [_student(config, path)]
    responders = []
    for name, settings in config.all_teachers().items():
        path = settings.endpoint.model if settings.endpoint else run.teacher(config, name)
        if not settings.endpoint:
            require_model(path, "train --phase teacher")
        assert settings.sampling is not None
        responders.append(Responder(name, role, path, settings, settings.sampling))
    return responders


def _role_work(config: Config, run: RunDir, roles: tuple[str, ...]) -> list[tuple[Responder, list[Assignment]]]:
    """Every model of the roles with the blocks that it is to sample."""
    work: list[tuple[Responder, list[Assignment]]] = []
    for role in roles:
        responders = _responders(config, run, role)
        train, heldout, limit = train_prompts(run.storage), heldout_prompts(run.storage), config.evaluation.limit
        wanted = [
            DatasetRequest(train, run.samples(role), config.sampling.limit, responders[0].sampling.n, run.round),
            DatasetRequest(heldout, run.heldout_samples(role), limit, 1, _PAIRS_SEED),
        ]
        if not run.round:  # later students have answered as the system of the round before
            for output, decoding in _system_outputs(config, run, "teacher" if role == "teacher" else "warmup"):
                wanted.append(DatasetRequest(heldout, output, limit, 1, _SYSTEM_SEED, decoding))
            if role == "student" and (n := config.candidates):
                wanted.append(DatasetRequest(heldout, run.candidates(), limit, n, _CANDIDATES_SEED))
        assigned: dict[str, list[Assignment]] = {responder.name: [] for responder in responders}
        for dataset in wanted:
            for name, assignments in _assignments(config, run, responders, dataset).items():
                assigned[name] += assignments
        work += [(responder, assigned[responder.name]) for responder in responders]
    return work


def _system_outputs(config: Config, run: RunDir, system: str) -> list[tuple[Dataset, Decoding]]:
    """What the evaluation samples from one system: every decoding, and for the warm-up student lower temperatures too."""
    return [(run.system_samples(system, name), decoding) for name, decoding in config.system_decodings(system).items()]


@dataclass(frozen=True)
class DatasetRequest:
    """One dataset of samples that is to be made.

    Attributes:
        limit: prompts that are answered at most, each `n` times.
        seed_round: keeps the seeds of what is sampled for other purposes apart.
        decoding: None for the responder's own, as it is sampled for pairs.
        responses: what is scored instead of drawing anything, in tokens of the responder's own or in another model's.
    """

    prompts: Dataset
    output: Dataset
    limit: int | None
    n: int
    seed_round: int
    decoding: Decoding | None = None
    responses: Dataset | None = None
    own_tokens: bool = True


def _assignments(
    config: Config, run: RunDir, responders: list[Responder], wanted: DatasetRequest
) -> dict[str, list[Assignment]]:
    """One dataset of samples, by the responder that does each block."""
    manifest = wanted.prompts.require("prepare")
    rows = rows_by_block(manifest, wanted.limit)
    cut = {block: count for block, count in enumerate(rows) if count < manifest.parts[block].rows}
    seed, n, role = config.run.seed, wanted.n, responders[0].role
    decodings = [wanted.decoding or responder.decoding() for responder in responders]
    scored = None
    if wanted.responses is not None:
        scored = {"contents": wanted.responses.require("sample").contents, "own_tokens": wanted.own_tokens}
    input_fingerprint = fingerprint(
        "samples",
        prompts={"fingerprint": manifest.fingerprint, "content": manifest.facts.get("content")},
        rows=sum(rows),
        cut={str(block): count for block, count in cut.items()},
        models=[responder.identity for responder in responders],
        decodings=[decoding.model_dump(mode="json") for decoding in decodings],
        n=n,
        seed=seed,
        seed_round=wanted.seed_round,
        role=role,
        scored=scored,
    )
    if wanted.responses is not None:  # those that were scored may have been repaired since, and say something else now
        wanted.output.set_aside_unless(input_fingerprint)
    blocks_of = teacher_blocks(manifest) if role == "teacher" else {responders[0].name: range(len(rows))}
    assigned: dict[str, list[Assignment]] = {}
    for responder, decoding in zip(responders, decodings, strict=True):
        job = SamplingJob(
            prompts=wanted.prompts.path,
            output=wanted.output.path,
            role=role,
            model=responder.path,
            weights=responder.path,
            decoding=decoding,
            n=n,
            seed=seed,
            round=run.round,
            seed_round=wanted.seed_round,
            fingerprint=input_fingerprint,
            cut=cut,
            responses=wanted.responses.path if wanted.responses else None,
            own_tokens=wanted.own_tokens,
        )
        mine = [block for block in blocks_of.get(responder.name, []) if block < len(rows)]
        assigned[responder.name] = [Assignment(job, mine, [count * n for count in rows])]
    return assigned


# ------------------------------------------------------------------------------------------------------------- fleets


def _fleet(
    config: Config, run: RunDir, responder: Responder, assignments: list[Assignment], paid: Sequence[Dataset] = ()
) -> Fleet:
    """The actors of one model. `paid`: what else counts towards its cap."""
    settings, wanted = responder.settings, responder.sampling
    if settings.endpoint is not None:
        outputs = [(assignment.job.dataset(run.storage), assignment.blocks) for assignment in assignments]
        outputs += [(dataset, range(len(dataset.committed()))) for dataset in paid]
        backend = partial(EndpointBackend, settings, responder.path, outputs)
        return Fleet(
            name=responder.name,
            assignments=tuple(assignments),
            worker=Sampler,
            arguments=(run.storage, backend, config.sampling.max_attempts),
            placement=Placement(wanted.cpus),
            replicas=1,  # one client: limits on requests, tokens and money are those of one key
            window=window_for(settings.endpoint.concurrency, config.prompts.block_size, config.sampling.window),
            # The client itself knows how long to wait; no other actor could do a block faster.
            lease_timeout_s=math.inf,
            stall_timeout_s=max(
                config.sampling.stall_timeout_s, settings.endpoint.give_up_after_s + 2 * settings.endpoint.timeout_s
            ),
        )
    has_gpus = engines_use_gpus()
    placement = place(wanted.engine, wanted.cpus, has_gpus=has_gpus)
    return Fleet(
        name=responder.name,
        assignments=tuple(assignments),
        worker=Sampler,
        arguments=(
            run.storage,
            partial(Engine, responder.path, settings, dict(wanted.engine), config.run.seed),
            config.sampling.max_attempts,
        ),
        placement=placement,
        replicas=wanted.replicas,
        min_replicas=wanted.min_replicas,
        window=window_for(
            int(wanted.engine.get("max_num_seqs", _SEQUENCES)), config.prompts.block_size, config.sampling.window
        ),
        environment=engine_environment(wanted.cpus, has_gpus=has_gpus),
    )
