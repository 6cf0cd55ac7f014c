"""How systems are compared: decodings, judges, candidates."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from plad_dist.config.models import Model
from plad_dist.config.pairing import RewardModel
from plad_dist.config.sampling import Decoding, RoleSampling
from plad_dist.config.section import OPERATIONAL, Section

REFERENCE_JUDGES = ("rouge_1", "rouge_2", "rouge_l")


class RewardJudge(RewardModel):
    """A reward model that scores every response."""

    type: Literal["reward_model"]


class TeacherJudge(Section):
    """The teacher's likelihood of a response, a mean per token; the teacher's weights must be at hand."""

    type: Literal["teacher_likelihood"]


class JudgeSampling(RoleSampling):
    """How a judge is sampled, and by which engines."""

    temperature: float = Field(0.0, ge=0.0, le=5.0, description="0 is greedy.")
    max_tokens: int = Field(512, ge=1, description="Longest answer, in tokens.")


class LlmJudge(Section):
    """A language model that reads two responses, each pair in both orders."""

    type: Literal["llm"]
    model: Model = Field(description="Who judges: a server behind `endpoint`, or a model by `path`.")
    template: str | None = Field(
        None,
        description="File with the Jinja template of the question, over `messages`, `reference`, `first` and `second`; the verdict "
        "must be asked for as [[A]], [[B]] or [[C]] for a tie. Empty: the one that comes with the package.",
    )
    limit: int = Field(200, ge=1, description="Held-out prompts judged for each two systems: two requests each.")
    sampling: JudgeSampling = JudgeSampling()

    @model_validator(mode="after")
    def _is_not_made_here(self) -> LlmJudge:
        if self.model.scratch is not None:
            raise ValueError("model.scratch: a judge needs a trained model: set `path` or `endpoint`")
        if self.sampling.n != 1:
            raise ValueError("sampling.n: must be 1, a judge is asked once in each order")
        return self


Judge = Annotated[RewardJudge | TeacherJudge | LlmJudge, Field(discriminator="type")]


class Evaluation(Section):
    """Step 4: every system answers the held-out prompts. Changed judges and intervals are evaluated anew from what was sampled."""

    limit: int = Field(500, ge=1, description="Held-out prompts used.")
    decodings: dict[str, Decoding] = Field(
        default={}, description="Named decodings. Empty: `greedy`, and `sampled` as the student is sampled for pairs."
    )
    warmup_temperatures: list[Annotated[float, Field(gt=0, le=5)]] = Field(
        default=[0.5, 0.25], description="Lower temperatures at which the warm-up student is shown too."
    )
    judge: str = Field(
        "rouge_l",
        description="Whose win rates head the report and end the rounds: rouge_1, rouge_2, rouge_l (against the reference), or a "
        "name in `judges`. It should not be the score that decided what was trained on.",
        json_schema_extra=OPERATIONAL,
    )
    judges: dict[str, Judge] = Field(default={}, description="Further judges, by name.", json_schema_extra=OPERATIONAL)
    candidates: int = Field(
        4,
        ge=0,
        le=256,
        description="Responses of the warm-up student to each held-out prompt whose likelihoods under all students are compared "
        "with their quality; 0 for none.",
    )
    bootstrap: int = Field(
        2000, ge=100, le=100_000, description="Resamples for the 95% intervals.", json_schema_extra=OPERATIONAL
    )
    examples: int = Field(
        20, ge=0, description="Outputs shown side by side in the report.", json_schema_extra=OPERATIONAL
    )
    gpus_per_judge: float = Field(1.0, ge=0, description="For a reward model.", json_schema_extra=OPERATIONAL)

    @field_validator("decodings")
    @classmethod
    def _names(cls, value: dict[str, Decoding]) -> dict[str, Decoding]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"decoding name {name!r}: use letters, digits, '-', '_' and '.' alone")
            if name in ("journal", "damaged"):  # folders of a dataset
                raise ValueError(f"decoding name {name!r}: is used by the run directory itself, use another one")
        return value

    @model_validator(mode="after")
    def _temperatures_are_not_decodings(self) -> Evaluation:
        for temperature in self.warmup_temperatures:
            if (name := f"t{temperature:g}") in self.decodings:
                raise ValueError(
                    f"decodings: name {name!r}: stands for the warm-up student at that temperature (warmup_temperatures), use another one"
                )
        return self

    @model_validator(mode="after")
    def _judges_are_named(self) -> Evaluation:
        for name in self.judges:
            if name in (*REFERENCE_JUDGES, "candidates") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"judges: name {name!r}: use letters, digits, '-' and '_' alone, no name of a metric, and not `candidates`"
                )
        known = [*REFERENCE_JUDGES, *self.judges]
        if self.judge not in known:
            raise ValueError(f"judge: {self.judge!r}: expected one of {', '.join(known)}, or one that `judges` defines")
        if self.candidates == 1:
            raise ValueError("candidates: 1: candidates are ranked among themselves: set at least 2, or 0 for none")
        return self
