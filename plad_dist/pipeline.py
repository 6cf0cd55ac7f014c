"""The whole run on one screen: the stages in order, each skipped if its output is committed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile

from plad_dist.cluster import connected
from plad_dist.config import Config
from plad_dist.data.claims import check_owned
from plad_dist.data.prompts import is_prepared, prepare, train_prompts
from plad_dist.errors import RunFailed, UserError
from plad_dist.evaluation.document import Metrics, load_metrics
from plad_dist.evaluation.formatting import writer_phrase
from plad_dist.evaluation.report.stage import write_report
from plad_dist.evaluation.rounds import continues_after
from plad_dist.evaluation.stage import evaluate, is_evaluated, require_inputs
from plad_dist.holders import Holder
from plad_dist.pairing.build import build_pairs, is_paired
from plad_dist.pairing.build import require_inputs as require_pair_inputs
from plad_dist.pairing.tells import warnings as pair_warnings
from plad_dist.phases import SEQKD, TEACHER, WARMUP, phase_names, round_phase
from plad_dist.preflight import check_inputs
from plad_dist.progress import Progress
from plad_dist.reuse import reused_run, take_over
from plad_dist.run_logs import add_timing, log_to_run
from plad_dist.rundir import RunDir, check_binding, is_bound_to, open_run, with_date
from plad_dist.timeline import Activity

logger = logging.getLogger("plad")

_WRITERS = {"teacher": ("teacher",), "student": ("student", "rejected")}  # models that each role samples


@dataclass(frozen=True)
class Step:
    """One stage of a run, or some of its training phases.

    Attributes:
        name: shown in the log, and the key of the step's timing.
        command: `plad` command that the step belongs to.
        is_done: returns True if the output is committed.
        require_inputs: raises :class:`UserError` if an output of an earlier stage is missing.
        work: makes the output; returns a sentence about the result, or None.
        needs_ray: `work` runs on a Ray cluster.
        holders: parts of the step that occupy the memory of devices.
    """

    name: str
    command: str
    is_done: Callable[[], bool]
    require_inputs: Callable[[], object]
    work: Callable[[], str | None]
    needs_ray: bool = True
    holders: tuple[Holder, ...] = ()


def steps_of(config: Config, run: RunDir, progress: Progress, phase: str | None = None) -> Iterator[Step]:
    """Yield all steps of a run in order.

    Args:
        phase: only training phase to include; None for all.
    """
    steps = _Steps(config, run, progress, phase)
    yield steps.prepare()
    if config.training.warmup and config.training.warmup.data == "teacher":
        yield from steps.train(TEACHER)
        yield steps.sample("sample teacher", "teacher")
    yield from steps.train(TEACHER, WARMUP)
    yield steps.sample("sample", "teacher", "student")
    yield steps.pair()
    yield from steps.train(round_phase(0), SEQKD)
    yield steps.evaluate()
    yield steps.report()
    for number in range(1, config.rounds.most):
        if not continues_after(config, run.at_round(number - 1)):
            return
        steps = replace(steps, run=run.at_round(number))
        if config.sampling.rejected is None:  # any other model was sampled in the first round, for all
            yield steps.sample("sample", "student")
        yield steps.pair()
        yield from steps.train(round_phase(number))
        yield steps.evaluate()
        yield steps.report()


@dataclass(frozen=True)
class _Steps:
    """Steps of one round.

    The engines are imported by the stages that use them, so that a finished run is skipped quickly.
    """

    config: Config
    run: RunDir
    progress: Progress
    phase: str | None

    def _name(self, stage: str) -> str:
        return f"{stage}, round {self.run.round}" if self.run.round else stage

    def prepare(self) -> Step:
        return Step(
            "prepare",
            "prepare",
            is_done=lambda: is_prepared(self.config, self.run.storage),
            require_inputs=lambda: None,
            work=lambda: _prepare(self.config, self.run),
            needs_ray=False,
        )

    def sample(self, name: str, *roles: str) -> Step:
        from plad_dist.sampling import stage

        return Step(
            self._name(name),
            "sample",
            is_done=lambda: stage.is_sampled(self.config, self.run, roles),
            require_inputs=lambda: train_prompts(self.run.storage).require("prepare"),
            work=lambda: stage.sample(self.config, self.run, self.progress, roles),
            holders=tuple(Holder("sample", writer) for role in roles for writer in _WRITERS[role]),
        )

    def pair(self) -> Step:
        return Step(
            self._name("pair"),
            "pair",
            is_done=lambda: is_paired(self.config, self.run),
            require_inputs=lambda: require_pair_inputs(self.config, self.run),
            work=lambda: _pair(self.config, self.run, self.progress),
        )

    def train(self, *phases: str) -> Iterator[Step]:
        """Yield one step for the phases that the config has, which share a worker group."""
        from plad_dist.training.driver import stage

        names = [name for name in phases if name in phase_names(self.config) and self.phase in (None, name)]
        if names:
            yield Step(
                f"train {', '.join(names)}",
                "train",
                is_done=lambda: stage.are_trained(names, self.config, self.run),
                require_inputs=lambda: stage.require_inputs(names, self.config, self.run),
                work=lambda: stage.train_phases(names, self.config, self.run, self.progress),
                holders=tuple(Holder("train", name) for name in names),
            )

    def evaluate(self) -> Step:
        return Step(
            self._name("evaluate"),
            "evaluate",
            is_done=lambda: is_evaluated(self.config, self.run),
            require_inputs=lambda: require_inputs(self.config, self.run),
            work=lambda: _evaluate(self.config, self.run, self.progress),
            holders=(Holder("sample", "student"), Holder("judge")),
        )

    def report(self) -> Step:
        return Step(
            self._name("report"),
            "evaluate",
            is_done=lambda: self.run.storage.read(self.run.report) is not None,
            require_inputs=lambda: finished_metrics(self.run),
            work=lambda: write_report(self.config, self.run),
            needs_ray=False,
        )


def run_pipeline(config: Config, command: str | None = None, phase: str | None = None) -> RunDir:
    """Run the steps whose output is not committed: all, those of a command, or one training phase.

    Raises:
        UserError: the config, its inputs or the run directory are wrong, or outputs of earlier
            stages are missing.
        RunFailed: a stage failed. Committed output is kept.
    """
    run = RunDir.of(config)
    progress = Progress()
    with progress.timed("check of the inputs", Activity.COMPUTING):
        check_inputs(config, run, command=command)
    claimant = f"plad {command or 'run'}"
    if source := reused_run(config):
        take_over(config, [source], claimant)
    config = with_date(config, run)

    def steps(run: RunDir) -> Iterator[Step]:
        return (step for step in steps_of(config, run, progress, phase) if command in (None, step.command))

    first = next((step for step in steps(run) if not step.is_done()), None)
    if first is None and is_bound_to(config, run):
        logger.info("nothing to do: everything is committed in %s", run.storage.url)
        return run
    if command and first:
        first.require_inputs()  # before anything is written
    run = open_run(config, claimant)
    log_to_run(run)
    _work_off(partial(steps, run), run, config, progress, command)
    return run


def _work_off(
    steps: Callable[[], Iterator[Step]], run: RunDir, config: Config, progress: Progress, command: str | None
) -> None:
    """Do the steps whose output is not committed."""

    def remaining_from(first: Step) -> list[Holder]:
        remaining = dropwhile(lambda step: step.name != first.name, steps())
        return [holder for step in remaining for holder in step.holders]

    worked = 0
    with connected(config, progress) as connect:
        for step in steps():
            if step.is_done():
                logger.info("%s: committed, skipped", step.name)
                continue
            if command and worked:
                try:
                    step.require_inputs()
                except UserError as missing:  # the command has done what it can without the stages in between
                    logger.info("%s: left to a later `plad %s`: %s", step.name, command, missing)
                    break
            worked += 1
            check_binding(config, run)
            _work(step, run, progress, partial(connect, remaining_from(step)))


def _work(step: Step, run: RunDir, progress: Progress, connect: Callable[[], object]) -> None:
    progress.say(f"{step.name}: begins")
    step.require_inputs()
    with progress.timed(step.name, Activity.STARTING if step.needs_ray else Activity.COMPUTING) as clock:
        try:
            if step.needs_ray:
                connect()
            result = step.work()
        finally:
            with contextlib.suppress(RunFailed):  # nothing depends on it
                add_timing(run, step.name, clock.read())
    check_owned(run.storage)
    progress.say(f"{step.name}: done in {clock.read().total:.1f} s{f'; {result}' if result else ''}")


def _prepare(config: Config, run: RunDir) -> str:
    rows = prepare(config, run.storage)
    return f"{rows['train']:,} training and {rows['heldout']:,} held-out prompts"


def _pair(config: Config, run: RunDir, progress: Progress) -> str:
    facts = build_pairs(config, run, progress)
    for warning in pair_warnings(facts):
        logger.warning(warning)
    drops = ", ".join(f"{reason} {count:,}" for reason, count in facts.drops.items()) or "none"
    summary = f"{facts.pairs:,} pairs of {facts.prompts:,} prompts; dropped: {drops}"
    if facts.teacher_better_share is not None and facts.teacher_worse_share is not None:
        summary += (
            f"; by {config.pairing.score} the teacher scores higher in {facts.teacher_better_share:.0%} of the scored "
            f"combinations, lower in {facts.teacher_worse_share:.0%}"
        )
        if facts.teacher_better_share <= facts.teacher_worse_share:
            writer = writer_phrase(config.sampling.rejected)
            logger.warning("the teacher does not win over %s: there is no capacity gap to distil", writer)
    return summary


def _evaluate(config: Config, run: RunDir, progress: Progress) -> str:
    evaluate(config, run, progress)
    return str(run.root / run.metrics)


def finished_metrics(run: RunDir) -> Metrics:
    """Return the figures of a round. Raise :class:`UserError` if it is not evaluated yet."""
    metrics = load_metrics(run)
    if metrics is None:
        raise UserError(f"{run.storage.url}: not evaluated yet; run `plad evaluate` first")
    return metrics
