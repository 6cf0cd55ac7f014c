"""How teachers and the student are sampled, and by which engines."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator
from pydantic_core import to_jsonable_python

from plad_dist.config.models import Model
from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.values import Bound, FreeMappingWithPaths, OptionalCount, PathText

# Engine arguments that control how sampling is carried out. All other arguments (precision,
# quantization, ...) affect the samples.
OPERATIONAL_ENGINE = frozenset(
    {
        "block_size", "data_parallel_size", "disable_log_stats", "distributed_executor_backend",
        "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization",
        "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size",
        "tensor_parallel_size",
    }
)  # fmt: skip
TRANSFORMERS = "transformers"  # `name` of the engine that generates by transformers
_LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to it


class Decoding(Section):
    """How one response is drawn."""

    temperature: float = Field(1.0, ge=0.0, le=2.0, description="Sampling temperature. 0: greedy decoding.")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="Nucleus sampling: total probability of the tokens to draw from."
    )
    top_k: int | None = Field(
        None,
        ge=0,
        description="Number of most likely tokens to draw from. 0: no limit. If unset, no limit, and an endpoint is "
        "not sent the key.",
    )
    min_p: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="Minimum probability of a token, as a share of the most likely token's. 0: no minimum. If unset, "
        "no minimum, and an endpoint is not sent the key.",
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2.0,
        le=2.0,
        description="Subtracted from the logits of tokens that the response contains. If unset, 0, and an endpoint is "
        "not sent the key.",
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2.0,
        le=2.0,
        description="Subtracted from the logits of tokens for each time that the response contains them. If unset, 0, "
        "and an endpoint is not sent the key.",
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0.0,
        description="Factor above 1 that makes tokens of the prompt and the response less likely. If unset, 1, and an "
        "endpoint is not sent the key.",
    )
    max_tokens: int = Field(256, ge=1, description="Maximum length of a response, in tokens.")
    min_tokens: int = Field(0, ge=0, description="Minimum length of a response, in tokens.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], description="Strings that end a response.")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="Tokens that end a response, in addition to those of the model."
    )

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if 0 < value < _LOWEST_TEMPERATURE:
            raise ValueError(
                f"{value:g}: vLLM samples at {_LOWEST_TEMPERATURE:g} at least; set 0 for greedy decoding, or a higher "
                "value"
            )
        return value

    @model_validator(mode="after")
    def _check_lengths(self) -> Decoding:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: {self.min_tokens}: must be at most max_tokens, which is {self.max_tokens}")
        return self

    @property
    def greedy_by(self) -> str | None:
        """Setting that makes all responses to a prompt the same, None without one."""
        settings = {"temperature 0": self.temperature == 0, "top_k 1": self.top_k == 1, "min_p 1": self.min_p == 1}
        return next((name for name, is_set in settings.items() if is_set), None)


class RoleSampling(Decoding):
    """How one role (teacher or student) is sampled for pairs, and by which engines."""

    n: int = Field(1, ge=1, le=256, description="Responses per prompt.")
    replicas: int | Literal["auto"] = Field(
        1,
        description="Maximum number of engines, one actor each. Engines come and go with the cluster. auto: as many "
        "as the GPUs of the cluster hold. An endpoint has one actor.",
        json_schema_extra=OPERATIONAL,
    )
    min_replicas: int = Field(
        1,
        ge=1,
        description="Minimum number of engines. The stage stops if fewer have their resources for "
        "cluster.start_timeout_s.",
        json_schema_extra=OPERATIONAL,
    )
    cpus: float = Field(1.0, gt=0, description="CPU cores reserved for each actor.", json_schema_extra=OPERATIONAL)
    engine: FreeMappingWithPaths = Field(
        default={},
        description="Engine arguments, by vLLM's own names. Arguments for parallelism, memory and batching may change "
        "between resumes. `transformers`, or `name: transformers` with `max_num_seqs` and `dtype`: transformers "
        "generates instead of vLLM, which is slower. A model that vLLM lacks needs no name.",
    )

    @field_validator("engine", mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        engine = {"name": value} if isinstance(value, str) else value
        if isinstance(engine, dict) and engine.get("name", TRANSFORMERS) != TRANSFORMERS:
            raise ValueError(f"{engine['name']!r:.60}: expected `{TRANSFORMERS}`, or vLLM's arguments without a `name`")
        return engine

    @model_validator(mode="after")
    def _check_replicas(self) -> RoleSampling:
        if self.replicas != "auto" and not 1 <= self.min_replicas <= self.replicas:
            raise ValueError(f"needs 1 <= min_replicas ({self.min_replicas}) <= replicas ({self.replicas})")
        return self

    def deciding_engine(self) -> dict[str, Any]:
        """Return the engine arguments that affect the samples, as JSON values."""
        arguments = {name: value for name, value in self.engine.items() if name not in OPERATIONAL_ENGINE}
        return cast("dict[str, Any]", to_jsonable_python(arguments))


class Rejected(Section):
    """Model that writes the rejected responses in place of the student of the round."""

    path: PathText | None = Field(
        None,
        min_length=1,
        description="Folder or hub name of a pretrained model with its tokenizer. It is sampled by sampling.student, "
        "with student.template and student.template_kwargs. A model that needs other keys, such as trust_remote_code, "
        "is declared under `teachers` and named by `teacher`.",
    )
    revision: str | None = Field(
        None, description="Revision of the hub repository. If unset, the repository's default branch."
    )
    max_length: int | None = Field(
        None, ge=8, description="Maximum context length, in tokens. If unset, the context length of the model."
    )
    phase: Literal["student-init"] | None = Field(
        None, description="student-init: the student as it is before any training of the run."
    )
    teacher: str | None = Field(
        None,
        min_length=1,
        description="Name of one of `teachers`, which then writes rejected responses only, to all prompts. Without "
        "sampling settings of its own it is sampled by sampling.student.",
    )

    @model_validator(mode="after")
    def _check_one_model(self) -> Rejected:
        if sum(name is not None for name in (self.path, self.phase, self.teacher)) != 1:
            raise ValueError(
                "needs exactly one of `path` (another pretrained model), `phase` (the student before its training) "
                "and `teacher` (the name of one of `teachers`)"
            )
        for name in ("revision", "max_length"):
            if getattr(self, name) is not None and self.path is None:
                raise ValueError(f"{name}: is that of `path`; remove it, or set `path`")
        return self


class Sampling(Section):
    """Step 1: teacher and student answer the same prompts."""

    limit: OptionalCount = Field(
        None,
        ge=1,
        description="Number of training prompts to sample, starting with the first. If unset or `.inf`, all.",
    )
    teacher: RoleSampling = RoleSampling()
    student: RoleSampling = RoleSampling()
    rejected: Rejected | None = Field(
        None,
        description="Model that writes the rejected responses of the pairs. If unset, the student that the round "
        "starts from.",
    )
    window: int = Field(
        4,
        ge=1,
        le=64,
        description="Minimum number of blocks in flight per engine. Raised if these blocks hold fewer than four times "
        "as many prompts as the engine processes concurrently.",
        json_schema_extra=OPERATIONAL,
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="Consecutive failures of a block after which the run fails. Also the number of failures after "
        "which a row becomes an error row.",
        json_schema_extra=OPERATIONAL,
    )
    heartbeat_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without a heartbeat after which an actor is given up. Its blocks are leased again.",
        json_schema_extra=OPERATIONAL,
    )
    stall_timeout_s: Bound = Field(
        1800.0,
        gt=0,
        description="Seconds without a new token after which an actor with heartbeats is given up as hung. For an "
        "endpoint, seconds without a piece of a response, and at least its give_up_after_s plus twice its timeout_s. "
        "`.inf`: no bound.",
        json_schema_extra=OPERATIONAL,
    )
    engine_start_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Seconds that an engine may take to load its model once it has its resources. A slower engine is "
        "given up.",
        json_schema_extra=OPERATIONAL,
    )
    lease_timeout_s: Bound = Field(
        7200.0,
        gt=0,
        description="Seconds that an actor may take for one block. After that, the attempt is cancelled, counts as a "
        "failure, and the block is leased again. `.inf`: no bound. Endpoints have none.",
        json_schema_extra=OPERATIONAL,
    )
    max_error_share: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="Maximum share of error rows. Above it, the stage fails once it has 100 rows or is complete.",
        json_schema_extra=OPERATIONAL,
    )


class Teacher(Model):
    """One of several teachers."""

    share: float = Field(
        1.0, gt=0, description="Weight of the teacher when prompts are divided among the teachers that accept them."
    )
    filter: str | None = Field(
        None,
        description="Jinja expression over `messages`, `reference` and `meta` that is true for prompts that the "
        "teacher accepts. If unset, all prompts.",
    )
    sampling: RoleSampling | None = Field(
        None, description="Sampling settings of the teacher. If unset, those of sampling.teacher."
    )

    @classmethod
    def of(cls, model: Model) -> Teacher:
        """Return a single teacher in the form of one of several."""
        teacher = cls.model_construct(**dict(model))  # the values are valid
        teacher._date = model._date
        return teacher
