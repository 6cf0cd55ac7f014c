"""How systems are compared: decodings, judges, candidates."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from plad_dist.config.models import Model
from plad_dist.config.pairing import RewardModel
from plad_dist.config.sampling import Decoding, RoleSampling
from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.values import PathText, refuse_clash

_FOLDERS_OF_DATASETS = ("journal", "damaged", "spool")
REFERENCE_JUDGES = ("rouge_1", "rouge_2", "rouge_l")


class RewardJudge(RewardModel):
    """Judge that scores every response with a reward model."""

    type: Literal["reward_model"] = Field(description="reward_model: a reward model scores every response.")


class TeacherJudge(Section):
    """Judge that scores a response by the teacher's mean log-likelihood per token.

    It needs the teacher's weights.
    """

    type: Literal["teacher_likelihood"] = Field(
        description="teacher_likelihood: the score is the teacher's mean log-likelihood per token."
    )


class JudgeSampling(RoleSampling):
    """How a judge is sampled, and by which engines."""

    temperature: float = Field(0.0, ge=0.0, le=2.0, description="Sampling temperature. 0: greedy decoding.")
    max_tokens: int = Field(512, ge=1, description="Maximum length of a response, in tokens.")


class LlmJudge(Section):
    """Language model that compares two responses, each pair in both orders."""

    type: Literal["llm"] = Field(description="llm: a language model compares the responses of two systems.")
    model: Model = Field(description="Model that judges: a server (`endpoint`) or a local model (`path`).")
    template: PathText | None = Field(
        None,
        description="For llm: file with the Jinja template of the question, over `messages`, `reference`, `first` and "
        "`second`. It must ask for the verdict as [[A]], [[B]] or, for a tie, [[C]]. Default: the template that comes "
        "with the package.",
    )
    limit: int = Field(
        200,
        ge=1,
        description="Number of held-out prompts judged for every two systems. Each takes two requests, one per order.",
    )
    sampling: JudgeSampling = JudgeSampling()

    @model_validator(mode="after")
    def _check_judge(self) -> LlmJudge:
        if self.model.scratch is not None:
            raise ValueError("model.scratch: a judge needs a trained model; set `path` or `endpoint`")
        if self.model.reasoning != "strip":
            raise ValueError("model.reasoning: is for teachers; the verdict is read from a judge's answer alone")
        if self.sampling.n != 1:
            raise ValueError("sampling.n: must be 1; a judge is asked once in each order")
        return self


Judge = Annotated[RewardJudge | TeacherJudge | LlmJudge, Field(discriminator="type")]


class Evaluation(Section):
    """Step 4: every system answers the held-out prompts, and the responses are compared.

    Changes to judges and intervals apply to the responses that are already sampled.
    """

    limit: int = Field(500, ge=1, description="Maximum number of held-out prompts to use.")
    decodings: dict[str, Decoding] = Field(
        default={},
        description="Decodings by name. Default: `sampled`, the decoding of sampling.student, and `greedy`, the same "
        "at temperature 0.",
    )
    warmup_temperatures: list[Annotated[float, Field(gt=0, le=2)]] = Field(
        default=[0.5, 0.25], description="Lower temperatures at which the warm-up student is also evaluated."
    )
    judge: str = Field(
        "rouge_l",
        description="Judge whose win rates head the report and decide whether another round follows: rouge_1, rouge_2 "
        "or rouge_l (against the reference), or a name in `judges`. It should differ from the score that selected the "
        "training pairs.",
        json_schema_extra=OPERATIONAL,
    )
    judges: dict[str, Judge] = Field(
        default={}, description="Additional judges by name.", json_schema_extra=OPERATIONAL
    )
    candidates: int = Field(
        4,
        ge=0,
        le=256,
        description="Number of responses of the warm-up student to each held-out prompt, whose likelihoods under all "
        "students are compared with their quality. Needs references, and a student that is not sampled greedily. 0: "
        "none.",
    )
    bootstrap: int = Field(
        2000,
        ge=100,
        le=100_000,
        description="Number of bootstrap resamples for the 95% intervals.",
        json_schema_extra=OPERATIONAL,
    )
    examples: int = Field(
        20,
        ge=0,
        description="Number of held-out prompts whose responses the report shows side by side.",
        json_schema_extra=OPERATIONAL,
    )
    gpus_per_judge: float = Field(
        1.0,
        ge=0,
        description="GPUs reserved for the worker of a reward-model judge, if the cluster has GPUs.",
        json_schema_extra=OPERATIONAL,
    )

    @field_validator("decodings")
    @classmethod
    def _check_decoding_names(cls, value: dict[str, Decoding]) -> dict[str, Decoding]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
                raise ValueError(
                    f"decoding name {name!r:.120}: use only letters, digits, '-', '_' and '.', with a letter or digit "
                    "first, and at most 100 of them"
                )
            if name.lower() in _FOLDERS_OF_DATASETS or re.fullmatch(
                r"(part-|t\d).*\.arrow|.*\.(json|lock)", name.lower()
            ):
                raise ValueError(f"decoding name {name!r}: reserved for the run directory; choose another name")
        return refuse_clash("decoding names", value)

    @model_validator(mode="after")
    def _check_warmup_temperatures(self) -> Evaluation:
        for temperature in self.warmup_temperatures:
            if (name := f"t{temperature:g}") in self.decodings:
                raise ValueError(
                    f"decodings: name {name!r}: reserved for the warm-up student at that temperature "
                    "(warmup_temperatures); choose another name"
                )
        return self

    @model_validator(mode="after")
    def _check_judges(self) -> Evaluation:
        refuse_clash("judges", self.judges)
        for name in self.judges:
            if name in (*REFERENCE_JUDGES, "candidates") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"judges: name {name!r}: use only letters, digits, '-' and '_', and neither the name of a metric "
                    "nor `candidates`"
                )
        known = [*REFERENCE_JUDGES, *self.judges]
        if self.judge not in known:
            raise ValueError(f"judge: {self.judge!r}: expected one of {', '.join(known)}; define others in `judges`")
        if self.candidates == 1:
            raise ValueError("candidates: 1: candidates are ranked against each other; set at least 2, or 0 for none")
        return self
