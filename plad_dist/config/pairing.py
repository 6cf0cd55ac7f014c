"""How pairs are built from samples."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.values import Bound, FromList, MessagesTemplate, PathText


class RewardModel(Section):
    """Model that scores responses: any sequence classifier with one output."""

    path: PathText = Field(
        description="Folder or hub name of an AutoModelForSequenceClassification with its tokenizer."
    )
    revision: str | None = Field(
        None, description="Revision of the hub repository. If unset, the repository's default branch."
    )
    template: MessagesTemplate | None = Field(
        None,
        description="Jinja template over `messages`, which include the response. Default: the tokenizer's chat "
        "template.",
    )
    max_length: int | None = Field(
        None,
        ge=8,
        description="Maximum length of a conversation, in tokens. Longer conversations get no score. If unset, 2048, "
        "or the context length of the model if that is shorter.",
    )
    batch_size: int = Field(16, ge=1, description="Conversations per batch.", json_schema_extra=OPERATIONAL)
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    _date: date | None = PrivateAttr(None)  # of the run, which the root of the config fills in


class Pairing(Section):
    """Step 2: pseudo-preference pairs, with the teacher's response preferred to the student's."""

    combine: Literal["all", "one", "best_worst"] = Field(
        "all",
        description="How to combine several samples of a prompt. all: every combination of a teacher and a student "
        "response. one: the first usable combination. best_worst: the teacher's best and the student's worst response "
        "by score.",
    )
    score: Literal["rouge_l", "reward_model", "function", "none"] = Field(
        "rouge_l",
        description="Score of a response. rouge_l: ROUGE-L against the reference, for prompts that have one. "
        "reward_model: output of `reward_model`. function: result of `score_function`. none: no score.",
    )
    reward_model: RewardModel | None = Field(None, description="Reward model for `score: reward_model`.")
    score_function: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="Function for `score: function`, as `package.module:name`. It takes a list of {messages, "
        "reference, response, role} and returns a list of numbers, with None for a response without a score.",
    )
    min_score_gap: float | None = Field(
        None,
        description="Minimum score of the chosen response minus that of the rejected one. If unset, any difference, "
        "including a negative one.",
    )
    max_pairs_per_prompt: int = Field(4, ge=1, description="Maximum number of pairs of a prompt with `combine: all`.")
    max_tokens: int | None = Field(
        None,
        ge=8,
        description="Maximum length of prompt and response together, in student tokens. If unset, the student's "
        "context length.",
    )
    length_ratio: Annotated[tuple[float, Bound], FromList] | None = Field(
        None,
        description="Allowed range [low, high] of the chosen response's tokens divided by the rejected response's "
        "tokens. `.inf` as the high end is no bound. If unset, any ratio.",
    )
    identical: Literal["drop", "keep"] = Field("drop", description="Action for a pair of identical responses.")
    empty: Literal["drop", "keep"] = Field("drop", description="Action for a pair with an empty response.")
    truncated_chosen: Literal["drop", "keep"] = Field(
        "drop",
        description="Action for a teacher response that reaches max_tokens. If kept, it has no end-of-sequence token.",
    )
    truncated_rejected: Literal["keep", "drop"] = Field(
        "keep", description="Action for a student response that reaches max_tokens."
    )
    workers: int = Field(
        1, ge=1, description="Maximum number of actors that build pairs.", json_schema_extra=OPERATIONAL
    )
    cpus_per_worker: float = Field(
        1.0,
        gt=0,
        description="CPU cores reserved for each actor, and for the worker of a reward-model judge.",
        json_schema_extra=OPERATIONAL,
    )
    gpus_per_worker: float = Field(
        0.0,
        ge=0,
        description="GPUs reserved for each actor. Only a reward model uses them.",
        json_schema_extra=OPERATIONAL,
    )

    @property
    def kept_pairs(self) -> int:
        """Maximum number of pairs of one prompt."""
        return self.max_pairs_per_prompt if self.combine == "all" else 1

    @model_validator(mode="after")
    def _check_scores(self) -> Pairing:
        for score, value in (("reward_model", self.reward_model), ("function", self.score_function)):
            name = "reward_model" if score == "reward_model" else "score_function"
            if (self.score == score) != (value is not None):
                raise ValueError(f"`score: {score}` and `{name}` need each other; set both or neither")
        if self.score == "none" and (self.combine == "best_worst" or self.min_score_gap is not None):
            raise ValueError("`combine: best_worst` and `min_score_gap` need scores; set `score`")
        if self.length_ratio is not None and not 0 <= self.length_ratio[0] <= self.length_ratio[1] > 0:
            raise ValueError(
                f"length_ratio: expected [low, high] with 0 <= low <= high > 0, got {list(self.length_ratio)}"
            )
        return self
