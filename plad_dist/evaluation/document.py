"""The document ``eval/round-N/metrics.json``: the figures of a round, and the verdict on them.

``metrics.py`` builds the document and ``stage.py`` writes it. The report, the model card,
comparisons, rounds, ``plad verify`` and the terminal read it. Shares are fractions of one. A figure
is null if nothing that it needs exists, such as references or a control. `VERSION` increases with
every change after which older code would misread the document.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, model_serializer
from pydantic import SerializerFunctionWrapHandler as Handler

from plad_dist.errors import RunFailed
from plad_dist.rundir import RunDir
from plad_dist.systems import System

VERSION: Final = 1

SystemName = Annotated[
    System,
    BeforeValidator(lambda value: System.parse(value) if isinstance(value, str) else value),
    PlainSerializer(str, return_type=str),
]


class JsonModel(BaseModel):
    """Immutable part of a JSON document. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values."""
        return self.model_dump(mode="json")


class _SparseModel(JsonModel):
    """Model whose optional keys are left out of the JSON if they have no value."""

    @model_serializer(mode="wrap")
    def _omit_missing(self, handler: Handler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class Interval(JsonModel):
    """A mean and its 95% interval."""

    value: float
    low: float
    high: float


class SystemRow(JsonModel):
    """Figures of one system under one decoding.

    Attributes:
        no_eos_share: share of responses that were cut at the token limit.
        repetition: mean share of repeated word 3-grams.
        win_rate_vs_warmup: by the main judge, against the warm-up student under the same decoding.
            The additional temperatures of the warm-up student are compared with the warm-up student
            under the main decoding.
    """

    system: SystemName
    decoding: str
    temperature: float
    rouge_1: Interval | None
    rouge_2: Interval | None
    rouge_l: Interval | None
    exact_match: Interval | None
    tokens_mean: Interval
    no_eos_share: Interval
    repetition: Interval
    win_rate_vs_warmup: Interval | None


class RougeDifferences(JsonModel):
    """Mean differences of ROUGE-L on the same prompts, by decoding.

    Attributes:
        plad_minus_cooler_warmup: PLaD under the main decoding minus the warm-up student under the
            named decoding, for decodings of the warm-up student that are cooler than the main one.
    """

    plad_minus_warmup: dict[str, Interval | None]
    plad_minus_seqkd: dict[str, Interval | None]
    teacher_minus_warmup: dict[str, Interval | None]
    plad_minus_cooler_warmup: dict[str, Interval | None]


class LengthClass(JsonModel):
    """Win rate on the prompts of one class: shorter, similar or longer than the other response."""

    prompts: int
    win_rate: Interval | None


class ByLength(JsonModel):
    """Win rates of `a` over `b` by the length of the response of `a` relative to that of `b`."""

    shorter: LengthClass
    similar: LengthClass
    longer: LengthClass


class JudgedPair(_SparseModel):
    """A judge's verdicts on system `a` against system `b`.

    Attributes:
        prompts: number of prompts with a verdict.
        ties: share of prompts without a preference.
        length_controlled: win rate at equal length.
        without_verdict: number of prompts that the judge was asked about without a readable
            verdict; for judges that read two responses.
        disagreement: share of prompts on which the two orders have opposite verdicts; for the same
            judges.
    """

    a: SystemName
    b: SystemName
    decoding: str
    prompts: int
    win_rate: Interval
    ties: float
    length_controlled: Interval
    by_length: ByLength
    without_verdict: int | None = None
    disagreement: float | None = None


class JudgeFigures(JsonModel):
    """All verdicts of one judge.

    Attributes:
        first_position: share of decided verdicts for the response that was shown first; for judges
            that read two responses.
        biased: True if `first_position` is too far from one half.
    """

    kind: str
    comparisons: tuple[JudgedPair, ...]
    first_position: Interval | None
    biased: bool

    def comparison(self, a: System, b: System) -> JudgedPair | None:
        """Return the verdicts on `a` against `b`, or None if the judge did not compare them."""
        return next((row for row in self.comparisons if (row.a, row.b) == (a, b)), None)


class HeldoutFigures(_SparseModel):
    """Figures of the held-out pairs under one model, as the trainer logged them; logps in nats."""

    pair_accuracy: float
    chosen_logp: float
    rejected_logp: float
    loss: float | None = None
    chosen_logp_per_token: float | None = None
    rejected_logp_per_token: float | None = None
    sampler_gap_per_token: float | None = None


class Ranking(_SparseModel):
    """Held-out pairs under the student before and after the round, and under sequence-level KD."""

    before: HeldoutFigures | None = None
    after: HeldoutFigures | None = None
    seqkd: HeldoutFigures | None = None
    pairs: int


class ReliabilityBin(JsonModel):
    """Pairs of candidates with similar predicted probabilities.

    Attributes:
        predicted: mean probability, by the likelihoods, that the likelier candidate is the better
            one.
        observed: share of pairs in which it is.
    """

    predicted: float
    observed: float
    pairs: int


class Reliability(JsonModel):
    """Reliability curve of likelihoods as preferences, and its expected calibration error."""

    curve: tuple[ReliabilityBin, ...]
    error: float | None


class SystemCalibration(JsonModel):
    """Agreement of one system's likelihoods with the quality of the candidates."""

    rank_correlation: Interval | None
    rank_correlation_per_token: Interval | None
    reliability: Reliability


class Calibration(JsonModel):
    """Agreement of likelihoods with quality over the candidates of each held-out prompt, by system.

    Attributes:
        judge: metric that measures the quality.
        candidates: number of candidates per prompt.
    """

    judge: str
    candidates: int
    systems: dict[SystemName, SystemCalibration]
    rank_correlation_difference: dict[str, Interval | None]


class Metrics(JsonModel):
    """Content of ``metrics.json``.

    Attributes:
        judge: name of the judge whose win rates head the figures.
        previous: system with which the round began.
        gain_of_round: win rate of the round's student over `previous` under the main decoding.
        judge_was_trained_on: True if the judge's score also decided which pairs were trained on, or
            how.
        settings: fingerprint of the evaluation settings that the figures belong to.
    """

    version: Literal[1]
    prompts: int
    prompts_with_reference: int
    main_decoding: str
    judge: str
    systems: tuple[SystemRow, ...]
    plad_vs_seqkd: dict[str, Interval | None]
    gain_of_round: Interval | None
    previous: SystemName
    rouge_l_difference: RougeDifferences
    judges: dict[str, JudgeFigures]
    judge_was_trained_on: bool
    ranking: Ranking | None
    calibration: Calibration | None
    verdict: tuple[str, ...]
    settings: str

    @property
    def main_judge(self) -> JudgeFigures:
        """Verdicts of the main judge, which `evaluation.judge` names. They always exist."""
        return self.judges[self.judge]

    def rows_under(self, decoding: str) -> dict[System, SystemRow]:
        """Return the rows of one decoding by system."""
        return {row.system: row for row in self.systems if row.decoding == decoding}

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(self.to_json(), indent=1).encode()


def load_metrics(run: RunDir) -> Metrics | None:
    """Return the figures of a round, or None if the round is not evaluated.

    Raises:
        RunFailed: the file is damaged, or another version of plad-dist wrote it in another form.
    """
    raw = run.storage.read_json(run.metrics)
    if raw is None:
        return None
    try:
        return Metrics.model_validate(raw)
    except ValidationError as error:
        raise RunFailed(
            f"{run.storage.url}/{run.metrics}: {_problem(raw, error)}. Delete it and run `plad evaluate` again: it is "
            "rebuilt from the committed samples"
        ) from None


def _problem(raw: Any, error: ValidationError) -> str:
    version = raw.get("version", VERSION) if isinstance(raw, dict) else VERSION
    if version != VERSION:
        return f"has version {version!r:.20}, this plad-dist reads version {VERSION}"
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "the document"
    return f"damaged: not the metrics of an evaluation ({place}: {first['msg']})"
