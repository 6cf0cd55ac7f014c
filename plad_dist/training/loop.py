"""What each training worker runs: DeepSpeed ZeRO-3 over the global steps of one phase."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from plad_dist.config import Model, Optimizer, Phase
from plad_dist.data.models import load_model_config
from plad_dist.data.storage import Storage
from plad_dist.training.batching import Group, MicroBatch, collate, share_out, step_groups
from plad_dist.training.checkpoints import Checkpoints, TrainState
from plad_dist.training.export import export_model
from plad_dist.training.groups import DataSpec, GroupSource, open_groups
from plad_dist.training.losses import group_losses
from plad_dist.training.metrics import MetricsLog, StepTotals
from plad_dist.training.policy import Policy, check_trainable, without_dropout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseJob:
    """Everything that a worker needs to know. Plain values.

    Attributes:
        name: of the phase; its folders under checkpoints/, models/ and events/.
        start: folder or hub name of the model to start from.
        heldout: pairs that are ranked but not trained on; None for none.
        deepspeed: the DeepSpeed config, without batch, precision and optimizer.
        monitor: Ray actor that takes progress, None for none.
    """

    name: str
    start: str
    settings: Model
    phase: Phase
    data: DataSpec
    heldout: DataSpec | None
    heldout_limit: int
    seed: int
    steps: int
    deepspeed: dict[str, Any]
    dtype: str
    micro_batch_tokens: int
    gradient_checkpointing: bool
    storage: Storage
    fingerprint: str
    monitor: Any = None

    def folder(self, kind: str) -> Path:
        """The phase's folder of a kind (checkpoints, models, events)."""
        root = self.storage.local_root
        assert root is not None, "training needs a run directory on a file system"
        return root / kind / self.name


def train_loop(job: PhaseJob) -> None:
    """Train a phase from its newest checkpoint to its last step, then export the model."""
    torch.manual_seed(job.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    worker = Worker(job, device)
    try:
        worker.run()
    finally:
        worker.engine.destroy()


class Worker:
    """One rank of a phase."""

    def __init__(self, job: PhaseJob, device: torch.device) -> None:
        self.job, self.device = job, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.groups = open_groups(job.data, job.storage, job.start, job.settings)
        self.engine = build_engine(job, device)
        self.checkpoints = Checkpoints(job.folder("checkpoints"), job.fingerprint, job.phase.keep_checkpoints)
        self.state = TrainState(0, 0, 0, self.world, job.fingerprint)

    def run(self) -> None:
        """The phase from where it stands to its end."""
        job = self.job
        found = self.checkpoints.latest()
        if found is not None:
            self.checkpoints.load(self.engine, found)
            self.state = found
        log = MetricsLog(job.folder("events"), self.state.step, job.steps, job.monitor) if self.rank == 0 else None
        if log is not None:
            log.begin(self._partition_report())
        if found is None:
            self._rank_heldout(log)
        while self.state.step < job.steps:
            self._step(log)
            if self.state.step % job.phase.checkpoint_every == 0 or self.state.step == job.steps:
                self.checkpoints.save(self.engine, self.state)
        self._rank_heldout(log)
        export_model(self.engine, job, self.state)
        if log is not None:
            log.close()

    # -- one global step

    def _step(self, log: MetricsLog | None) -> None:
        started = time.monotonic()
        job, step = self.job, self.state.step
        indices = step_groups(len(self.groups), job.phase.batch_groups, job.seed, step)
        groups = self.groups.take(indices)
        shares = share_out(groups, job.micro_batch_tokens, self.world)[self.rank]
        rate = learning_rate_factor(job.phase.optimizer, step, job.steps)
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = parameters["initial_lr"] * rate
        totals = StepTotals()
        self.engine.train()
        for number, share in enumerate(shares):
            self.engine.set_gradient_accumulation_boundary(number == len(shares) - 1)
            self._micro_step([groups[index] for index in share], len(groups), totals)
        tokens = int(totals.reduce(self.device)["tokens"])
        self.state = TrainState(
            step + 1, self.state.groups + len(groups), self.state.tokens + tokens, self.world, job.fingerprint
        )
        if log is not None:
            figures = totals.figures() | {
                "lr": job.phase.optimizer.lr * rate,
                "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
                "tokens_per_s": tokens / (time.monotonic() - started),
                "seconds": time.monotonic() - started,
            }
            log.step(self.state, figures)

    def _micro_step(self, groups: list[Group], global_groups: int, totals: StepTotals) -> None:
        batch = collate(groups, filler=0).to(self.device)
        logps_BK = self.engine(batch)
        if batch.groups:
            losses_B = group_losses(self.job.phase.loss, logps_BK, batch.lengths_BK)
            loss = losses_B.sum()
            totals.add(self.job.phase.loss, batch, logps_BK.detach(), losses_B.detach())
        else:
            loss = logps_BK.sum() * 0.0
        # DeepSpeed means over ranks; the gradient wanted is the mean over the groups of all ranks.
        self.engine.backward(loss * (self.world / global_groups))
        self.engine.step()

    # -- held-out pairs

    @torch.no_grad()
    def _rank_heldout(self, log: MetricsLog | None) -> None:
        """How well held-out pairs are ranked by sequence log-likelihood."""
        job = self.job
        if job.heldout is None:
            return
        source: GroupSource = open_groups(job.heldout, job.storage, job.start, job.settings)
        count = min(len(source), job.heldout_limit)
        if not count:
            return
        groups = source.take(np.arange(count))
        totals = StepTotals()
        self.engine.eval()
        for share in share_out(groups, job.micro_batch_tokens, self.world)[self.rank]:
            batch: MicroBatch = collate([groups[index] for index in share], filler=0).to(self.device)
            logps_BK = self.engine(batch)
            if batch.groups:
                totals.add(job.phase.loss, batch, logps_BK, torch.zeros(batch.groups, device=self.device))
        totals.reduce(self.device)
        if log is not None:
            log.heldout(self.state.step, count, totals.figures())

    def _partition_report(self) -> str:
        """One line that shows how the parameters are really partitioned."""
        parameters = list(self.engine.module.parameters())
        total = sum(parameter.ds_numel for parameter in parameters)
        held = sum(parameter.ds_tensor.numel() for parameter in parameters)
        stage = self.engine.zero_optimization_stage()
        return (
            f"zero stage {stage} with {self.world} ranks; {total:,} parameters, this rank holds "
            f"{held:,} ({held / total:.0%}); step {self.state.step} of {self.job.steps}; {len(self.groups):,} groups"
        )


# ------------------------------------------------------------------------------------------------------------ pieces


def build_engine(job: PhaseJob, device: torch.device) -> Any:
    """The DeepSpeed engine of a phase. Under ZeRO-3 the model is partitioned while it loads."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    model_config = load_model_config(job.start, job.settings)
    check_trainable(model_config, job.name)
    half = job.dtype == "bfloat16"
    optimizer = job.phase.optimizer
    zero = dict(job.deepspeed["zero_optimization"])
    if optimizer.name == "muon":
        zero["reduce_scatter"] = False  # Muon needs whole gradients
    config = job.deepspeed | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_norm,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": optimizer_section(optimizer),
        "steps_per_print": 10**9,
    }
    partition_at_load = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(
        job.start,
        config=without_dropout(model_config),
        revision=job.settings.revision,
        trust_remote_code=job.settings.trust_remote_code,
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation="sdpa",
    )
    del partition_at_load
    model.config.use_cache = False
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = Policy(model)
    engine, *_ = deepspeed.initialize(model=policy, config=config, model_parameters=policy.parameters())
    for parameters in engine.optimizer.param_groups:
        parameters["initial_lr"] = parameters["lr"]
    return engine


def optimizer_section(optimizer: Optimizer) -> dict[str, Any]:
    """The DeepSpeed section of an optimizer."""
    adam = {"betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "muon":
        rates = {"muon_lr": optimizer.lr, "adam_lr": optimizer.adam_lr or optimizer.lr}
        return {"type": "Muon", "params": adam | rates}
    return {"type": "AdamW", "params": adam | {"lr": optimizer.lr, "torch_adam": True}}


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
