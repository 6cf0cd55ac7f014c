"""How teachers and the student are sampled, and by which engines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from plad_dist.config.models import Model
from plad_dist.config.section import OPERATIONAL, Section

# Engine arguments that say how sampling is carried out; all others (precision, quantization, ...) decide the samples.
OPERATIONAL_ENGINE = frozenset(
    {
        "block_size", "data_parallel_size", "disable_log_stats", "distributed_executor_backend", "enable_chunked_prefill",
        "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes",
        "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size", "tensor_parallel_size",
    }
)  # fmt: skip


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
        description="Seconds without a token (of a server: without a response) after which a living actor is given up as hung.",
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
