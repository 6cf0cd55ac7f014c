"""Losses, optimizers, phases, and how they are carried out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from plad_dist.config.section import OPERATIONAL, Section


class Loss(Section):
    """The objective of a phase. Formulas: docs/design.md."""

    name: Literal["rank", "margin", "listwise", "dpo", "ipo", "simpo", "cpo", "orpo", "mle"] = Field(
        "rank",
        description="rank, margin: PLaD's calibrations. listwise: all responses of a prompt, ranked by score. dpo, ipo, "
        "simpo, cpo, orpo: as their papers give them. mle: plain likelihood.",
    )
    margin: float = Field(
        1.0,
        ge=0.0,
        description="Margin of the hinge, in nats; of `margin`, in nats for a point of score; simpo's gamma.",
    )
    beta: float | None = Field(
        None, gt=0.0, description="Strength of dpo, ipo (tau), simpo, cpo, orpo (lambda). Empty: 2 for simpo, else 0.1."
    )
    mle_weight: float | None = Field(
        None,
        ge=0.0,
        description="Weight of -logp(chosen), summed over tokens, the anchor against collapse. Empty: 1 for rank, margin, "
        "listwise and cpo (whose paper has it), 0 for dpo, ipo, simpo and orpo.",
    )
    length_normalize: bool = Field(
        False,
        description="Use per-token means of the log-likelihoods; the anchor stays a sum. simpo and orpo always do.",
    )

    @property
    def anchor(self) -> float:
        """Weight of the anchor."""
        if self.mle_weight is not None:
            return self.mle_weight
        return 1.0 if self.name in ("rank", "margin", "listwise", "cpo") else 0.0

    @property
    def strength(self) -> float:
        """`beta`, or what stands for it."""
        return self.beta if self.beta is not None else 2.0 if self.name == "simpo" else 0.1

    @property
    def per_token(self) -> bool:
        """Whether it compares means per token."""
        return self.length_normalize or self.name in ("simpo", "orpo")

    @property
    def needs_references(self) -> bool:
        """Whether it compares with the starting student."""
        return self.name in ("dpo", "ipo")

    @property
    def needs_scores(self) -> bool:
        """Whether it looks at the responses' scores."""
        return self.name in ("margin", "listwise")

    @property
    def hinge(self) -> float | None:
        """Gap of log-likelihoods at which a pair is satisfied and learns nothing more; None where there is none."""
        return self.margin if self.name in ("rank", "listwise") else None


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optimizer(Section):
    """AdamW, with 8-bit states if asked for, or Muon, with linear warm-up and a schedule."""

    name: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw_8bit: its states in 8 bits by bitsandbytes, a quarter of the memory; not with an offloaded optimizer. "
        "muon: matrices by Muon, the rest by AdamW.",
    )
    lr: float = Field(1e-5, gt=0.0, le=1.0, description="Peak learning rate.")
    adam_lr: float | None = Field(None, gt=0.0, le=1.0, description="Muon only: rate of the AdamW part. Empty: lr.")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    warmup_share: float = Field(0.05, ge=0.0, le=1.0, description="Share of the steps with rising learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    clip_norm: float = Field(
        1.0,
        gt=0.0,
        description="Largest gradient norm. Muon does not clip: the size of its updates is that of no gradient.",
    )


class Phase(Section):
    """One training phase. A global step sees `batch_groups` groups, whatever the number of workers."""

    epochs: float = Field(1.0, gt=0.0, description="Passes over the phase's data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps.")
    batch_groups: int = Field(32, ge=1, description="Groups (a prompt and its responses) in a global step.")
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.", json_schema_extra=OPERATIONAL)
    checkpoint_seconds: float | None = Field(
        None,
        gt=0,
        description="Seconds after which a checkpoint is written too. Empty: by steps alone.",
        json_schema_extra=OPERATIONAL,
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Newest checkpoints kept, beside the best one.", json_schema_extra=OPERATIONAL
    )
    evaluate_every: int | None = Field(
        None, ge=1, description="Steps between rankings of the held-out pairs. Empty: only before and after."
    )
    best_by: Literal["pairs_ranked_right", "loss", "chosen_logp"] = Field(
        "pairs_ranked_right", description="Figure of the held-out pairs that says which checkpoint is the best."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop when so many evaluations in a row brought nothing better. Empty: never."
    )
    export: Literal["last", "best"] = Field("last", description="The checkpoint whose weights become the model.")

    @model_validator(mode="after")
    def _evaluations_where_needed(self) -> Phase:
        if self.evaluate_every is None and (self.patience is not None or self.export == "best"):
            raise ValueError("`patience` and `export: best` need `evaluate_every`")
        return self


class MlePhase(Phase):
    """A phase trained by likelihood."""

    loss: Loss = Loss(name="mle")

    @field_validator("loss")
    @classmethod
    def _is_mle(cls, value: Loss) -> Loss:
        if value.name != "mle":
            raise ValueError("this phase has no pairs: only `name: mle` fits it")
        return value


class Warmup(MlePhase):
    """Step 0: the student learns the task before it is sampled."""

    data: Literal["references", "teacher"] = Field(
        "references", description="Learn from references or teacher outputs."
    )


class Lora(Section):
    """Train low-rank adapters of the linear layers instead of the weights."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the layers, as peft takes them."
    )
    save_adapter: bool = Field(
        False,
        description="Also write the adapter by itself, to `adapter/` in the model's folder, which has the merged weights.",
    )


class Watch(Section):
    """Look at what the student writes while a round trains: on resources that are free then, its latest checkpoint answers a few prompts.

    A checkpoint that is out of a bound has collapsed: training stops, and the latest one before it that was sound becomes the model.
    """

    prompts: int = Field(32, ge=1, description="Held-out prompts that are answered each time.")
    min_end_share: float | None = Field(
        0.5,
        ge=0.0,
        description="Fewest answers that end by themselves, over those of the starting student. Empty: no bound.",
    )
    max_length_ratio: float | None = Field(
        2.0, gt=0.0, description="Longest mean answer, over that of the starting student. Empty: no bound."
    )
    max_repetition: float | None = Field(
        0.3,
        ge=0.0,
        le=1.0,
        description="Most repeated word 3-grams, beyond the starting student's share. Empty: no bound.",
    )
    min_win_rate: float | None = Field(
        0.2,
        ge=0.0,
        le=1.0,
        description="Lowest win rate against the starting student by ROUGE-L, where prompts have references. Empty: no bound.",
    )


class Training(Section):
    """Steps 0 and 3: DeepSpeed ZeRO-3 under Ray Train."""

    num_workers: int | tuple[int, int] = Field(
        1,
        description="Workers, one device each; or the fewest and the most of an elastic group, such as [2, 16], which grows "
        "and shrinks with the cluster.",
        json_schema_extra=OPERATIONAL,
    )
    cpus_per_worker: float = Field(1.0, gt=0, json_schema_extra=OPERATIONAL)
    deepspeed: str = Field(
        "zero3",
        description="Name of a file in ds_configs/, or a path to a DeepSpeed JSON.",
        json_schema_extra=OPERATIONAL,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPU, float32 on CPU.")
    micro_batch_tokens: int = Field(
        8192, ge=16, description="Tokens of one forward pass on one worker.", json_schema_extra=OPERATIONAL
    )
    max_group_tokens: int | None = Field(
        None,
        ge=16,
        description="Most tokens of a group, its prompt and all its responses. Empty: any; one that micro_batch_tokens does not hold is refused, pairs before the first step, references as a rule.",
    )
    over_long: Literal["fail", "drop", "truncate"] | None = Field(
        None,
        description="What to do with a longer group, or a sequence over the model's context. truncate: cut the beginning of the "
        "prompt, then ends of responses. Counted. Empty: fail for pairs, truncate for references and teacher outputs.",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="auto: FlexAttention on GPU, SDPA piece by piece on CPU. sdpa: with a mask over whole rows. Some families have their own.",
        json_schema_extra=OPERATIONAL,
    )
    lora: Lora | None = Field(None, description="Train adapters instead of all weights. Empty: all weights.")
    gradient_checkpointing: bool = Field(False, json_schema_extra=OPERATIONAL)
    divergence_factor: float = Field(
        10.0,
        gt=1.0,
        description="Stop at the last checkpoint when a step's loss is not a number, or so many times the first step's (at "
        "least a nat for each chosen token).",
        json_schema_extra=OPERATIONAL,
    )
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        default=[],
        description="Where figures go beside TensorBoard, by packages that must be installed.",
        json_schema_extra=OPERATIONAL,
    )
    max_failures: int = Field(
        100,
        ge=-1,
        description="Restarts after a worker or its node died before the run fails; -1: any number. Five in a row "
        "without a new checkpoint end it too.",
        json_schema_extra=OPERATIONAL,
    )
    max_preemptions: int = Field(
        -1, ge=-1, description="Restarts because nodes left with notice; -1: any number.", json_schema_extra=OPERATIONAL
    )
    worker_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds without a sign of life after which a worker is taken for dead, and the group starts anew.",
        json_schema_extra=OPERATIONAL,
    )
    collective_timeout_s: int = Field(
        900,
        ge=10,
        description="Seconds after which workers that wait for one another give up.",
        json_schema_extra=OPERATIONAL,
    )
    resize_check_s: float = Field(
        60.0,
        gt=0,
        description="Elastic groups: seconds between looks whether the cluster has become larger.",
        json_schema_extra=OPERATIONAL,
    )
    start_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds to wait for the resources of one size before it is looked anew what there is.",
        json_schema_extra=OPERATIONAL,
    )
    checkpoint_url: str | None = Field(
        None,
        min_length=1,
        description="Where checkpoints are kept: a path or URI such as s3://. Empty: in the run directory.",
        json_schema_extra=OPERATIONAL,
    )
    staging_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder on a disk of every node where checkpoints wait to be carried away. Empty: the system's for "
        "temporary files.",
        json_schema_extra=OPERATIONAL,
    )
    watch: Watch | None = Field(
        None,
        description="Sample the student while rounds train, where the cluster has room for one of its engines. Empty: not.",
        json_schema_extra=OPERATIONAL,
    )
    heldout_pairs: int = Field(512, ge=0, description="Held-out pairs ranked before and after a round.")
    teacher: MlePhase | None = Field(
        None, description="Train the teacher on references first. Empty: take it as it is."
    )
    warmup: Warmup | None = Field(None, description="Warm the student up. Empty: take it as it is.")
    round: Phase = Field(Phase(), description="Calibration on pairs.")
    seqkd: MlePhase | None = Field(
        None,
        description="Control: sequence-level KD on the same teacher outputs, given as many tokens as the round. "
        "Its `epochs` is ignored.",
    )

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_two(cls, value: Any) -> Any:
        numbers = list(value) if isinstance(value, (list, tuple)) else [value, value]
        if not all(type(number) is int for number in numbers) or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise ValueError(
                f"expected a number of workers, or the fewest and the most such as [2, 16]; got {value!r:.60}"
            )
        return value

    @model_validator(mode="after")
    def _elastic_states_can_be_divided(self) -> Training:
        fewest, most = self.workers
        for name in ("teacher", "warmup", "round", "seqkd"):
            phase = getattr(self, name)
            if fewest < most and phase is not None and phase.optimizer.name == "adamw_8bit":
                raise ValueError(
                    f"{name}.optimizer.name: adamw_8bit: its states in blocks cannot be divided among another number of workers: "
                    "set adamw, or a single number of num_workers"
                )
        return self

    @model_validator(mode="after")
    def _only_calibration_is_evaluated(self) -> Training:
        for name, phase in (("teacher", self.teacher), ("warmup", self.warmup)):
            if phase is not None and phase.evaluate_every is not None:
                raise ValueError(f"training.{name}.evaluate_every: only the round and seqkd have held-out pairs")
        return self

    @field_validator("round")
    @classmethod
    def _is_ranked(cls, value: Phase) -> Phase:
        if value.loss.name == "mle":
            raise ValueError("loss.name must be a preference loss; sequence-level KD is the section `training.seqkd`")
        return value
