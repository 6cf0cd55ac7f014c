"""Training of one phase on one rank: global steps, evaluations, checkpoints, export.

All ranks run this loop in lockstep, since every collective must be called by all of them in the
same order. Decisions that depend on one rank's clock, storage or driver travel to the others with
the sums of a step (:class:`StepSignals`) or by a broadcast from the first rank.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from plad_dist.data.models import load_model_config
from plad_dist.errors import RunFailed
from plad_dist.timeline import StartClock
from plad_dist.training.agreement import StoppedError, agreed, check_on_every_rank, from_rank_zero
from plad_dist.training.batches.groups import open_groups
from plad_dist.training.checkpoints.attempts import claim
from plad_dist.training.checkpoints.export import export_model
from plad_dist.training.checkpoints.resuming import CheckpointReader, optimizer_of, precision_of
from plad_dist.training.checkpoints.saving import Checkpoints
from plad_dist.training.checkpoints.store import CheckpointStore, DamagedCheckpoint, TrainState
from plad_dist.training.job import PhaseJob
from plad_dist.training.model.engine import build_engine
from plad_dist.training.records.collapse import CollapseRecord
from plad_dist.training.worker.attempt_guard import ATTEMPTS, stop_if_stalled, stop_if_superseded
from plad_dist.training.worker.collapse import read_collapse, read_record
from plad_dist.training.worker.divergence import Divergence, find_gradient_divergence, find_loss_divergence
from plad_dist.training.worker.export_choice import choose_export
from plad_dist.training.worker.gradient import GroupLosses, update_weights
from plad_dist.training.worker.heldout import HeldoutEvaluation, is_out_of_patience, with_evaluation
from plad_dist.training.worker.initial_logps import needs_starting_weights, write_initial_logps
from plad_dist.training.worker.metrics_log import MetricsLog
from plad_dist.training.worker.partition_report import partition_report
from plad_dist.training.worker.preemption import PreemptionNotices
from plad_dist.training.worker.schedule import learning_rate_factor
from plad_dist.training.worker.signals import StepSignals
from plad_dist.training.worker.speed import Speed
from plad_dist.training.worker.step_data import RankShare, StepLoader
from plad_dist.training.worker.step_totals import StepTotals


def train_loop(job: PhaseJob, clock: StartClock | None = None) -> None:
    """Train a phase from its newest checkpoint to its last step, then export the model.

    Args:
        clock: clock of this start; None if it begins here.

    A stop that a retry would only repeat is not raised: the first rank writes its reason to
    `job.stopped_key`, where the driver finds it.
    """
    torch.manual_seed(job.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    worker = None
    try:
        with agreed():
            worker = Worker(job, device, clock)
        worker.run()
    except StoppedError as stop:
        if worker is not None:
            worker.checkpoints.drain()
        if dist.get_rank() == 0:
            text = json.dumps({"message": str(stop), "by_user": stop.by_user})
            job.storage.replace(job.stopped_key, text.encode())
        dist.barrier()
    finally:
        if worker is not None:
            worker.close()


class Worker:
    """One rank of a phase.

    Attributes:
        state: progress of training, identical on all ranks.
        log: metrics log, on the first rank after :meth:`open_log`.
    """

    def __init__(self, job: PhaseJob, device: torch.device, clock: StartClock | None = None) -> None:
        self.job, self.device, self._clock = job, device, clock or StartClock()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # First, so that every failure from here on is counted, and earlier attempts stop writing.
        self.attempt = from_rank_zero(lambda: claim(job.storage, f"events/{job.name}/{ATTEMPTS}", job.launch))
        stop_if_stalled(job, self.attempt, None)
        check_on_every_rank(lambda: load_model_config(job.start, job.settings))
        from plad_dist.compat.deepspeed import release_engine  # not at the top: importing DeepSpeed takes seconds

        store = CheckpointStore(job.checkpoints, job.name, job.fingerprint)
        self.reader = CheckpointReader(store, self.attempt, job.staging, only_trained=job.lora is not None)
        self._damage: list[str] = []
        self._resumed = self.reader.newest(self._damage.append)
        self._clock.end("checkpoint")
        from_checkpoint = self.reader.fills_model(self._resumed) and not needs_starting_weights(job)
        self.engine, self._release_engine = build_engine(job, device, from_checkpoint=from_checkpoint), release_engine
        self._clock.end("model")
        self.checkpoints = Checkpoints(
            store,
            self.attempt,
            job.phase.keep_checkpoints,
            job.staging,
            only_trained=job.lora is not None,
            read_collapse_record=lambda: read_record(job),
        )
        self.state = TrainState(
            0, 0, 0, self.world, job.fingerprint,
            stage=self.engine.zero_optimization_stage(),
            optimizer=optimizer_of(self.engine), dtype=precision_of(self.engine),
        )  # fmt: skip
        self.log: MetricsLog | None = None
        self._speed = Speed(self.engine.module, device)
        self._notices = PreemptionNotices(job.mailbox)
        self._steps: StepLoader | None = None
        self._heldout: HeldoutEvaluation | None = None
        self._collapse: CollapseRecord | None = None
        self._has_started = False
        self._is_save_due = False  # while the upload of the previous checkpoint delays the next one
        self._saved_at, self._step_seconds = time.monotonic(), 0.0

    def run(self) -> None:
        """Train the phase to its end and export the model.

        Raises:
            StoppedError: training must not continue, and a retry would end the same way.
        """
        self.open_data()
        self._clock.end("data")
        damaged = self.resume()
        self._clock.end("checkpoint")
        self.open_log()
        self._report_start(damaged)
        if self.state.step == 0:
            self.evaluate()
            self._clock.end("evaluation")
        self._saved_at = time.monotonic()
        self._collapse = from_rank_zero(lambda: read_collapse(self.job))
        while not self._is_finished:
            signals = self.train_step()
            self._report_first_step()
            is_best = self._evaluate_if_due()
            self._save_if_due(signals, is_best=is_best)
            self._obey(signals)
        if self._is_out_of_patience:
            self._say(f"stopped at step {self.state.step}: no improvement in {self.job.phase.patience} evaluations")
        if self._collapse is None:
            self.evaluate()
        self.settle()
        # The last probe may have found a collapse after the last step.
        self._collapse = self._collapse or from_rank_zero(lambda: read_collapse(self.job))
        self._export()

    def close(self) -> None:
        """Release the engine, the threads and the files."""
        if self._steps is not None:
            self._steps.close()
        self.checkpoints.close()
        engine = self.engine
        del self.engine
        self._release_engine(engine)
        del engine
        gc.collect()  # parameters and their optimizer refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.log is not None:
            self.log.close()

    @property
    def _is_last_step_taken(self) -> bool:
        return self.state.step == self.job.steps or self._is_out_of_patience

    @property
    def _is_finished(self) -> bool:
        return self.state.step >= self.job.steps or self._is_out_of_patience or self._collapse is not None

    @property
    def _is_out_of_patience(self) -> bool:
        return is_out_of_patience(self.state, self.job.phase)

    # -- start

    def open_data(self) -> None:
        """Open the groups of the phase.

        If the loss compares with the starting student, compute its log-probabilities first.
        """
        job = self.job
        data, heldout = job.data, job.heldout
        if job.phase.loss.needs_initial_logps:
            with agreed():
                data = write_initial_logps(data, job, self.engine, self.device)
                heldout = write_initial_logps(heldout, job, self.engine, self.device) if heldout else None
        share = RankShare(self.engine.module.attention.layout, job.micro_batch_tokens, self.rank, self.world)
        self._steps = StepLoader(job, open_groups(data, job.storage, job.start, job.settings), share)
        heldout_groups = open_groups(heldout, job.storage, job.start, job.settings) if heldout else None
        self._heldout = HeldoutEvaluation(job, heldout_groups, share, self.device)

    def resume(self) -> list[str]:
        """Load the newest sound checkpoint, if any.

        Returns:
            A line for each damaged checkpoint that was skipped.
        """
        if self._resumed is not None:
            with agreed():
                self.reader.load(self.engine, self._resumed)
            self.state = self._resumed.state
        if self.rank == 0:
            self.attempt.began_at(self.state.step)
        stop_if_stalled(self.job, self.attempt, self.state.step)
        return self._damage

    def open_log(self) -> None:
        """Open the metrics log on the first rank."""
        job = self.job
        if self.rank == 0:
            self.log = MetricsLog(
                job.folder("events"), self.state.step, job.steps, job.mailbox, job.trackers, job.storage.url,
                self.attempt.number,
            )  # fmt: skip

    def _report_start(self, damaged: list[str]) -> None:
        if self.log is None:
            return
        for line in damaged:
            self.log.report(line)
        assert self._steps is not None
        self.log.report_start(
            partition_report(
                self.engine,
                world=self.world,
                step=self.state.step,
                steps=self.job.steps,
                groups=self._steps.number_of_groups,
            )
        )

    def _report_first_step(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._clock.end("first step")
            if self.log is not None:
                self.log.write_start(self.state.step, self._clock.parts)

    # -- one global step

    def train_step(self) -> StepSignals:
        """Take one global step; return the signals of all ranks, to be obeyed after it.

        Raises:
            StoppedError: the loss or the gradient diverged, or a group cannot be trained on.
        """
        assert self._steps is not None, "open_data() comes first"
        started = time.monotonic()
        job, step = self.job, self.state.step
        data = self._steps.load(step)
        input_wait = time.monotonic() - started
        rate = learning_rate_factor(job.phase.optimizer, step, job.steps)
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = parameters["initial_lr"] * rate
        totals = update_weights(self.engine, data, job.phase.loss, self.device, self.world, self._check_step)
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        self._stop_if_diverged(find_gradient_divergence(norm, data.group_names))
        self.state = replace(
            self.state,
            step=step + 1,
            groups=self.state.groups + len(data.group_names),
            tokens=self.state.tokens + int(totals.sums["tokens"]),
            workers=self.world,
        )
        if self.log is not None:
            seconds = time.monotonic() - started
            figures = self._figures(totals, seconds) | {
                "lr": job.phase.optimizer.lr * rate,
                "grad_norm": norm,
                "seconds": seconds,
                "checkpoint_seconds": self.checkpoints.stall_seconds,
                "input_wait_share": input_wait / seconds,
                "groups_dropped": float(self._steps.changed_groups["dropped"]),
                "groups_cut": float(self._steps.changed_groups["cut"]),
                "groups_with_control_tokens": float(self._steps.changed_groups["control_token"]),
            }
            self.log.write_step(self.state, figures)
        self.checkpoints.stall_seconds, self._step_seconds = 0.0, time.monotonic() - started
        return totals.signals

    def _check_step(self, totals: StepTotals, losses: list[GroupLosses]) -> None:
        """Exchange sums and signals with all ranks; stop before the update if the loss diverged."""
        totals.reduce(self._own_signals())
        first = self.state.first or totals.figures()
        self._stop_if_diverged(find_loss_divergence(totals, first, self.job.divergence_factor, losses))
        self.state = replace(self.state, first=first)

    def _figures(self, totals: StepTotals, seconds: float) -> dict[str, float]:
        """Return the means, the drift of the likelihoods since the first step, and the rates."""
        figures, first = totals.figures(), self.state.first
        drift = {
            f"{name}_drift": figures[name] - first[name] for name in ("chosen_logp", "rejected_logp") if name in first
        }
        return figures | drift | self._speed.figures(totals.sums, seconds, self.world)

    def _stop_if_diverged(self, divergence: Divergence | None) -> None:
        if divergence is None:
            return
        if self.log is not None:
            self.log.report_divergence()
        self.checkpoints.drain()
        committed_step = self.checkpoints.committed_step()
        raise StoppedError(divergence.message(self.job.name, self.state.step + 1, committed_step))

    # -- evaluation

    def evaluate(self) -> bool:
        """Rank the held-out pairs; return True if the weights are the best so far."""
        assert self._heldout is not None, "open_data() comes first"
        ranking = self._heldout.rank_pairs(self.engine, self.state)
        if ranking is None:
            return False
        if self.log is not None:
            self.log.write_heldout(self.state.step, ranking.pairs, ranking.figures)
        self.state, is_best = with_evaluation(self.state, ranking.figures, self.job.phase)
        return is_best

    def _evaluate_if_due(self) -> bool:
        """Evaluate in the middle of the phase; the last step is evaluated after the loop."""
        every, step = self.job.phase.evaluate_every, self.state.step
        if every is None or step % every or step >= self.job.steps:
            return False
        return self.evaluate()

    # -- checkpoints

    def save(self) -> None:
        """Write a checkpoint on all ranks, which is committed in the background."""
        self.checkpoints.save(self.engine, self.state)
        self._saved_at, self._is_save_due = time.monotonic(), False

    def settle(self) -> None:
        """Wait for the commit of the latest checkpoint; end this attempt if it is superseded."""
        self.checkpoints.settle()
        stop_if_superseded(self.job, self.attempt, self.checkpoints)

    def _save_if_due(self, signals: StepSignals, *, is_best: bool) -> None:
        phase = self.job.phase
        self._is_save_due |= self.state.step % phase.checkpoint_every == 0 or signals.save
        is_required = self._is_last_step_taken or (is_best and phase.export == "best")
        if is_required or (self._is_save_due and not signals.upload_pending):
            self.save()

    def _own_signals(self) -> StepSignals:
        """Return the signals of this rank.

        Only the first rank consults the clock, the storage and the driver.
        """
        own = StepSignals(
            upload_pending=self.checkpoints.is_uploading, upload_failed=self.checkpoints.failure is not None
        )
        if self.rank:
            return own
        interval = self.job.phase.checkpoint_seconds
        notices = self._notices.poll(self.checkpoints.commit_seconds, self._step_seconds)
        return replace(
            own,
            save=interval is not None and time.monotonic() - self._saved_at >= interval,
            check_preemption=notices.check_preemption,
            leave=notices.leave,
            superseded=self.checkpoints.superseded is not None,
            collapsed=self.checkpoints.has_collapsed,
        )

    def _obey(self, signals: StepSignals) -> None:
        """Act on the signals of all ranks after a step."""
        if signals.upload_failed:
            failures: list[str | None] = [None] * self.world
            dist.all_gather_object(failures, self.checkpoints.failure)
            first_failure = next(filter(None, failures), None)
            raise RunFailed(f"phase {self.job.name}: a checkpoint could not be uploaded: {first_failure}")
        if signals.superseded:
            stop_if_superseded(self.job, self.attempt, self.checkpoints)
        if signals.collapsed:
            self._collapse = from_rank_zero(lambda: read_collapse(self.job))
        if self._is_last_step_taken or self._collapse is not None:
            return
        if signals.check_preemption and self._notices.check(self.log):
            self.save()
        if signals.leave:  # a further step would be lost
            self.save()
            self.settle()
            if self.rank == 0:
                self.attempt.leaves(self.state.step)
            self._notices.wait_for_restart(self.log, self.state.step)

    # -- end

    def _export(self) -> None:
        """Export the chosen weights as the model of the phase.

        Raises:
            StoppedError: no sound checkpoint is left after a collapse, or the chosen one is
                damaged.
        """
        choice = choose_export(self.job, self.state, self._collapse)
        if self._collapse is not None:
            self._say(f"stopped at step {self.state.step}: the student has collapsed: {self._collapse.collapse}")
        exported = self.state
        if choice.step is not None:
            try:
                checkpoint = self.reader.at(choice.step)
            except DamagedCheckpoint as error:
                raise StoppedError(
                    f"phase {self.job.name}: is trained, but the checkpoint of step {choice.step} cannot be exported: "
                    f"{error}. Repair the storage and run again, or use another run.dir"
                ) from None
            self.reader.load(self.engine, checkpoint)
            exported = self.state = checkpoint.state
            self._say(f"exports the {choice.quality} checkpoint, of step {choice.step}")
            self.evaluate()  # unless this step was evaluated: the report shows the figures of the model
        export_model(self.engine, self.job, exported, self.attempt)
        self.settle()

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.report(text)
