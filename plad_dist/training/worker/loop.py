"""What each training worker runs: DeepSpeed over the global steps of one phase."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from plad_dist.config import Optimizer
from plad_dist.data.models import load_model_config
from plad_dist.errors import RunFailed, UserError
from plad_dist.training.agreement import StoppedError, agreed, check_on_every_rank, from_rank_zero
from plad_dist.training.batches.groups import open_groups
from plad_dist.training.batches.micro_batch import Group, MicroBatch
from plad_dist.training.batches.packing import collate
from plad_dist.training.batches.schedule import assign_groups, step_groups
from plad_dist.training.checkpoints.attempts import claim
from plad_dist.training.checkpoints.export import export_model
from plad_dist.training.checkpoints.saving import Checkpoints, optimizer_of, precision_of
from plad_dist.training.checkpoints.store import CheckpointStore, DamagedCheckpoint, TrainState
from plad_dist.training.job import PhaseJob
from plad_dist.training.losses import group_losses
from plad_dist.training.model.engine import build_engine, release
from plad_dist.training.records.collapse import CollapseRecord, read_collapse_record
from plad_dist.training.worker.initial_logps import write_initial_logps
from plad_dist.training.worker.metrics import MetricsLog, StepSignals, StepTotals
from plad_dist.training.worker.notices import PreemptionNotices
from plad_dist.training.worker.speed import Speed

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts"
MAX_STALLS = 5  # attempts in a row that fail and get no further
_WORST = 3  # groups named where the loss has exploded


def train_loop(job: PhaseJob) -> None:
    """Train a phase from its newest checkpoint to its last step, then export the model.

    What would end alike again is not raised but left where the driver finds it: ``stopped_key`` of the job.
    """
    torch.manual_seed(job.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    worker = None
    try:
        with agreed():
            worker = Worker(job, device)
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


@dataclass(frozen=True)
class _Work:
    """One global step as one rank does it: its micro-batches, each with the names of its groups, and all groups."""

    micro_batches: list[tuple[MicroBatch, list[str]]]
    groups: int
    names: list[str]


class Worker:
    """One rank of a phase."""

    def __init__(self, job: PhaseJob, device: torch.device) -> None:
        self.job, self.device = job, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # First of all: whatever fails from here on is counted, and whoever worked on the phase before may not write any more.
        self.attempt = from_rank_zero(lambda: claim(job.storage, f"events/{job.name}/{ATTEMPTS}", job.launch))
        self._refuse_to_stall(None)
        check_on_every_rank(lambda: load_model_config(job.start, job.settings))
        self.engine = build_engine(job, device)
        self.layout = self.engine.module.attention.layout
        store = CheckpointStore(job.checkpoints, job.name, job.fingerprint)
        self.checkpoints = Checkpoints(
            store,
            self.attempt,
            job.phase.keep_checkpoints,
            job.staging,
            only_trained=job.lora is not None,
            watched=self._watched,
        )
        self.state = TrainState(
            0, 0, 0, self.world, job.fingerprint,
            stage=self.engine.zero_optimization_stage(), optimizer=optimizer_of(self.engine), dtype=precision_of(self.engine),
        )  # fmt: skip
        self.speed = Speed(self.engine.module, device)
        self._ahead = ThreadPoolExecutor(1, "groups")
        self._metrics: MetricsLog | None = None
        self._next: tuple[int, Future[_Work]] | None = None
        self._saved_at, self._step_seconds = time.monotonic(), 0.0
        self.notices = PreemptionNotices(job.mailbox)
        self._collapse: CollapseRecord | None = None

    def run(self) -> None:
        """The phase from where it stands to its end. Raises :class:`StoppedError`."""
        job, phase = self.job, self.job.phase
        self._open_groups()
        damaged = self._resume()
        log = self._log() if self.rank == 0 else None
        if log is not None:
            for line in damaged:
                log.say(line)
            log.begin(self._partition_report())
        if self.state.step == 0:
            self._evaluate(log)
        self._saved_at = time.monotonic()
        self._due = False  # a checkpoint, when the one before is on its way no longer
        self._collapse = from_rank_zero(self._found_collapsed)
        while self.state.step < job.steps and not self._exhausted and self._collapse is None:
            calls = self._step(log)
            step, best = self.state.step, False
            if phase.evaluate_every and step % phase.evaluate_every == 0 and step < job.steps:
                best = self._evaluate(log)
            last = step == job.steps or self._exhausted
            self._due |= step % phase.checkpoint_every == 0 or calls.save
            if last or (best and phase.export == "best") or (self._due and not calls.busy):
                self._save()
            self._heed(calls, log)
        if self._exhausted and log is not None:
            log.say(f"stopped at step {self.state.step}: nothing better in {phase.patience} evaluations")
        if self._collapse is None:
            self._evaluate(log)
        self._settle()
        self._collapse = self._collapse or from_rank_zero(self._found_collapsed)  # what was found at the last moment
        self._export(log)

    def close(self) -> None:
        """Give back everything."""
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self.checkpoints.close()
        engine = self.engine
        del self.engine
        release(engine)
        del engine
        gc.collect()  # parameters and their optimizer refer to one another
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._metrics is not None:
            self._metrics.close()

    def _log(self) -> MetricsLog:
        job = self.job
        self._metrics = MetricsLog(
            job.folder("events"),
            self.state.step,
            job.steps,
            job.mailbox,
            job.trackers,
            job.storage.url,
            self.attempt.number,
        )
        return self._metrics

    def _open_groups(self) -> None:
        """Open the groups, and for losses that compare with the starting student make its log-likelihoods first."""
        job = self.job
        data, heldout = job.data, job.heldout
        if job.phase.loss.needs_initial_logps:
            with agreed():
                data = write_initial_logps(data, job, self.engine, self.device)
                heldout = write_initial_logps(heldout, job, self.engine, self.device) if heldout else None
        self.groups = open_groups(data, job.storage, job.start, job.settings)
        self.heldout = open_groups(heldout, job.storage, job.start, job.settings) if heldout else None

    # -- checkpoints and those who call for them

    def _resume(self) -> list[str]:
        """Go on from the newest whole checkpoint, where there is one. Returns what is to be said of those that are not whole."""
        damaged: list[str] = []
        with agreed():
            found = self.checkpoints.newest(damaged.append)
            if found is not None:
                self.checkpoints.load(self.engine, found)
                self.state = found.state
        if self.rank == 0:
            self.attempt.began_at(self.state.step)
        self._refuse_to_stall(self.state.step)
        return damaged

    def _refuse_to_stall(self, step: int | None) -> None:
        """Raise :class:`StoppedError` on all ranks where attempt after attempt fails and gets no further than a step."""
        failures = from_rank_zero(lambda: self.attempt.failures_before(step))
        if failures >= MAX_STALLS:
            where = (
                "before they had loaded the model" if step is None else f"before the first checkpoint after step {step}"
            )
            raise StoppedError(
                f"phase {self.job.name}: {failures} attempts in a row have failed {where}; what was said of each above, and the "
                "workers' logs in Ray's session folder, say why. Where nodes leave that often, set checkpoint_every or "
                "checkpoint_seconds of the phase lower. Run again to go on."
            )

    def _wishes(self) -> StepSignals:
        """What this rank wants of all after this step."""
        mine = StepSignals(busy=self.checkpoints.busy, failed=self.checkpoints.failure is not None)
        if self.rank:
            return mine
        seconds = self.job.phase.checkpoint_seconds
        due = seconds is not None and time.monotonic() - self._saved_at >= seconds
        wishes = self.notices.wishes(self.checkpoints.commit_seconds, self._step_seconds)
        told = {"superseded": self.checkpoints.superseded is not None, "collapsed": self.checkpoints.collapsed}
        return replace(mine, save=due, **told, **wishes)

    def _save(self) -> None:
        self.checkpoints.save(self.engine, self.state)
        self._saved_at, self._due = time.monotonic(), False

    def _settle(self) -> None:
        """Wait for what was saved. Raises :class:`StoppedError` where a later attempt has taken over."""
        self.checkpoints.settle()
        self._refuse_if_superseded()

    def _refuse_if_superseded(self) -> None:
        by = from_rank_zero(lambda: self.checkpoints.superseded)
        if by == self.job.launch:
            raise RunFailed(f"phase {self.job.name}: attempt {self.attempt.number} is over: a later one has begun")
        if by is not None:
            raise StoppedError(
                f"phase {self.job.name}: another command has begun to work on {self.job.storage.url} and goes on from the latest "
                "checkpoint; this one ends, and writes nothing more"
            )

    def _heed(self, calls: StepSignals, log: MetricsLog | None) -> None:
        """Do what was called for after a step."""
        if calls.failed:
            why: list[str | None] = [None] * self.world
            dist.all_gather_object(why, self.checkpoints.failure)
            raise RunFailed(f"phase {self.job.name}: a checkpoint could not be carried away: {next(filter(None, why))}")
        if calls.superseded:
            self._refuse_if_superseded()
        if calls.collapsed:
            self._collapse = from_rank_zero(self._found_collapsed)
        if self.state.step == self.job.steps or self._exhausted or self._collapse is not None:
            return
        if calls.look and self.notices.look(log):
            self._save()
        if calls.leave:  # a step more would be lost
            self._save()
            self._settle()
            if self.rank == 0:
                self.attempt.leaves(self.state.step)
            self.notices.wait(log, self.state.step)

    # -- one global step

    def _step(self, log: MetricsLog | None) -> StepSignals:
        """Take a step. Returns what all ranks are to do after it."""
        started = time.monotonic()
        job, step = self.job, self.state.step
        work = self._work_of(step)
        waited = time.monotonic() - started
        rate = learning_rate_factor(job.phase.optimizer, step, job.steps)
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = parameters["initial_lr"] * rate
        totals = StepTotals(job.phase.loss, self.device)
        found: list[tuple[list[str], torch.Tensor]] = []
        self.engine.train()
        for number, (micro_batch, names) in enumerate(work.micro_batches):
            last = number == len(work.micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            losses_B = self._backward(micro_batch, work.groups, totals)
            if losses_B is not None:
                found.append((names, losses_B))
            if last:  # the weights are not touched before all ranks know that the step is sound
                totals.reduce(self._wishes())
                self._refuse_divergence(totals, found)
            self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise StoppedError(self._diverged(f"the gradient norm is {norm}", work.names))
        tokens = int(totals.sums["tokens"])
        self.state = replace(
            self.state,
            step=step + 1,
            groups=self.state.groups + work.groups,
            tokens=self.state.tokens + tokens,
            workers=self.world,
        )
        if log is not None:
            seconds = time.monotonic() - started
            figures = totals.figures()
            figures |= self._drift(figures) | self.speed.figures(totals.sums, seconds, self.world)
            figures |= {
                "lr": job.phase.optimizer.lr * rate,
                "grad_norm": norm,
                "seconds": seconds,
                "checkpoint_seconds": self.checkpoints.seconds,
                "input_wait_share": waited / seconds,
                "groups_dropped": float(self.groups.changed["dropped"]),
                "groups_cut": float(self.groups.changed["cut"]),
            }
            log.step(self.state, figures)
        self.checkpoints.seconds, self._step_seconds = 0.0, time.monotonic() - started
        return totals.calls

    def _backward(self, batch: MicroBatch, all_groups: int, totals: StepTotals) -> torch.Tensor | None:
        """One micro-batch forward and backward. Returns the losses of its groups, None where it has none."""
        batch = batch.to(self.device)
        logps_S = self.engine(batch)
        losses_B = None
        if batch.groups:
            losses_B = group_losses(self.job.phase.loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S)
            loss = losses_B.sum()
            losses_B = losses_B.detach()
            totals.add(batch, logps_S.detach(), losses_B)
        else:
            loss = logps_S.sum() * 0.0
        # DeepSpeed means over ranks; the gradient wanted is the mean over the groups of all ranks.
        self.engine.backward(loss * (self.world / max(1, all_groups)))
        return losses_B

    def _work_of(self, step: int) -> _Work:
        """The micro-batches of a step, which were made while the one before was computed."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._ahead.submit(self._prepare, step))
        with agreed():
            work = self._next[1].result()
        self._next = (step + 1, self._ahead.submit(self._prepare, step + 1)) if step + 1 < self.job.steps else None
        return work

    def _prepare(self, step: int) -> _Work:
        job = self.job
        groups = self.groups.take(step_groups(len(self.groups), job.phase.batch_groups, job.seed, step))
        micro_batches = [
            (collate(share, filler=0, layout=self.layout), [group.name for group in share])
            for share in self._share(groups)
        ]
        return _Work(micro_batches, len(groups), [group.name for group in groups])

    def _share(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups of this rank's micro-batches. Raises :class:`UserError` for a group that none can hold."""
        sizes = [self.layout.tokens(group) for group in groups]
        budget = self.job.micro_batch_tokens
        if sizes and max(sizes) > budget:
            name = groups[int(np.argmax(sizes))].name
            raise UserError(
                f"{name}: its group has {max(sizes):,} tokens, more than training.micro_batch_tokens={budget:,} holds. Raise it and "
                "run again: the phase goes on from its last checkpoint. In a new run training.max_group_tokens bounds groups"
            )
        return [[groups[index] for index in share] for share in assign_groups(sizes, budget, self.world)[self.rank]]

    # -- health

    def _drift(self, figures: dict[str, float]) -> dict[str, float]:
        """How far the likelihoods have moved since the first step."""
        first = self.state.first
        return {
            f"{name}_drift": figures[name] - first[name] for name in ("chosen_logp", "rejected_logp") if name in first
        }

    def _refuse_divergence(self, totals: StepTotals, losses: list[tuple[list[str], torch.Tensor]]) -> None:
        """Raise :class:`StoppedError` on all ranks where the loss is not a number or has exploded, before the weights change.

        Args:
            losses: of the groups of this rank, with their names; the worst are named.
        """
        figures, groups = totals.figures(), max(1.0, totals.sums["groups"])
        loss = figures["loss"]
        first = self.state.first or figures
        scale = max(abs(first["loss"]), totals.sums["chosen_tokens"] / groups, 1.0)
        if math.isfinite(loss) and loss <= self.job.divergence_factor * scale:
            self.state = replace(self.state, first=first)
            return
        own = [pair for names, losses_B in losses for pair in zip(losses_B.tolist(), names, strict=True)]
        found: list[list[tuple[float, str]]] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, own)
        all_losses = [pair for of_rank in found for pair in of_rank]
        broken = [name for loss, name in all_losses if not math.isfinite(loss)]
        names = broken or [name for _, name in sorted(all_losses, reverse=True)[:_WORST]]
        raise StoppedError(
            self._diverged(f"the loss is {loss:.6g}, at the first step it was {first['loss']:.6g}", names)
        )

    def _diverged(self, what: str, groups: list[str]) -> str:
        if self._metrics is not None:
            self._metrics.diverged()
        self.checkpoints.drain()
        kept = self.checkpoints.committed_step()
        shown = "".join(f"\n  {name}" for name in groups[:10]) + ("\n  ..." if len(groups) > 10 else "")
        return (
            f"phase {self.job.name}: step {self.state.step + 1}: {what}. The step was not taken. Kept: "
            f"{f'the checkpoint of step {kept}' if kept is not None else 'no checkpoint yet'}. Lower the learning rate, raise "
            f"mle_weight, or mend the data; then use another run.dir.{' Groups:' if groups else ''}{shown}"
        )

    # -- held-out pairs

    @torch.no_grad()
    def _evaluate(self, log: MetricsLog | None) -> bool:
        """Rank the held-out pairs and note whether the weights are the best so far, which is returned."""
        job = self.job
        count = min(len(self.heldout), job.heldout_limit) if self.heldout is not None else 0
        if self.heldout is None or not count or self.state.evaluated == self.state.step:
            return False
        with agreed():
            shares = self._share(self.heldout.take(np.arange(count)))
        totals = StepTotals(job.phase.loss, self.device)
        self.engine.eval()
        for share in shares:
            batch = collate(share, filler=0, layout=self.layout).to(self.device)
            logps_S = self.engine(batch)
            if batch.groups:
                losses_B = group_losses(job.phase.loss, batch.pairs, logps_S, batch.lengths_S, batch.initial_logps_S)
                totals.add(batch, logps_S, losses_B)
        totals.reduce()
        figures = totals.figures()
        if not totals.sums["pairs"]:  # all were over the bounds
            return False
        if log is not None:
            log.heldout(self.state.step, int(totals.sums["pairs"]), figures)
        return self._compare(figures)

    def _compare(self, figures: dict[str, float]) -> bool:
        """Whether the figures of an evaluation are the best so far."""
        value = {
            "pairs_ranked_right": figures.get("pair_accuracy", 0.0),
            "loss": -figures["loss"],
            "chosen_logp": figures["chosen_logp"],
        }[self.job.phase.best_by]
        state = replace(self.state, evaluated=self.state.step)
        if not math.isfinite(value):
            self.state = state
            return False
        better = state.best is None or value > state.best
        if self.state.step == 0:  # the start is no checkpoint of this phase
            better = False
        elif better:
            state = replace(state, best=value, best_step=state.step, stale=0)
        else:
            state = replace(state, stale=state.stale + 1)
        self.state = state
        return better

    @property
    def _exhausted(self) -> bool:
        patience = self.job.phase.patience
        return patience is not None and self.state.stale >= patience

    def _watched(self) -> CollapseRecord | None:
        """What watching has found, None where it does not watch."""
        job = self.job
        return None if job.watch is None else read_collapse_record(job.storage, job.name, job.fingerprint)

    def _found_collapsed(self) -> CollapseRecord | None:
        """The same where there is a collapse. Where that cannot be read, training goes on."""
        with contextlib.suppress(RunFailed):
            found = self._watched()
            return found if found is not None and found.collapse is not None else None
        return None

    def _to_export(self) -> int | None:
        """Step of the checkpoint that becomes the model, None for what is there now. Raises :class:`StoppedError`."""
        if self._collapse is None:
            return self.state.best_step if self.job.phase.export == "best" else None
        if self._collapse.sound is None:
            raise StoppedError(
                f"phase {self.job.name}: the student has collapsed: {self._collapse.collapse}; no checkpoint that is left was found to "
                "be sound. Set other bounds in training.watch and run again, or train in another run.dir with a lower optimizer.lr "
                "or a larger loss.mle_weight"
            )
        return self._collapse.sound

    def _export(self, log: MetricsLog | None) -> None:
        state, step = self.state, self._to_export()
        if log is not None and self._collapse is not None:
            log.say(f"stopped at step {state.step}: the student has collapsed: {self._collapse.collapse}")
        if step not in (None, state.step):
            try:
                best = self.checkpoints.at(step)
            except DamagedCheckpoint as error:
                raise StoppedError(
                    f"phase {self.job.name}: is trained, but the checkpoint of step {step} cannot be exported: {error}. Mend the storage "
                    "and run again, or use another run.dir"
                ) from None
            self.checkpoints.load(self.engine, best)
            state = self.state = best.state
            if log is not None:
                log.say(
                    f"exports the {'best' if self._collapse is None else 'latest sound'} checkpoint, of step {step}"
                )
            self._evaluate(log)  # unless it was: the report shows the figures of the model
        export_model(self.engine, self.job, state, self.attempt)
        self._settle()

    def _partition_report(self) -> str:
        """One line that shows how the parameters are really partitioned."""
        parameters = list(self.engine.module.parameters())
        total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
        held = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in parameters)
        stage = self.engine.zero_optimization_stage()
        why = self.engine.module.attention.no_sharing_reason
        resumes = "goes on from the checkpoint of " if self.state.step else ""
        return (
            f"zero stage {stage} with {self.world} ranks; {total:,} parameters, this rank holds "
            f"{held:,} ({held / total:.0%}); {resumes}step {self.state.step} of {self.job.steps}; {len(self.groups):,} groups"
            + (f"; responses do not share their prompt: {why}" if why else "")
        )


def learning_rate_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the schedule, down to a tenth of the peak."""
    warmup = round(optimizer.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - 0.9 * done
        case "cosine":
            return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
