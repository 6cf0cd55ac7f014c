"""The whole of a run in one validated schema. Every default of the product is written here, once.

A run is a YAML file of these sections; ``key.sub=value`` arguments override it (:mod:`plad_dist.config_file`).
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

# Marks a key that changes how a run is carried out but not what it produces, so that it may change between resumes.
OPERATIONAL: dict[str, Any] = {"operational": True}


# Engine arguments that say how sampling is carried out; all others (precision, quantization, ...) decide the samples.
OPERATIONAL_ENGINE = frozenset(
    {
        "block_size", "data_parallel_size", "disable_log_stats", "distributed_executor_backend", "enable_chunked_prefill",
        "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes",
        "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size", "tensor_parallel_size",
    }
)  # fmt: skip


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values are checked, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


# ----------------------------------------------------------------------------------------------------- run, cluster


class Run(Section):
    """Where the run lives and what makes it repeatable."""

    dir: str = Field(description="Run directory: a path, or file://, s3://, gs://, az:// URI.", min_length=1)
    seed: int = Field(17, ge=0, lt=2**31, description="Every random choice of the run follows from it.")


class Cluster(Section):
    """Which Ray cluster does the work."""

    address: str | None = Field(
        None,
        description="Ray address to join (`auto`, `host:port`). Empty: the RAY_ADDRESS variable, else a local Ray.",
        json_schema_extra=OPERATIONAL,
    )
    start_timeout_s: int = Field(
        600,
        ge=10,
        description="Seconds to wait for the cluster to give the actors and workers their resources.",
        json_schema_extra=OPERATIONAL,
    )


# ---------------------------------------------------------------------------------------------------------- prompts


class Columns(Section):
    """Which columns of a row make a prompt."""

    prompt_column: str = Field(
        "prompt", description="Column with the prompt text. Ignored where messages_column or template is set."
    )
    messages_column: str | None = Field(None, description="Column with chat messages (list of role and content).")
    template: str | None = Field(
        None, description="Jinja template over the row's columns that makes the prompt text from several of them."
    )
    reference_column: str | None = Field(None, description="Column with a reference response, if there is one.")
    meta_columns: list[str] = Field(default=[], description="Columns kept in `meta`, for the filters of teachers.")

    @model_validator(mode="after")
    def _one_origin_of_the_prompt(self) -> Columns:
        if self.messages_column is not None and self.template is not None:
            raise ValueError("needs at most one of `messages_column` and `template`")
        return self


class FilesSource(Columns):
    """Prompts read from files: JSON lines, Parquet, Arrow or CSV, by their suffix."""

    type: Literal["files"]
    paths: list[str] = Field(
        min_length=1, description="Files or glob patterns, read in sorted order; paths or s3://, gs://, az:// URIs."
    )


class DatasetSource(Columns):
    """Prompts read through the `datasets` library, as a stream: nothing is held in memory."""

    type: Literal["dataset"]
    name: str = Field(min_length=1, description="Hub name, folder of data files, or folder made by `save_to_disk`.")
    subset: str | None = Field(None, description="Configuration of the data set, where it has several.")
    split: str = Field("train", min_length=1, description="Split to read.")
    revision: str | None = Field(None, description="Revision of the hub repository.")


class PythonFunctionsSource(Section):
    """Names of functions from their one-line descriptions, harvested from the installed Python packages.

    Source code is parsed, never imported or run.
    """

    type: Literal["python_functions"]
    limit: int = Field(60_000, ge=100, description="At most so many training rows.")
    heldout_limit: int = Field(600, ge=10, description="At most so many held-out rows.")
    heldout_packages: list[str] = Field(
        default=["asyncio", "email", "http", "logging", "networkx", "tkinter", "unittest", "xml"],
        min_length=1,
        description="Top-level packages whose functions are only used for evaluation.",
    )
    seconds: int = Field(120, ge=5, description="Stop harvesting after so many seconds.", json_schema_extra=OPERATIONAL)


class Prompts(Section):
    """The prompts to distil on, and those held out for evaluation."""

    source: Annotated[FilesSource | DatasetSource | PythonFunctionsSource, Field(discriminator="type")]
    heldout: Annotated[FilesSource | DatasetSource, Field(discriminator="type")] | None = Field(
        None,
        description="Held-out prompts. Empty: taken from the source (python_functions), or heldout_fraction of it.",
    )
    heldout_fraction: float = Field(
        0.02, ge=0.0, lt=1.0, description="Share of the source that is held out when `heldout` is empty."
    )
    block_size: int = Field(512, ge=1, le=100_000, description="Prompts in a block, the unit of work and of commit.")
    duplicates: Literal["keep", "drop", "fail"] = Field(
        "keep", description="What to do with a prompt that was there before, word for word. They are counted always."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest prompt, in tokens of every pretrained model that is to answer it. Empty: each model's context "
        "less one token.",
    )
    over_long: Literal["fail", "drop", "truncate"] = Field(
        "fail", description="What to do with a longer one. truncate: shorten the end of its last message."
    )


# ----------------------------------------------------------------------------------------------------------- models


class ScratchModel(Section):
    """A model with random weights and a tokenizer trained on the prompts and references."""

    architecture: dict[str, Any] = Field(
        description="Arguments of the transformers config, `model_type` among them; vocabulary and special tokens are "
        "filled in from the tokenizer."
    )
    vocab_size: int = Field(2048, ge=300, le=1_000_000, description="Size of the byte-pair vocabulary.")

    @field_validator("architecture")
    @classmethod
    def _has_model_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("model_type"), str):
            raise ValueError("needs `model_type`, the name of a transformers architecture, such as llama")
        return value


class Endpoint(Section):
    """An OpenAI-compatible server that answers prompts. Only its text is needed."""

    url: str = Field(description="Base URL, such as http://host:8000/v1.", json_schema_extra=OPERATIONAL)
    model: str = Field(min_length=1, description="The model's name there.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat: the server renders the messages. completions: the prompt is rendered by `template`."
    )
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key. The key itself is never written anywhere.",
        json_schema_extra=OPERATIONAL,
    )
    concurrency: int = Field(64, ge=1, le=10_000, description="Most requests under way.", json_schema_extra=OPERATIONAL)
    requests_per_minute: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    tokens_per_minute: float | None = Field(
        None, gt=0, description="Prompt and response tokens.", json_schema_extra=OPERATIONAL
    )
    timeout_s: float = Field(300.0, gt=0, description="Seconds for one request.", json_schema_extra=OPERATIONAL)
    max_retries: int = Field(
        6,
        ge=0,
        description="Tries of one request after its first, while others succeed; then it is an error row.",
        json_schema_extra=OPERATIONAL,
    )
    give_up_after_s: float = Field(
        900.0,
        gt=0,
        description="Seconds without one successful answer after which the stage stops; what is answered is kept.",
        json_schema_extra=OPERATIONAL,
    )
    input_price: float | None = Field(
        None, ge=0, description="Price of a million prompt tokens.", json_schema_extra=OPERATIONAL
    )
    output_price: float | None = Field(
        None, ge=0, description="Price of a million response tokens.", json_schema_extra=OPERATIONAL
    )
    max_spend: float | None = Field(
        None, gt=0, description="The stage stops before it spends more than this.", json_schema_extra=OPERATIONAL
    )
    extra_body: dict[str, Any] = Field(default={}, description="Further fields of every request.")

    @field_validator("url")
    @classmethod
    def _is_plain_url(cls, value: str) -> str:
        try:
            parsed = urlsplit(value)
            _ = parsed.port
        except ValueError as error:
            raise ValueError(f"expected a URL such as http://host:8000/v1: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError(f"expected a URL such as http://host:8000/v1, got {value!r:.60}")
        if parsed.username or parsed.password or parsed.query or parsed.fragment:
            raise ValueError("must hold no user, password, query or fragment; name the key's variable in api_key_env")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _cap_has_prices(self) -> Endpoint:
        if self.max_spend is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_spend needs input_price and output_price")
        return self


class Model(Section):
    """A causal language model: a pretrained one by path, one made from scratch, or one behind a server."""

    path: str | None = Field(None, description="Folder or hub name of a pretrained model with its tokenizer.")
    revision: str | None = Field(None, description="Revision of the hub repository.")
    scratch: ScratchModel | None = Field(None, description="Make the model instead of loading it.")
    endpoint: Endpoint | None = Field(None, description="Ask a server instead of loading the model. Teachers only.")
    template: str | None = Field(
        None, description="Jinja template over `messages` that renders a prompt. Empty: the tokenizer's chat template."
    )
    max_length: int | None = Field(None, ge=8, description="Context length to use. Empty: the model's own.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if sum(origin is not None for origin in (self.path, self.scratch, self.endpoint)) != 1:
            raise ValueError(
                "needs exactly one of `path` (a pretrained model), `scratch` (a new one) and `endpoint` (a server)"
            )
        if self.endpoint and (self.endpoint.api == "completions") != (self.template is not None):
            raise ValueError("`template` renders the prompts of an endpoint with `api: completions`, and only of such")
        return self


# --------------------------------------------------------------------------------------------------------- sampling


class Decoding(Section):
    """How one response is drawn."""

    temperature: float = Field(1.0, ge=0.0, le=5.0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Nucleus sampling.")
    top_k: int = Field(0, ge=0, description="Draw among the k likeliest tokens; 0 is off.")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="Drop tokens below this share of the likeliest one.")
    max_tokens: int = Field(256, ge=1, description="Longest response, in tokens.")
    stop: list[str] = Field(default=[], description="Strings that end a response.")


class RoleSampling(Decoding):
    """How one role (teacher or student) is sampled for pairs, and by which engines."""

    n: int = Field(1, ge=1, le=256, description="Responses per prompt.")
    replicas: int | Literal["auto"] = Field(
        1,
        description="Most engines, one actor each; they come and go with the cluster. auto: as many as its GPUs hold.",
        json_schema_extra=OPERATIONAL,
    )
    min_replicas: int = Field(
        1,
        ge=1,
        description="Fewest engines: the stage stops when fewer are up for cluster.start_timeout_s.",
        json_schema_extra=OPERATIONAL,
    )
    cpus: float = Field(1.0, gt=0, description="CPU cores reserved for each actor.", json_schema_extra=OPERATIONAL)
    engine: dict[str, Any] = Field(
        default={},
        description="Engine arguments, passed to vLLM by their own names. Those about parallelism, memory and batching may "
        "change between resumes.",
    )

    @model_validator(mode="after")
    def _fewest_and_most(self) -> RoleSampling:
        if self.replicas != "auto" and not 1 <= self.min_replicas <= self.replicas:
            raise ValueError(f"needs 1 <= min_replicas ({self.min_replicas}) <= replicas ({self.replicas})")
        return self

    def deciding_engine(self) -> dict[str, Any]:
        """Engine arguments that decide what is sampled."""
        return {name: value for name, value in self.engine.items() if name not in OPERATIONAL_ENGINE}


class Sampling(Section):
    """Step 1: the teacher and the student answer the same prompts."""

    limit: int | None = Field(None, ge=1, description="Sample only the first so many prompts. Empty: all.")
    teacher: RoleSampling = RoleSampling()
    student: RoleSampling = RoleSampling()
    window: int = Field(
        4,
        ge=1,
        le=64,
        description="Blocks in flight on one engine, at least; more where it answers more prompts at once than a quarter of them.",
        json_schema_extra=OPERATIONAL,
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="Failures of one block in a row before the run fails, and of one row before it is an error row.",
        json_schema_extra=OPERATIONAL,
    )
    heartbeat_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without a sign of life after which an actor is given up and its blocks leased again.",
        json_schema_extra=OPERATIONAL,
    )
    stall_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Seconds without one finished response after which a living actor is given up as hung.",
        json_schema_extra=OPERATIONAL,
    )
    engine_start_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Seconds that an engine may take to load its model once it has its resources, after which it is given up.",
        json_schema_extra=OPERATIONAL,
    )
    lease_timeout_s: float = Field(
        7200.0,
        gt=0,
        description="Seconds for one block, after which another actor is given it too.",
        json_schema_extra=OPERATIONAL,
    )
    max_error_share: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="Share of error rows above which the stage fails, once 100 rows are there.",
        json_schema_extra=OPERATIONAL,
    )


class Teacher(Model):
    """One of several teachers."""

    share: float = Field(1.0, gt=0, description="Its share of the prompts, relative to the others that take them.")
    filter: str | None = Field(
        None,
        description="Jinja expression over `messages`, `reference` and `meta` that says which prompts it takes. Empty: all.",
    )
    sampling: RoleSampling | None = Field(None, description="How it is sampled. Empty: as sampling.teacher says.")


# ---------------------------------------------------------------------------------------------------------- pairing


class RewardModel(Section):
    """A model that scores responses: any sequence classifier with one output."""

    path: str = Field(description="Folder or hub name of an AutoModelForSequenceClassification with its tokenizer.")
    revision: str | None = Field(None, description="Revision of the hub repository.")
    template: str | None = Field(
        None,
        description="Jinja template over `messages`, the response among them. Empty: the tokenizer's chat template.",
    )
    max_length: int = Field(2048, ge=8, description="Longest conversation in tokens; longer ones have no score.")
    batch_size: int = Field(16, ge=1, description="Conversations scored at a time.", json_schema_extra=OPERATIONAL)
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class Pairing(Section):
    """Step 2: pseudo-preference pairs, the teacher's response over the student's."""

    combine: Literal["all", "one", "best_worst"] = Field(
        "all",
        description="Of several samples of a prompt: all combinations, the first usable one, or the teacher's best against "
        "the student's worst by score.",
    )
    score: Literal["rouge_l", "reward_model", "function", "none"] = Field(
        "rouge_l", description="rouge_l: against the reference, where there is one."
    )
    reward_model: RewardModel | None = Field(None, description="The model of `score: reward_model`.")
    score_function: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="The function of `score: function`, as `package.module:name`. It takes a list of {messages, reference, "
        "response, role} and returns a list of numbers or nulls.",
    )
    min_score_gap: float | None = Field(
        None,
        description="Least score of the chosen response above the rejected one's. Empty: any, also a negative one.",
    )
    max_pairs_per_prompt: int = Field(4, ge=1, description="Pairs kept of one prompt with several samples.")
    max_tokens: int | None = Field(
        None, ge=8, description="Longest prompt plus response, in student tokens. Empty: the student's context."
    )
    length_ratio: tuple[float, float] | None = Field(
        None, description="Bounds of the chosen response's tokens over the rejected one's. Empty: none."
    )
    identical: Literal["drop", "keep"] = Field("drop", description="Pairs of equal texts.")
    empty: Literal["drop", "keep"] = Field("drop", description="Pairs with an empty response.")
    truncated_chosen: Literal["drop", "keep"] = Field(
        "drop", description="Teacher responses that hit max_tokens. Kept ones have no end-of-sequence."
    )
    truncated_rejected: Literal["keep", "drop"] = Field("keep", description="Student responses that hit max_tokens.")
    workers: int = Field(1, ge=1, description="Actors that build pairs.", json_schema_extra=OPERATIONAL)
    cpus_per_worker: float = Field(1.0, gt=0, json_schema_extra=OPERATIONAL)
    gpus_per_worker: float = Field(0.0, ge=0, description="For a reward model.", json_schema_extra=OPERATIONAL)

    @model_validator(mode="after")
    def _scores_where_needed(self) -> Pairing:
        for score, value in (("reward_model", self.reward_model), ("function", self.score_function)):
            name = "reward_model" if score == "reward_model" else "score_function"
            if (self.score == score) != (value is not None):
                raise ValueError(f"`score: {score}` and `{name}` need one another")
        if self.score == "none" and (self.combine == "best_worst" or self.min_score_gap is not None):
            raise ValueError("`combine: best_worst` and `min_score_gap` need a score")
        if self.length_ratio is not None and not 0 <= self.length_ratio[0] <= self.length_ratio[1]:
            raise ValueError(f"length_ratio: expected [low, high] with 0 <= low <= high, got {list(self.length_ratio)}")
        return self


# --------------------------------------------------------------------------------------------------------- training


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
    """AdamW or Muon, with linear warm-up and a schedule."""

    name: Literal["adamw", "muon"] = Field("adamw", description="muon: matrices by Muon, the rest by AdamW.")
    lr: float = Field(1e-5, gt=0.0, le=1.0, description="Peak learning rate.")
    adam_lr: float | None = Field(None, gt=0.0, le=1.0, description="Muon only: rate of the AdamW part. Empty: lr.")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    warmup_share: float = Field(0.05, ge=0.0, le=1.0, description="Share of the steps with rising learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    clip_norm: float = Field(1.0, gt=0.0, description="Largest gradient norm.")


class Phase(Section):
    """One training phase. A global step sees `batch_groups` groups, whatever the number of workers."""

    epochs: float = Field(1.0, gt=0.0, description="Passes over the phase's data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps.")
    batch_groups: int = Field(32, ge=1, description="Groups (a prompt and its responses) in a global step.")
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.", json_schema_extra=OPERATIONAL)
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


class Training(Section):
    """Steps 0 and 3: DeepSpeed ZeRO-3 under Ray Train."""

    num_workers: int = Field(1, ge=1, description="Workers, one device each.", json_schema_extra=OPERATIONAL)
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
        description="Most tokens of a group, its prompt and all its responses. Empty: any that a micro-batch holds.",
    )
    over_long: Literal["fail", "drop", "truncate"] | None = Field(
        None,
        description="What to do with a longer group, or a sequence over the model's context. truncate: cut the beginning of the "
        "prompt, then ends of responses. Counted. Empty: fail for pairs, truncate for references and teacher outputs.",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="auto: FlexAttention on GPU, masked SDPA on CPU. Some families have their own.",
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
        3, ge=0, description="Worker-group restarts before the run fails.", json_schema_extra=OPERATIONAL
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


# ------------------------------------------------------------------------------------------------------- evaluation


class Evaluation(Section):
    """Step 4: every system answers the held-out prompts."""

    limit: int = Field(500, ge=1, description="Held-out prompts used.")
    decodings: dict[str, Decoding] = Field(
        default={}, description="Named decodings. Empty: `greedy`, and `sampled` as the student is sampled for pairs."
    )
    warmup_temperatures: list[Annotated[float, Field(gt=0, le=5)]] = Field(
        default=[0.5, 0.25], description="Lower temperatures at which the warm-up student is shown too."
    )
    bootstrap: int = Field(2000, ge=100, le=100_000, description="Resamples for the 95% intervals.")
    examples: int = Field(20, ge=0, description="Outputs shown side by side in the report.")

    @field_validator("decodings")
    @classmethod
    def _names(cls, value: dict[str, Decoding]) -> dict[str, Decoding]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"decoding name {name!r}: use letters, digits, '-', '_' and '.' alone")
        return value


class Config(Section):
    """A run."""

    run: Run
    cluster: Cluster = Cluster()
    prompts: Prompts
    teacher: Model | None = Field(None, description="The teacher. Empty: `teachers` names several.")
    teachers: dict[str, Teacher] = Field(
        default={}, description="Several teachers by name, each with a part of the prompts."
    )
    student: Model
    sampling: Sampling = Sampling()
    pairing: Pairing = Pairing()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _scratch_models_are_trained(self) -> Config:
        if self.teacher and self.teacher.scratch and not self.training.teacher:
            raise ValueError("teacher.scratch makes an untrained teacher: add a `training.teacher` section")
        if self.training.lora and (self.student.scratch or (self.teacher and self.teacher.scratch)):
            raise ValueError(
                "training.lora: adapters of a model from scratch would learn beside random weights; leave it out"
            )
        if self.student.scratch and not self.training.warmup:
            raise ValueError("student.scratch makes an untrained student: add a `training.warmup` section")
        for name, model in (("teacher", self.teacher), ("student", self.student)):
            if model and model.scratch and model.template is None:
                raise ValueError(f"{name}.scratch makes a tokenizer without a chat template: set {name}.template")
        return self

    @model_validator(mode="after")
    def _teachers_and_student(self) -> Config:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("needs exactly one of `teacher` and `teachers`")
        if self.student.endpoint:
            raise ValueError("student.endpoint: only a teacher may be behind a server; the student is trained here")
        for name, teacher in self.teachers.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "student":
                raise ValueError(f"teachers: name {name!r}: use letters, digits, '-' and '_' alone, and not `student`")
            if teacher.scratch:
                raise ValueError(f"teachers.{name}.scratch: only a single `teacher` can be made from scratch")
            if teacher.sampling and teacher.sampling.n != self.sampling.teacher.n:
                raise ValueError(f"teachers.{name}.sampling.n: must be that of sampling.teacher.n")
        if self.training.teacher and (self.teacher is None or self.teacher.endpoint):
            raise ValueError("training.teacher: trains a single `teacher` with a path or from scratch")
        return self

    @model_validator(mode="after")
    def _student_ends_with_a_token(self) -> Config:
        if self.sampling.student.stop:
            raise ValueError(
                "sampling.student.stop: the student must end with a token, not a stop string, to be trained on it"
            )
        return self

    @model_validator(mode="after")
    def _scores_where_needed(self) -> Config:
        name = self.training.round.loss.name
        if self.training.round.loss.needs_scores and self.pairing.score == "none":
            raise ValueError(f"training.round.loss.name: {name} needs scores: set pairing.score")
        return self

    @model_validator(mode="after")
    def _references_where_needed(self) -> Config:
        source = self.prompts.source
        if isinstance(source, Columns) and source.reference_column is None:
            if self.training.teacher:
                raise ValueError("training.teacher learns from references: set prompts.source.reference_column")
            if self.training.warmup and self.training.warmup.data == "references":
                raise ValueError(
                    "training.warmup.data is `references`: set prompts.source.reference_column, or use `data: teacher`"
                )
        return self

    def all_teachers(self) -> dict[str, Teacher]:
        """The teachers by name; a single one is called `teacher`. Each with how it is sampled."""
        teachers = {"teacher": Teacher(**self.teacher.model_dump())} if self.teacher else self.teachers
        return {
            name: teacher.model_copy(update={"sampling": teacher.sampling or self.sampling.teacher})
            for name, teacher in teachers.items()
        }

    def trained(self, role: str) -> Model:
        """The section of a model that the run may train: `teacher` (a single one) or `student`."""
        model = self.teacher if role == "teacher" else self.student
        assert model is not None, "only a single teacher is trained"
        return model

    def decodings(self) -> dict[str, Decoding]:
        """The decodings that every system is evaluated with, by name."""
        if self.evaluation.decodings:
            return dict(self.evaluation.decodings)
        student = self.sampling.student
        sampled = Decoding(**{name: getattr(student, name) for name in Decoding.model_fields})
        return {"greedy": sampled.model_copy(update={"temperature": 0.0}), "sampled": sampled}

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what the run produces; run.dir and operational keys are left out."""
        return fingerprint({key: value for key, value in self.flat().items() if not is_operational(key)})

    def flat(self) -> dict[str, Any]:
        """Every resolved key with its value, by dotted name."""
        return dict(flatten(self.model_dump(mode="json")))


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


# ------------------------------------------------------------------------------------------------- walking the schema


def schema_fields(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its field, depth first. Alternatives of a union follow one another; `*` is any name."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        for section in _sections_in(field.annotation):
            yield from schema_fields(section, f"{path}.")
        for section in _named_sections_in(field.annotation):
            yield from schema_fields(section, f"{path}.*.")


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [section for item in get_args(annotation) for section in _sections_in(item)]
    return []


def _named_sections_in(annotation: Any) -> list[type[Section]]:
    """Sections that the values of a mapping are."""
    return _sections_in(get_args(annotation)[1]) if get_origin(annotation) is dict else []


@cache
def operational_keys() -> set[str]:
    """Keys whose change does not change what a run produces: they may differ between resumes."""
    operational = {path for path, field in schema_fields() if (field.json_schema_extra or {}) == OPERATIONAL}
    return operational | {"run.dir"}


def is_operational(key: str) -> bool:
    """Whether a dotted key, or the key that holds it, is operational."""
    parts = key.split(".")
    if "engine" in parts[:-1]:
        return parts[parts.index("engine") + 1] in OPERATIONAL_ENGINE
    if parts[0] == "teachers" and len(parts) > 2:
        parts[1] = "*"
    keys = operational_keys()
    return any(".".join(parts[:end]) in keys for end in range(1, len(parts) + 1))
