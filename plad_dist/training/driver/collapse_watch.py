"""Collapse watch: probes of the latest checkpoint while a round trains, on free resources.

A probe is a Ray task. It builds the model of the latest checkpoint from its files, starts the
student's engine on it, and responds to a few held-out prompts. The trainer neither waits nor
gathers anything, and between probes the resources are free for others. The driver judges the
figures; the trainer reads the verdict when it next prunes its checkpoints.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray

from plad_dist.compat.ray_scaling import node_resources
from plad_dist.config import CollapseBounds, Config
from plad_dist.data.models import model_fingerprint
from plad_dist.errors import first_line
from plad_dist.fleet.placement import Placement
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir, round_of
from plad_dist.sampling.engine_choice import chosen_engine
from plad_dist.sampling.engine_placement import engine_environment, engines_use_gpus, place
from plad_dist.sampling.job import sample_seed
from plad_dist.text_metrics import Output
from plad_dist.training.checkpoints.store import Checkpoint, CheckpointStore
from plad_dist.training.driver.collapse_verdict import describe, judge, measure
from plad_dist.training.driver.probe_prompts import ProbePrompts, read_probe_prompts
from plad_dist.training.driver.probe_task import generate_from_checkpoint
from plad_dist.training.job import PhaseJob
from plad_dist.training.records.collapse import CollapseRecord, read_collapse_record

logger = logging.getLogger("plad")

_POLL_S, _LONGEST_PAUSE_S = 5.0, 300.0
_SEED_ROUND = -4  # keeps these seeds apart from those of other samples


@contextmanager
def watching(jobs: Sequence[PhaseJob], config: Config, run: RunDir, mailbox: Any, progress: Progress) -> Iterator[None]:
    """Watch the rounds among the phases while the block runs, if `training.watch` is set.

    Args:
        mailbox: mailbox of the workers, which reports if they take steps.
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
        thread.join(timeout=2 * _POLL_S)


class CollapseWatch:
    """Watch of the rounds of one command.

    Attributes:
        ended: set to end the watch.
    """

    def __init__(self, jobs: list[PhaseJob], config: Config, run: RunDir, mailbox: Any, progress: Progress) -> None:
        self._jobs, self._config, self._run, self._mailbox, self._progress = jobs, config, run, mailbox, progress
        self.ended = threading.Event()
        self._prompts: dict[str, ProbePrompts] = {}  # by phase
        self._probed_steps: dict[str, int] = {}  # latest step by phase, even if its probe failed
        self._has_reported_no_room = False

    def follow(self) -> None:
        """Probe new checkpoints until the watch is ended.

        Training does not depend on the watch: an error is logged, and the next checkpoint is
        probed.
        """
        pause, is_rejudged = _POLL_S, False
        while not self.ended.wait(pause):
            try:
                if not is_rejudged:
                    self._rejudge()
                is_rejudged = True
                self._probe_newest()
                pause = _POLL_S
            except Exception as error:  # noqa: BLE001 - the thread must survive every failure
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                logger.warning("watch: %s", first_line(error))

    def _rejudge(self) -> None:
        """Judge the records of earlier commands again, and write them back.

        The bounds of the config may have changed since, and checkpoints may be gone. A probe that
        an earlier command left unfinished is dropped.
        """
        for job in self._jobs:
            record = read_collapse_record(self._run.storage, job.name, job.fingerprint)
            if record is not None:
                self._write(job, replace(record, probing=None))

    def _write(self, job: PhaseJob, record: CollapseRecord) -> CollapseRecord:
        """Judge a record and write it."""
        assert job.watch is not None
        record = judge(record, job.watch, _store(job).is_committed)
        record.write(self._run.storage, job.name)
        return record

    def _probe_newest(self) -> None:
        """Probe the newest checkpoint of the present round, if it is new and a node has room."""
        storage = self._run.storage
        job = self._present_job()
        if job is None or job.watch is None:
            return
        record = read_collapse_record(storage, job.name, job.fingerprint)
        checkpoint = self._unprobed_checkpoint(job, record)
        if checkpoint is None or not self._trains() or not self._has_room():
            return
        step = checkpoint.state.step
        self._probed_steps[job.name] = step
        prompts = self._prompts_of(job, job.watch)
        if not prompts.ids:
            return
        record = record or CollapseRecord(job.fingerprint, start=measure(0, prompts.start_outputs, prompts))
        self._write(job, replace(record, probing=step))
        outputs = None
        try:
            outputs = self._generate(job, checkpoint, prompts) if _store(job).is_committed(step) else None
        finally:
            record = read_collapse_record(storage, job.name, job.fingerprint)
            if record is not None and record.probing != step:  # another command watches now
                record = None
            if record is not None and outputs is None:  # the checkpoint may be pruned now
                self._write(job, replace(record, probing=None))
        if record is None or outputs is None:
            return
        probe = measure(step, outputs, prompts)
        record = self._write(job, replace(record, probes=[*record.probes, probe], probing=None))
        self._progress.say(f"watch {job.name}: {describe(probe)}; {record.collapse or 'sound'}")

    def _present_job(self) -> PhaseJob | None:
        """Return the first round without a model, or None."""
        return next(
            (job for job in self._jobs if model_fingerprint(self._run.model(job.name)) != job.fingerprint), None
        )

    def _unprobed_checkpoint(self, job: PhaseJob, record: CollapseRecord | None) -> Checkpoint | None:
        """Return the newest checkpoint, or None if it was probed or the round has collapsed."""
        newest, _ = _store(job).newest()
        if newest is None or (record is not None and record.collapse is not None):
            return None
        recorded = record.probes[-1].step if record is not None and record.probes else 0
        latest_probed = max(self._probed_steps.get(job.name, 0), recorded)
        return newest if newest.state.step > latest_probed else None

    def _trains(self) -> bool:
        """Return True if the workers take steps.

        Before that and during restarts, free resources are theirs.
        """
        return bool(ray.get(self._mailbox.takes_steps.remote(), timeout=30))

    def _has_room(self) -> bool:
        """Return True if one node has room for an engine of the student beside the trainer."""
        placement = self._placement
        need = {"CPU": placement.cpus, "GPU": placement.gpus}
        has_room = not placement.bundles and any(
            all(node.free.get(name, 0.0) >= amount for name, amount in need.items())
            for node in node_resources().values()
        )
        if not has_room and not self._has_reported_no_room:
            self._has_reported_no_room = True
            self._progress.say(f"watch: no node has {placement} free beside the trainer; probes start when one has")
        return has_room

    @property
    def _placement(self) -> Placement:
        student = self._config.sampling.student
        return place(student.engine, student.cpus, has_gpus=engines_use_gpus())

    def _prompts_of(self, job: PhaseJob, watch: CollapseBounds) -> ProbePrompts:
        if job.name not in self._prompts:
            number = round_of(job.name) or 0
            self._prompts[job.name] = read_probe_prompts(self._config, self._run, number, watch.prompts)
        return self._prompts[job.name]

    def _generate(self, job: PhaseJob, checkpoint: Checkpoint, prompts: ProbePrompts) -> list[Output] | None:
        """Return the responses of a checkpoint's model.

        Returns:
            None if they took too long, the watch ends, or the trainer needs the resources.
        """
        config, student, placement = self._config, self._config.sampling.student, self._placement
        seeds = [sample_seed(config.run.seed, _SEED_ROUND, "student", id_, 0) for id_ in prompts.ids]
        engine = chosen_engine(config.student, student.engine)
        task = ray.remote(max_calls=1, max_retries=0)(generate_from_checkpoint).options(
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            runtime_env={"env_vars": engine_environment(student.cpus, has_gpus=engines_use_gpus())},
        )
        running = task.remote(replace(job, mailbox=None), checkpoint, engine, prompts.prompts, prompts.decoding, seeds)
        until = time.monotonic() + config.sampling.engine_start_timeout_s + config.sampling.stall_timeout_s
        has_ended = False
        try:
            while not (has_ended := bool(ray.wait([running], timeout=1.0)[0])):
                if self.ended.is_set() or time.monotonic() > until or not self._trains():
                    return None
            outputs: list[Output] = ray.get(running)
            return outputs
        finally:
            if not has_ended:  # Ray may abort this process over a cancelled task whose result it is storing
                ray.cancel(running, force=True)


def _store(job: PhaseJob) -> CheckpointStore:
    return CheckpointStore(job.checkpoints, job.name, job.fingerprint)
