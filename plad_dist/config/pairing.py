"""How pairs are made of samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from plad_dist.config.section import OPERATIONAL, Section


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

    @property
    def kept_pairs(self) -> int:
        """Most pairs that one prompt has."""
        return self.max_pairs_per_prompt if self.combine == "all" else 1

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
