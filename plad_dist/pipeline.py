"""The whole run on one screen: stages in order, each skipped where its output is committed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from typing import Any

from plad_dist.cluster import connected
from plad_dist.config import Config
from plad_dist.data.prompts import heldout_prompts, prepare, train_prompts
from plad_dist.errors import UserError
from plad_dist.evaluation.stage import evaluate, goes_on, is_evaluated, report, require_inputs
from plad_dist.pairing.build import build_pairs, is_paired, pair_jobs
from plad_dist.phases import SEQKD, TEACHER, WARMUP, phase_names, round_phase
from plad_dist.preflight import check_inputs
from plad_dist.progress import Progress
from plad_dist.reuse import reused_run, take_over
from plad_dist.rundir import TIMINGS, RunDir, log_to_run, open_run, read_timings

logger = logging.getLogger("plad")


@dataclass(frozen=True)
class Step:
    """One stage of a run, or one training phase.

    Attributes:
        command: the `plad` command that it belongs to.
        done: whether its output is committed.
        inputs: raises :class:`UserError` where what an earlier stage makes is not there.
        work: does it; returns a sentence about what came of it, or None.
        holds: whose memory it needs: `train <phase>`, `sample teacher`, `sample student`, `judge`.
    """

    name: str
    command: str
    done: Callable[[], bool]
    inputs: Callable[[], object]
    work: Callable[[], str | None]
    needs_ray: bool = True
    holds: tuple[str, ...] = ()


def steps_of(config: Config, run: RunDir, progress: Progress, phase: str | None = None) -> Iterator[Step]:
    """All steps of a run, in order; of the training phases only `phase` if it is given."""
    # Ray, torch and the engines are imported by the stages that use them: a finished run is skipped through in a moment.
    from plad_dist.sampling import stage as sampling
    from plad_dist.training.driver import stage as training

    def train(*names: str) -> Iterator[Step]:
        wanted = [name for name in names if name in phase_names(config) and phase in (None, name)]
        if wanted:
            yield Step(
                f"train {', '.join(wanted)}",
                "train",
                lambda: training.are_trained(wanted, run),
                lambda: training.require_inputs(wanted, config, run),
                lambda: training.train_phases(wanted, config, run, progress),
                holds=tuple(f"train {name}" for name in wanted),
            )

    def sample(name: str, roles: tuple[str, ...], run: RunDir = run) -> Step:
        return Step(
            name,
            "sample",
            lambda: sampling.is_sampled(config, run, roles),
            lambda: train_prompts(run.storage).require("prepare"),
            lambda: sampling.sample(config, run, progress, roles),
            holds=tuple(f"sample {role}" for role in roles),
        )

    def calibrate(run: RunDir, *trained: str) -> Iterator[Step]:
        """From the samples of a round to the figures of its student."""
        name = _named(run)
        yield Step(
            name("pair"),
            "pair",
            lambda: is_paired(run),
            lambda: pair_jobs(config, run),
            lambda: _pair(config, run, progress),
        )
        yield from train(round_phase(run.round), *trained)
        yield Step(
            name("evaluate"),
            "evaluate",
            lambda: is_evaluated(config, run),
            lambda: require_inputs(config, run),
            lambda: _evaluate(config, run, progress),
            holds=("sample student", "judge"),
        )
        yield Step(
            name("report"),
            "evaluate",
            lambda: run.storage.read(run.report) is not None,
            lambda: finished_metrics(run),
            lambda: report(config, run),
            needs_ray=False,
        )

    warmup = config.training.warmup
    yield Step(
        "prepare", "prepare", lambda: _prepared(run), lambda: None, lambda: _prepare(config, run), needs_ray=False
    )
    if warmup and warmup.data == "teacher":
        yield from train(TEACHER)
        yield sample("sample teacher", ("teacher",))
    yield from train(TEACHER, WARMUP)
    yield sample("sample", ("teacher", "student"))
    yield from calibrate(run, SEQKD)
    for number in range(1, config.rounds.most):
        if not goes_on(config, run.at_round(number - 1)):
            return
        later = run.at_round(number)
        yield sample(_named(later)("sample"), ("student",), later)
        yield from calibrate(later)


def _named(run: RunDir) -> Callable[[str], str]:
    """Names of a round's steps."""
    return lambda step: f"{step}, round {run.round}" if run.round else step


def run_pipeline(config: Config, command: str | None = None, phase: str | None = None) -> RunDir:
    """Run what is not committed yet: all steps, or those of one command, or one training phase.

    Raises:
        UserError: the config, its inputs or the run directory are wrong, or a stage's inputs are missing.
        RunFailed: a stage failed; what it committed is kept.
    """
    run = RunDir.of(config)
    check_inputs(config, run, command=command)
    if other := reused_run(config):
        take_over(config, [other])
    progress = Progress()

    def steps() -> Iterator[Step]:
        return (step for step in steps_of(config, run, progress, phase) if command in (None, step.command))

    def still_to_do(first: Step) -> list[str]:
        rest = dropwhile(lambda step: step.name != first.name, steps())
        return [held for step in rest for held in step.holds]

    if command and (first := next((step for step in steps() if not step.done()), None)):
        first.inputs()  # what one command needs is there, or it leaves nothing behind
    open_run(config)
    log_to_run(run)
    todo = 0
    with connected(config, progress) as connect:
        for step in steps():
            if step.done():
                logger.info("%s: committed, skipped", step.name)
                continue
            if command and todo:
                try:
                    step.inputs()
                except UserError as missing:  # of a stage that comes in between; what this command could do is done
                    logger.info("%s: is left to a later `plad %s`: %s", step.name, command, missing)
                    break
            todo += 1
            _work(step, run, partial(connect, still_to_do(step)))
    if not todo:
        logger.info("nothing to do: everything is committed in %s", run.storage.url)
    return run


def _work(step: Step, run: RunDir, connect: Callable[[], object]) -> None:
    logger.info("%s: begins", step.name)
    started = time.monotonic()
    step.inputs()
    if step.needs_ray:
        connect()
    said = step.work()
    seconds = time.monotonic() - started
    timings = read_timings(run)
    timings[step.name] = round(timings.get(step.name, 0.0) + seconds, 1)
    run.storage.replace(TIMINGS, json.dumps(timings, indent=1).encode())
    logger.info("%s: done in %.1f s%s", step.name, seconds, f"; {said}" if said else "")


def _prepared(run: RunDir) -> bool:
    return all(dataset(run.storage).manifest() is not None for dataset in (train_prompts, heldout_prompts))


def _prepare(config: Config, run: RunDir) -> str:
    rows = prepare(config, run.storage)
    return f"{rows['train']:,} training and {rows['heldout']:,} held-out prompts"


def _pair(config: Config, run: RunDir, progress: Progress) -> str:
    facts = build_pairs(config, run, progress)
    drops = ", ".join(f"{reason} {count:,}" for reason, count in facts["drops"].items()) or "none"
    said = f"{facts['pairs']:,} pairs of {facts['prompts']:,} prompts; dropped: {drops}"
    if facts["teacher_better_share"] is not None:
        said += (
            f"; by the reference the teacher is better in {facts['teacher_better_share']:.0%} of the pairs, worse in "
            f"{facts['teacher_worse_share']:.0%}"
        )
        if facts["teacher_better_share"] <= facts["teacher_worse_share"]:
            logger.warning("the teacher does not win over the student: there is no capacity gap to distil")
    return said


def _evaluate(config: Config, run: RunDir, progress: Progress) -> str:
    evaluate(config, run, progress)
    return str(run.root / run.metrics)


def finished_metrics(run: RunDir) -> dict[str, Any]:
    """The figures of a round. Raises :class:`UserError` where there are none yet."""
    metrics: dict[str, Any] | None = run.storage.read_json(run.metrics)
    if metrics is None:
        raise UserError(f"{run.storage.url}: not evaluated yet")
    return metrics
