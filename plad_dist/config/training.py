"""Losses, optimizers, phases, and how training is carried out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.values import Bound, FromList, OptionalBound, OptionalCount, PathText


class Loss(Section):
    """Objective of a phase. Formulas: docs/design.md."""

    name: Literal["rank", "margin", "listwise", "dpo", "ipo", "simpo", "cpo", "orpo", "mle"] = Field(
        "rank",
        description="Objective. rank, margin: calibrations of PLaD. listwise: ranking of all responses of a prompt by "
        "score. dpo, ipo, simpo, cpo, orpo: as in their papers. mle: negative log-likelihood.",
    )
    margin: float = Field(
        1.0,
        ge=0.0,
        description="Margin of the loss. rank: in nats. listwise: in nats per rank. margin: in nats per point of "
        "score difference. simpo: gamma of the paper. The other losses ignore it.",
    )
    beta: float | None = Field(
        None,
        gt=0.0,
        description="Strength of dpo, ipo (tau), simpo, cpo and orpo (lambda). If unset, 2 for simpo and 0.1 for the "
        "others.",
    )
    mle_weight: float | None = Field(
        None,
        ge=0.0,
        description="Weight of the anchor against collapse, -logp(chosen) summed over tokens. If unset, 1 for rank, "
        "margin, listwise and cpo (whose paper has it), and 0 for dpo, ipo, simpo and orpo.",
    )
    length_normalize: bool = Field(
        False,
        description="Use per-token means of the log-likelihoods. simpo and orpo always do. The anchor remains a sum.",
    )

    @property
    def anchor(self) -> float:
        """Weight of the anchor."""
        if self.mle_weight is not None:
            return self.mle_weight
        return 1.0 if self.name in ("rank", "margin", "listwise", "cpo") else 0.0

    @property
    def strength(self) -> float:
        """Value of `beta`, or the default of the loss if it is unset."""
        return self.beta if self.beta is not None else 2.0 if self.name == "simpo" else 0.1

    @property
    def per_token(self) -> bool:
        """True if the loss compares means per token."""
        return self.length_normalize or self.name in ("simpo", "orpo")

    @property
    def needs_initial_logps(self) -> bool:
        """True if the loss compares with the log-probabilities by the starting student."""
        return self.name in ("dpo", "ipo")

    @property
    def needs_scores(self) -> bool:
        """True if the loss depends on the scores of the responses."""
        return self.name in ("margin", "listwise")

    @property
    def hinge(self) -> float | None:
        """Log-likelihood gap beyond which a pair has no gradient; None for losses without one."""
        return self.margin if self.name in ("rank", "listwise") else None


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optimizer(Section):
    """AdamW (optionally with 8-bit states) or Muon, with linear warm-up and a schedule."""

    name: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="Optimizer. adamw_8bit: AdamW with 8-bit states by bitsandbytes, which take a quarter of the "
        "memory. It cannot be offloaded, and an elastic group cannot use it. muon: Muon for matrices, AdamW for the "
        "rest.",
    )
    lr: float = Field(1e-5, gt=0.0, le=1.0, description="Peak learning rate.")
    adam_lr: float | None = Field(
        None, gt=0.0, le=1.0, description="Peak learning rate of the AdamW part of muon. If unset, `lr`."
    )
    betas: Annotated[tuple[Beta, Beta], FromList] = Field(
        (0.9, 0.95), description="Decay rates of AdamW's first and second moments, each at least 0 and below 1."
    )
    eps: float = Field(1e-8, gt=0.0, description="Term that AdamW adds to the denominator for numerical stability.")
    weight_decay: float = Field(0.0, ge=0.0, description="Weight decay coefficient.")
    warmup_share: float = Field(
        0.05, ge=0.0, le=1.0, description="Share of the steps over which the learning rate rises to its peak."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine",
        description="Learning rate after warm-up. constant: the peak. linear, cosine: decay to a tenth of the peak.",
    )
    clip_norm: Bound = Field(
        1.0,
        gt=0.0,
        description="Maximum gradient norm. `.inf`: no bound. muon ignores it, since the size of its updates does not "
        "depend on the gradient norm.",
    )


class Phase(Section):
    """Training phase. A global step processes `batch_groups` groups on any number of workers."""

    epochs: float = Field(1.0, gt=0.0, description="Passes over the data of the phase.")
    max_steps: OptionalCount = Field(None, ge=1, description="Maximum number of steps. If unset or `.inf`, no limit.")
    batch_groups: int = Field(32, ge=1, description="Groups (a prompt and its responses) in a global batch.")
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.", json_schema_extra=OPERATIONAL)
    checkpoint_seconds: OptionalBound = Field(
        None,
        gt=0,
        description="Seconds since the last checkpoint after which one is also written. If unset or `.inf`, "
        "only checkpoint_every applies.",
        json_schema_extra=OPERATIONAL,
    )
    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="Number of newest checkpoints to keep, in addition to the best one.",
        json_schema_extra=OPERATIONAL,
    )
    evaluate_every: int | None = Field(
        None,
        ge=1,
        description="Steps between rankings of the held-out pairs. If unset, only before and after the phase. "
        "Available for the round and seqkd.",
    )
    best_by: Literal["pairs_ranked_right", "loss", "chosen_logp"] = Field(
        "pairs_ranked_right",
        description="Metric of the held-out pairs that selects the best checkpoint. loss: the lowest. "
        "pairs_ranked_right, chosen_logp: the highest.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Number of consecutive evaluations without improvement after which the phase stops. If unset, no "
        "early stopping. Needs evaluate_every.",
    )
    export: Literal["last", "best"] = Field(
        "last", description="Checkpoint whose weights become the model. best needs evaluate_every."
    )

    @model_validator(mode="after")
    def _check_evaluations(self) -> Phase:
        if self.evaluate_every is None and (self.patience is not None or self.export == "best"):
            raise ValueError("`patience` and `export: best` need `evaluate_every`")
        return self


class MlePhase(Phase):
    """Phase trained by maximum likelihood."""

    loss: Loss = Loss(name="mle")

    @field_validator("loss")
    @classmethod
    def _check_mle(cls, value: Loss) -> Loss:
        if value.name != "mle":
            raise ValueError("this phase has no pairs; set `name: mle`")
        return value


class Warmup(MlePhase):
    """Step 0: the student learns the task before it is sampled."""

    data: Literal["references", "teacher"] = Field(
        "references", description="Training data: the references, or the finished responses of the teacher."
    )


class Lora(Section):
    """Low-rank adapters of linear layers and experts, trained instead of the weights."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale of the adapters: their output is multiplied by alpha / r.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="Names of the layers to adapt, in peft's format. Can be empty with `target_parameters`.",
    )
    target_parameters: list[str] = Field(
        default=[],
        description="Names of the stacked experts to adapt, in peft's format, such as `experts.gate_up_proj`.",
    )
    save_adapter: bool = Field(
        False,
        description="Also write the adapter alone, to `adapter/` in the folder of the model, which holds the merged "
        "weights.",
    )


class CollapseBounds(Section):
    """Size and bounds of the collapse watch, which probes checkpoints while a round trains.

    In a probe, the latest checkpoint answers a few prompts on resources that are free at that time.
    A checkpoint outside a bound has collapsed. Training then stops, and the latest sound checkpoint
    becomes the model.
    """

    prompts: int = Field(32, ge=1, description="Number of held-out prompts in each checkpoint probe.")
    min_end_share: float | None = Field(
        0.5,
        ge=0.0,
        description="Minimum share of responses that end before the token limit, divided by the starting student's "
        "share. If unset, no bound.",
    )
    max_length_ratio: OptionalBound = Field(
        2.0,
        gt=0.0,
        description="Maximum mean length of a response, divided by the starting student's. If unset or `.inf`, no "
        "bound.",
    )
    max_repetition: float | None = Field(
        0.3,
        ge=0.0,
        le=1.0,
        description="Maximum share of repeated word 3-grams, minus the starting student's share. If unset, no bound.",
    )
    min_win_rate: float | None = Field(
        0.2,
        ge=0.0,
        le=1.0,
        description="Minimum win rate against the starting student by ROUGE-L, over prompts with references. If "
        "unset, no bound.",
    )


class Training(Section):
    """Steps 0 and 3: DeepSpeed ZeRO-3 under Ray Train."""

    num_workers: int | tuple[int, int] = Field(
        1,
        description="Number of workers, with one device each. [minimum, maximum], such as [2, 16], is an elastic "
        "group, which grows and shrinks with the cluster.",
        json_schema_extra=OPERATIONAL,
    )
    cpus_per_worker: float = Field(
        1.0, gt=0, description="CPU cores reserved for each worker.", json_schema_extra=OPERATIONAL
    )
    deepspeed: PathText = Field(
        "zero3",
        description="Name of a file in ds_configs/, or path to a DeepSpeed JSON file.",
        json_schema_extra=OPERATIONAL,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Data type of the model. auto: bfloat16 on GPU, float32 on CPU."
    )
    micro_batch_tokens: int = Field(
        8192,
        ge=16,
        description="Maximum number of tokens in a forward pass of one worker, padding included.",
        json_schema_extra=OPERATIONAL,
    )
    max_group_tokens: OptionalCount = Field(
        None,
        ge=16,
        description="Maximum number of tokens in a group (a prompt and all its responses). Where the responses do "
        "not share the prompt, each counts as much as the longest, with a copy of the prompt. If unset or `.inf`, no "
        "limit. A group over micro_batch_tokens is an error. Before the first step, all pairs are checked, and the "
        "longest references and teacher responses.",
    )
    over_long: Literal["fail", "drop", "truncate"] | None = Field(
        None,
        description="Action for a group over max_group_tokens, or with a sequence over the model's context length. "
        "truncate: cut the beginning of the prompt, then the ends of the responses. Dropped and truncated groups are "
        "counted. If unset, fail for pairs, and truncate for references and teacher responses.",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="Attention implementation. auto: FlexAttention on GPU, piecewise SDPA on CPU. sdpa: SDPA with a "
        "mask over whole rows. flex: FlexAttention. Some model families have their own implementation.",
        json_schema_extra=OPERATIONAL,
    )
    lora: Lora | None = Field(None, description="Train low-rank adapters. If unset, all weights are trained.")
    router_aux_loss: float = Field(
        0.0,
        ge=0.0,
        description="Factor of an auxiliary loss that balances the load of the experts in a mixture. 0: off.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass to save memory.",
        json_schema_extra=OPERATIONAL,
    )
    divergence_factor: Bound = Field(
        10.0,
        gt=1.0,
        description="Stop at the last checkpoint if the loss of a step is not a finite number, or exceeds this "
        "multiple of the loss of the first step. That loss counts as at least one nat per chosen token. `.inf`: no "
        "bound.",
        json_schema_extra=OPERATIONAL,
    )
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        default=[],
        description="Experiment trackers in addition to TensorBoard: `wandb`, `mlflow`. Their packages must be "
        "installed.",
        json_schema_extra=OPERATIONAL,
    )
    max_failures: int = Field(
        100,
        ge=-1,
        description="Maximum number of restarts after the death of a worker or its node, and of those after the death "
        "of a training process alone. -1: no limit. In any case, the run fails after five failures in a row without a "
        "new checkpoint.",
        json_schema_extra=OPERATIONAL,
    )
    max_preemptions: int = Field(
        -1,
        ge=-1,
        description="Maximum number of restarts after preemption notices. -1: no limit.",
        json_schema_extra=OPERATIONAL,
    )
    worker_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds without a reply to health checks after which a worker is considered dead. The group is "
        "then restarted.",
        json_schema_extra=OPERATIONAL,
    )
    collective_timeout_s: int = Field(
        900,
        ge=10,
        description="Timeout of collective operations between workers, in seconds.",
        json_schema_extra=OPERATIONAL,
    )
    resize_check_s: float = Field(
        5.0,
        gt=0,
        description="Seconds between checks of an elastic group for more room. The group grows if that gains more "
        "than a restart costs.",
        json_schema_extra=OPERATIONAL,
    )
    start_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds to wait for the resources of a worker group. After that, the available resources are "
        "checked again.",
        json_schema_extra=OPERATIONAL,
    )
    checkpoint_url: PathText | None = Field(
        None,
        min_length=1,
        description="Storage of the checkpoints: a path or a URI such as s3://. If unset, the run directory.",
        json_schema_extra=OPERATIONAL,
    )
    staging_dir: PathText | None = Field(
        None,
        min_length=1,
        description="Folder on a local disk of every node, where checkpoints are staged until they are copied to "
        "their storage. If unset, the system's folder for temporary files.",
        json_schema_extra=OPERATIONAL,
    )
    watch: CollapseBounds | None = Field(
        None,
        description="Collapse watch: sample the student while a round trains, when the cluster has room for one of "
        "its engines. If unset, disabled.",
        json_schema_extra=OPERATIONAL,
    )
    heldout_pairs: int = Field(512, ge=0, description="Maximum number of held-out pairs to rank. 0: none.")
    teacher: MlePhase | None = Field(
        None, description="Train the teacher on references first. If unset, it is used unchanged."
    )
    warmup: Warmup | None = Field(
        None, description="Train the student before it is sampled. If unset, it is used unchanged."
    )
    round: Phase = Field(Phase(), description="Calibration on pairs.")
    seqkd: MlePhase | None = Field(
        None,
        description="Control: sequence-level KD on the same teacher responses, with as many computed tokens as the "
        "round. It ignores `epochs` and `max_steps`. If unset, no control.",
    )

    @property
    def workers(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_num_workers(cls, value: Any) -> Any:
        bounds = list(value) if isinstance(value, (list, tuple)) else [value, value]
        if not all(type(bound) is int for bound in bounds) or len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
            raise ValueError(f"expected a number of workers, or [minimum, maximum] such as [2, 16]; got {value!r:.60}")
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_elastic_optimizers(self) -> Training:
        minimum, maximum = self.workers
        for name in ("teacher", "warmup", "round", "seqkd"):
            phase = getattr(self, name)
            if minimum < maximum and phase is not None and phase.optimizer.name == "adamw_8bit":
                raise ValueError(
                    f"{name}.optimizer.name: adamw_8bit: its block-wise states cannot be divided among another number "
                    "of workers; set adamw, or a fixed num_workers"
                )
        return self

    @model_validator(mode="after")
    def _check_group_tokens(self) -> Training:
        if self.max_group_tokens is not None and self.max_group_tokens > self.micro_batch_tokens:
            raise ValueError(
                f"max_group_tokens: {self.max_group_tokens}: a group over micro_batch_tokens, which is "
                f"{self.micro_batch_tokens}, is an error; set at most that, or raise micro_batch_tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_evaluated_phases(self) -> Training:
        for name, phase in (("teacher", self.teacher), ("warmup", self.warmup)):
            if phase is not None and phase.evaluate_every is not None:
                raise ValueError(f"{name}.evaluate_every: only the round and seqkd have held-out pairs; remove it")
        return self

    @field_validator("round")
    @classmethod
    def _check_round_loss(cls, value: Phase) -> Phase:
        if value.loss.name == "mle":
            raise ValueError("loss.name: must be a preference loss; sequence-level KD is the section `training.seqkd`")
        return value
