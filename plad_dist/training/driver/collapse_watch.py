"""Looks at what the student writes while a round trains, on resources that are free then.

A look is a Ray task of its own: it makes the model of the latest checkpoint from its files, starts the student's engine on it, and lets
it answer a few held-out prompts. The trainer waits for nothing and gathers nothing, and between looks their resources are anybody's.
The driver judges the figures; the trainer reads the verdict when it next prunes its checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from plad_dist.config import CollapseBounds, Config, Decoding
from plad_dist.data.models import model_fingerprint
from plad_dist.data.prompts import heldout_prompts
from plad_dist.data.templates import Messages
from plad_dist.errors import first_line
from plad_dist.fleet.placement import Placement
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir, round_of
from plad_dist.sampling.backend import RefusedPromptError
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.engine_placement import engine_environment, engines_use_gpus, place
from plad_dist.sampling.job import sample_seed
from plad_dist.systems import PLAD, WARMUP
from plad_dist.text_metrics import Output, main_decoding, repetition, rouge_l, wins
from plad_dist.training.checkpoints.scratch_dir import ScratchDir
from plad_dist.training.checkpoints.store import Checkpoint, CheckpointStore
from plad_dist.training.driver.elastic import free_resources
from plad_dist.training.job import PhaseJob
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord, read_collapse_record

logger = logging.getLogger("plad")

_TURN_S, _LONGEST_PAUSE_S = 5.0, 300.0
_FOLDER = "plad-watch-"
_SEED_ROUND = -4  # keeps these seeds apart from those of what is sampled for other purposes


@dataclass(frozen=True)
class Questions:
    """What is asked at every look, and what the starting student answered."""

    ids: list[str]
    prompts: list[Messages]
    references: list[str | None]
    before: list[Output]
    decoding: Decoding


@contextmanager
def watching(jobs: Sequence[PhaseJob], config: Config, run: RunDir, mailbox: Any, progress: Progress) -> Iterator[None]:
    """CheckpointProbe at the rounds among the phases while the block runs, where the config wants it.

    Args:
        mailbox: of the workers, who are left alone until they take steps.
    """
    rounds = [job for job in jobs if job.watch is not None and round_of(job.name) is not None]
    if not rounds:
        yield
        return
    watch = CollapseWatch(rounds, config, run, mailbox, progress)
    thread = threading.Thread(target=watch.follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join(timeout=2 * _TURN_S)


class CollapseWatch:
    def __init__(self, jobs: list[PhaseJob], config: Config, run: RunDir, mailbox: Any, progress: Progress) -> None:
        self._jobs, self._config, self._run, self._mailbox, self._progress = jobs, config, run, mailbox, progress
        self.ended = threading.Event()
        self._questions: dict[str, Questions] = {}
        self._looked_at: dict[str, int] = {}  # step by phase, whatever came of it
        self._told = False  # that there is no room

    def follow(self) -> None:
        """CheckpointProbe whenever there is something new. Training does not depend on it: what goes wrong is said, and the next checkpoint is looked at."""
        wait, begun = _TURN_S, False
        while not self.ended.wait(wait):
            try:
                if not begun:
                    self._judge_anew()
                begun = True
                self._turn()
                wait = _TURN_S
            except Exception as error:  # noqa: BLE001 - the thread must go on
                wait = min(2 * wait, _LONGEST_PAUSE_S)
                logger.warning("watch: %s", first_line(error))

    def _judge_anew(self) -> None:
        """By the bounds as they are now, and the checkpoints that are left."""
        for job in self._jobs:
            found = read_collapse_record(self._run.storage, job.name, job.fingerprint)
            if found is not None:
                self._write(job, replace(found, probing=None))

    def _write(self, job: PhaseJob, found: CollapseRecord) -> CollapseRecord:
        assert job.watch is not None
        found = judged(found, job.watch, _store(job).is_committed)
        found.write(self._run.storage, job.name)
        return found

    def _turn(self) -> None:
        run = self._run
        job = next((one for one in self._jobs if model_fingerprint(run.model(one.name)) != one.fingerprint), None)
        if job is None or job.watch is None:
            return
        found = read_collapse_record(run.storage, job.name, job.fingerprint)
        newest, _ = _store(job).newest()
        if newest is None or (found is not None and found.collapse is not None):
            return
        step = newest.state.step
        seen = max(self._looked_at.get(job.name, 0), found.probes[-1].step if found is not None and found.probes else 0)
        if seen >= step or not self._trains() or not self._room():
            return
        self._looked_at[job.name] = step
        questions = self._questions_of(job, job.watch)
        if not questions.ids:
            return
        found = found or CollapseRecord(job.fingerprint, start=figures(0, questions.before, questions))
        self._write(job, replace(found, probing=step))
        answers = None
        try:
            answers = self._look(job, newest, questions) if _store(job).is_committed(step) else None
        finally:
            found = read_collapse_record(run.storage, job.name, job.fingerprint)
            if found is not None and found.probing != step:  # another command watches now
                found = None
            if found is not None and answers is None:  # the checkpoint may go
                self._write(job, replace(found, probing=None))
        if found is None or answers is None:
            return
        look = figures(step, answers, questions)
        found = self._write(job, replace(found, probes=[*found.probes, look], probing=None))
        self._progress.say(f"watch {job.name}: {told(look)}; {found.collapse or 'sound'}")

    def _trains(self) -> bool:
        """Whether the workers take steps: before, and while they start anew, what is free is theirs."""
        return bool(ray.get(self._mailbox.takes_steps.remote(), timeout=30))

    def _room(self) -> bool:
        """Whether one node has room for an engine of the student, beside the trainer."""
        placement = self._placement
        wanted = {"CPU": placement.cpus, "GPU": placement.gpus}
        fits = not placement.bundles and any(
            all(free.get(name, 0.0) >= amount for name, amount in wanted.items()) for free in free_resources().values()
        )
        if not fits and not self._told:
            self._told = True
            self._progress.say(f"watch: no node has {placement} free beside the trainer; looks when one has")
        return fits

    @property
    def _placement(self) -> Placement:
        student = self._config.sampling.student
        return place(student.engine, student.cpus, has_gpus=engines_use_gpus())

    def _questions_of(self, job: PhaseJob, watch: CollapseBounds) -> Questions:
        if job.name not in self._questions:
            self._questions[job.name] = questions_of(self._config, self._run, round_of(job.name) or 0, watch.prompts)
        return self._questions[job.name]

    def _look(self, job: PhaseJob, checkpoint: Checkpoint, questions: Questions) -> list[Output] | None:
        """What the model of a checkpoint answers; None where it took too long, or the trainer needs what the look holds."""
        config, student, placement = self._config, self._config.sampling.student, self._placement
        seeds = [sample_seed(config.run.seed, _SEED_ROUND, "student", id_, 0) for id_ in questions.ids]
        task = ray.remote(max_calls=1, max_retries=0)(answers_of).options(
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            runtime_env={"env_vars": engine_environment(student.cpus, has_gpus=engines_use_gpus())},
        )
        asked = task.remote(
            replace(job, mailbox=None), checkpoint, dict(student.engine), questions.prompts, questions.decoding, seeds
        )
        until = time.monotonic() + config.sampling.engine_start_timeout_s + config.sampling.stall_timeout_s
        try:
            while not ray.wait([asked], timeout=1.0)[0]:
                if self.ended.is_set() or time.monotonic() > until or not self._trains():
                    return None
            answers: list[Output] = ray.get(asked)
            return answers
        finally:
            ray.cancel(asked, force=True)  # nothing, where it has ended


def _store(job: PhaseJob) -> CheckpointStore:
    return CheckpointStore(job.checkpoints, job.name, job.fingerprint)


def questions_of(config: Config, run: RunDir, number: int, count: int) -> Questions:
    """The first held-out prompts with the answers of the student that a round starts from."""
    decodings = config.decodings()
    decoding = main_decoding([(PLAD, name) for name in decodings], {n: d.temperature for n, d in decodings.items()})
    before = run.at_round(number - 1).system_samples(PLAD, decoding) if number else run.system_samples(WARMUP, decoding)
    rows = before.read(["prompt_id", "text", "num_tokens", "finish_reason"]).slice(0, count).to_pylist()
    wanted = {row["prompt_id"] for row in rows}
    prompts: dict[str, dict[str, Any]] = {}
    dataset = heldout_prompts(run.storage)
    for block in range(len(dataset.require("prepare").parts)):
        if len(prompts) == len(wanted):
            break
        found = dataset.read_block(block).select(["prompt_id", "messages", "reference"]).to_pylist()
        prompts |= {row["prompt_id"]: row for row in found if row["prompt_id"] in wanted}
    return Questions(
        ids=[row["prompt_id"] for row in rows],
        prompts=[prompts[row["prompt_id"]]["messages"] for row in rows],
        references=[prompts[row["prompt_id"]]["reference"] for row in rows],
        before=[Output(row["text"], row["num_tokens"], row["finish_reason"] == "stop") for row in rows],
        decoding=decodings[decoding],
    )


def answers_of(
    job: PhaseJob,
    checkpoint: Checkpoint,
    engine: dict[str, Any],
    prompts: Sequence[Messages],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Output]:
    """The task of a look: answers of a checkpoint's model, by an engine with vLLM's arguments of the student."""
    from plad_dist.training.checkpoints.snapshot import write_snapshot  # it needs torch, which the driver does without

    with ScratchDir(job.staging, _FOLDER) as folder:
        write_snapshot(job, checkpoint, folder / "model")
        return asyncio.run(_answers(str(folder / "model"), job, engine, prompts, decoding, seeds))


async def _answers(
    folder: str,
    job: PhaseJob,
    engine: dict[str, Any],
    prompts: Sequence[Messages],
    decoding: Decoding,
    seeds: Sequence[int],
) -> list[Output]:
    running = Engine(folder, job.settings, engine, job.seed)

    async def answer(index: int, prompt: Any) -> Output:
        if isinstance(prompt, Exception):  # the template cannot render it
            return Output("", 0, finished=False)
        try:
            found = await running.complete(prompt, decoding, seeds[index], str(index))
        except RefusedPromptError:
            return Output("", 0, finished=False)
        return Output(found.text, found.num_tokens, found.finish_reason == "stop")

    try:
        rendered = running.render(prompts)
        return list(await asyncio.gather(*(answer(index, prompt) for index, prompt in enumerate(rendered))))
    finally:
        await running.close()


def figures(step: int, answers: Sequence[Output], questions: Questions) -> CheckpointProbe:
    """Figures of answers to the questions."""
    scores = [
        (rouge_l(reference, answer.text), rouge_l(reference, before.text))
        for reference, answer, before in zip(questions.references, answers, questions.before, strict=True)
        if reference and reference.strip()
    ]
    return CheckpointProbe(
        step=step,
        tokens=_mean([answer.num_tokens for answer in answers]),
        end_share=_mean([float(answer.finished) for answer in answers]),
        repetition=_mean([repetition(answer.text) for answer in answers]),
        win_rate=float(wins(*np.array(scores).T).mean()) if scores else None,
    )


def judged(found: CollapseRecord, bounds: CollapseBounds, is_there: Callable[[int], bool]) -> CollapseRecord:
    """The same with its verdict: what the latest look is out of, and the latest checkpoint that is there and was sound."""
    wrong = {look.step: out_of(look, found.start, bounds) for look in found.probes}
    sound = [step for step, why in wrong.items() if why is None and is_there(step)]
    return replace(
        found,
        sound=sound[-1] if sound else None,
        collapse=wrong[found.probes[-1].step] if found.probes else None,
    )


def out_of(look: CheckpointProbe, start: CheckpointProbe, bounds: CollapseBounds) -> str | None:
    """The first bound that a look is out of, in words; None for none."""
    if bounds.min_end_share is not None and look.end_share < bounds.min_end_share * start.end_share:
        return (
            f"at step {look.step} {look.end_share:.0%} of its answers end by themselves, {start.end_share:.0%} did at the start "
            f"(training.watch.min_end_share={bounds.min_end_share:g})"
        )
    if bounds.max_length_ratio is not None and look.tokens > bounds.max_length_ratio * max(1.0, start.tokens):
        return (
            f"at step {look.step} an answer has {look.tokens:.1f} tokens, {start.tokens:.1f} at the start "
            f"(training.watch.max_length_ratio={bounds.max_length_ratio:g})"
        )
    if bounds.max_repetition is not None and look.repetition > start.repetition + bounds.max_repetition:
        return (
            f"at step {look.step} {look.repetition:.0%} of the word 3-grams of an answer are repeated, {start.repetition:.0%} at "
            f"the start (training.watch.max_repetition={bounds.max_repetition:g})"
        )
    if bounds.min_win_rate is not None and look.win_rate is not None and look.win_rate < bounds.min_win_rate:
        return (
            f"at step {look.step} it wins {look.win_rate:.0%} against the student that it started from "
            f"(training.watch.min_win_rate={bounds.min_win_rate:g})"
        )
    return None


def told(look: CheckpointProbe) -> str:
    """A look in words."""
    wins = "" if look.win_rate is None else f", wins {look.win_rate:.0%} against the start"
    return (
        f"step {look.step}: {look.tokens:.1f} tokens an answer, {look.end_share:.0%} end by themselves, repetition "
        f"{look.repetition:.2f}{wins}"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
