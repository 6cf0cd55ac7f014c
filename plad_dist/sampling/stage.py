"""Stage `sample`: the responses of the teacher and the student to the prompts.

While a model is loaded, it also responds to the held-out prompts, so that a large teacher is loaded
once: with its own decoding for the held-out pairs, and with every decoding of the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plad_dist.config import Config, Decoding, LlmJudge
from plad_dist.data.dataset import Dataset
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.fleet.driver import run_fleets
from plad_dist.fleet.fleet import Assignment, Fleet
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.sampling.requests import DatasetRequest, assign_blocks
from plad_dist.sampling.responders import (
    Responder,
    fleet_of,
    judge_responder,
    rejected_responder,
    role_responders,
    student_responder,
)
from plad_dist.sampling.warm import warm_engines
from plad_dist.systems import TEACHER, WARMUP, System

# Keep the seeds of held-out samples apart from those of training samples, which have the number of
# their round.
_PAIRS_SEED, _SYSTEM_SEED, _CANDIDATES_SEED = -1, -2, -3

ROLES = ("teacher", "student")


def sample(config: Config, run: RunDir, progress: Progress, roles: Sequence[str] = ROLES) -> None:
    """Sample what the roles have not sampled yet.

    Raises:
        UserError, RunFailed: as :func:`~plad_dist.fleet.driver.run_fleets`.
    """
    fleets = [
        fleet_of(config, run, responder, assignments)
        for responder, assignments in assignments_of_roles(config, run, roles)
    ]
    _run(config, run, fleets, progress)


def _run(config: Config, run: RunDir, fleets: Sequence[Fleet], progress: Progress, **options: Any) -> None:
    """Run fleets whose engines are warm. Options: those of :func:`run_fleets`."""
    with warm_engines(config, fleets):
        run_fleets(config, run.storage, fleets, progress, **options)


def is_sampled(config: Config, run: RunDir, roles: Sequence[str] = ROLES) -> bool:
    """Return True if everything that the roles sample is committed.

    Raises:
        UserError: a complete dataset is that of another config or model.
    """
    work = assignments_of_roles(config, run, roles)
    return are_complete([assignment for _, assignments in work for assignment in assignments], run)


def are_complete(assignments: Sequence[Assignment], run: RunDir) -> bool:
    """Return True if the datasets of some assignments are complete.

    Raises:
        UserError: one of them is complete with another fingerprint.
    """
    jobs = {assignment.job.output: assignment.job for assignment in assignments}
    return None not in [job.dataset(run.storage).complete_as(job.fingerprint) for job in jobs.values()]


def assignments_of_roles(config: Config, run: RunDir, roles: Sequence[str]) -> list[tuple[Responder, list[Assignment]]]:
    """Return every responder of the roles with the blocks that it samples in this stage.

    One set of engines samples the student before its training and the warm-up student.
    """
    work: dict[str, tuple[Responder, list[Assignment]]] = {}
    for role in roles:
        responders = role_responders(config, run, role)
        writers = responders if role == "teacher" else [rejected_responder(config, run)]
        requests = [(writers, request) for request in _requests_for_pairs(config, run, role, writers[0].sampling.n)]
        requests += [(responders, request) for request in _requests_for_evaluation(config, run, role)]
        for group, request in requests:
            assignments = assign_blocks(config, run, group, request)
            for responder in group:
                work.setdefault(responder.name, (responder, []))[1].append(assignments[responder.name])
    return list(work.values())


def _requests_for_pairs(config: Config, run: RunDir, role: str, n: int) -> list[DatasetRequest]:
    sampled = run.of_samples(config)
    train, heldout = train_prompts(run.storage), heldout_prompts(run.storage)
    return [
        DatasetRequest(train, sampled.samples(role), config.sampling.limit, n, sampled.round),
        DatasetRequest(heldout, sampled.heldout_samples(role), config.evaluation.limit, 1, _PAIRS_SEED),
    ]


def _requests_for_evaluation(config: Config, run: RunDir, role: str) -> list[DatasetRequest]:
    if run.round:  # the student of a later round was sampled as a system of the round before
        return []
    heldout, limit = heldout_prompts(run.storage), config.evaluation.limit
    requests = []
    for output, decoding in _system_outputs(config, run, TEACHER if role == "teacher" else WARMUP):
        requests.append(DatasetRequest(heldout, output, limit, 1, _SYSTEM_SEED, decoding))
    if role == "student" and config.candidates:
        requests.append(DatasetRequest(heldout, run.candidates(), limit, config.candidates, _CANDIDATES_SEED))
    return requests


def _system_outputs(config: Config, run: RunDir, system: System) -> list[tuple[Dataset, Decoding]]:
    """Return the datasets that the evaluation samples from one system, one for each decoding."""
    return [(run.system_samples(system, name), decoding) for name, decoding in config.system_decodings(system).items()]


# -- for the evaluation


def sample_systems(config: Config, run: RunDir, systems: dict[System, str], progress: Progress) -> None:
    """Sample the held-out prompts from trained students, and score the candidates under each.

    The students share actors, whose engines change weights from one student to the next.

    Args:
        systems: folder of the student of each system.
    """
    assignments = _responses_of_systems(config, run, systems)
    for system, path in systems.items() if config.candidates else ():
        request = DatasetRequest(
            heldout_prompts(run.storage),
            run.scored("candidates", system),
            config.evaluation.limit,
            config.candidates,
            _CANDIDATES_SEED,
            responses=run.candidates(),
        )
        student = student_responder(config, path)
        assignments.append(assign_blocks(config, run, [student], request)[student.name])
    first_student = student_responder(config, next(iter(systems.values())))
    _run(config, run, [fleet_of(config, run, first_student, assignments)], progress)


def are_systems_sampled(config: Config, run: RunDir, systems: dict[System, str]) -> bool:
    """Return True if the responses of trained students are committed.

    Args:
        systems: folder of the student of each system.

    Raises:
        UserError: the responses are those of another config or model.
    """
    return are_complete(_responses_of_systems(config, run, systems), run)


def _responses_of_systems(config: Config, run: RunDir, systems: dict[System, str]) -> list[Assignment]:
    heldout, limit = heldout_prompts(run.storage), config.evaluation.limit
    assignments = []
    for system, path in systems.items():
        student = student_responder(config, path)
        for output, decoding in _system_outputs(config, run, system):
            request = DatasetRequest(heldout, output, limit, 1, _SYSTEM_SEED, decoding)
            assignments.append(assign_blocks(config, run, [student], request)[student.name])
    return assignments


def score_by_teacher(
    config: Config, run: RunDir, judge: str, responses: dict[System, Dataset], progress: Progress
) -> None:
    """Compute the log-likelihoods of responses to the held-out prompts under the teacher.

    Args:
        judge: name of the judge, under which the scored responses are stored.
        responses: responses of each system.
    """
    [teacher] = role_responders(config, run, "teacher")
    requests = [
        DatasetRequest(
            heldout_prompts(run.storage),
            run.scored(judge, system),
            config.evaluation.limit,
            1,
            _SYSTEM_SEED,
            responses=dataset,
            own_tokens=False,
        )
        for system, dataset in responses.items()
    ]
    assignments = [assign_blocks(config, run, [teacher], request)[teacher.name] for request in requests]
    _run(config, run, [fleet_of(config, run, teacher, assignments)], progress, stage="evaluate")


def judge_identity(config: Config, name: str, judge: LlmJudge) -> dict[str, Any]:
    """Return the fields that decide a judge's replies, apart from the questions."""
    responder = judge_responder(name, judge)
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
    questions: Sequence[tuple[Dataset, Dataset]],
    earlier: Sequence[Dataset],
    progress: Progress,
) -> None:
    """Ask a judge every question of some datasets once.

    Args:
        questions: pairs of a prompts dataset and the samples dataset for the replies.
        earlier: replies of the same judge to other questions, whose cost counts towards its cap.
    """
    responder = judge_responder(name, judge)
    requests = [DatasetRequest(prompts, output, None, 1, _SYSTEM_SEED) for prompts, output in questions]
    assignments = [assign_blocks(config, run, [responder], request)[name] for request in requests]
    fleet = fleet_of(config, run, responder, assignments, other_outputs=earlier)
    _run(config, run, [fleet], progress, stage="evaluate", unit="answers")
