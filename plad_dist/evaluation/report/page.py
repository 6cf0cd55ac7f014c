"""The page of a round: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from plad_dist.config import Loss, Rejected
from plad_dist.config_yaml import load_plain_yaml
from plad_dist.evaluation.document import HeldoutFigures, Interval, Metrics
from plad_dist.evaluation.formatting import (
    NO_EOS_WARNING,
    NO_REFERENCES,
    brackets,
    layers_phrase,
    loss_phrase,
    percent,
    system_title,
    writer_phrase,
)
from plad_dist.evaluation.report import charts
from plad_dist.evaluation.report.charts import LogRecord, QualityPoint
from plad_dist.evaluation.report.templating import render_page
from plad_dist.systems import PLAD, SEQKD, WARMUP, System
from plad_dist.text_metrics import SystemDecoding
from plad_dist.timeline import StageTime
from plad_dist.training.records.collapse import CollapseRecord

_EXAMPLES_SHOWN = 4  # further examples are folded
_SHAPE = {"num_hidden_layers": "layers", "hidden_size": "wide", "num_attention_heads": "heads"}


@dataclass(frozen=True)
class Example:
    """A held-out prompt with the responses of all systems."""

    prompt: str
    reference: str | None
    responses: Mapping[System, str]


@dataclass(frozen=True)
class PairingSummary:
    """Outcome of the stage `pair`.

    Attributes:
        drops: number of dropped pairs by reason.
        teacher_win_share: share of scored combinations whose teacher response is the better
            one; None without scores.
        teacher_loss_share: share of scored combinations whose teacher response is the worse one.
    """

    pairs: int
    drops: Mapping[str, int]
    teacher_win_share: float | None
    teacher_loss_share: float | None = None


@dataclass(frozen=True)
class SamplingCost:
    """Amount of sampling for one purpose.

    Attributes:
        money: cost at endpoints, in the currency of their prices; None if nothing was paid.
    """

    samples: int
    prompt_tokens: int
    tokens: int
    money: float | None


@dataclass(frozen=True)
class Watch:
    """Findings of the collapse watch in one phase.

    Attributes:
        model_step: step of the checkpoint that became the model, if known.
    """

    record: CollapseRecord
    model_step: int | None


@dataclass(frozen=True)
class ReportData:
    """Content of the page. A section without data states that it is empty.

    Attributes:
        curves: log records of each phase, in the order of training. The records of phases that
            train on pairs also have `pair_accuracy`, `active_share`, `chosen_logp` and
            `rejected_logp`.
        lengths: number of tokens of every response.
        timings: time by stage.
        cost: amounts of sampling by purpose.
        watched: findings of the collapse watch by phase.
    """

    title: str
    metrics: Metrics
    curves: Mapping[str, Sequence[LogRecord]]
    lengths: Mapping[SystemDecoding, Sequence[int]]
    examples: Sequence[Example]
    config_yaml: str
    versions: Mapping[str, str]
    pairing: PairingSummary | None
    timings: Mapping[str, StageTime]
    cost: Mapping[str, SamplingCost] = field(default_factory=dict)
    watched: Mapping[str, Watch] = field(default_factory=dict)


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page."""

    label: str
    value: str
    note: str


def render_report(report: ReportData) -> str:
    """Return the page."""
    metrics = report.metrics
    quality = [
        QualityPoint(f"{system_title(row.system)}, {row.decoding}", row.system, row.rouge_l, row.win_rate_vs_warmup)
        for row in metrics.systems
    ]
    return render_page(
        "report.html.j2",
        report=report,
        metrics=metrics,
        facts=_facts(report),
        tiles=_tiles(metrics),
        quality=charts.quality_pictures(quality),
        curves=charts.curve_pictures(report.curves),
        calibration=charts.calibration_pictures(metrics.calibration),
        likelihood=charts.likelihood_pictures(report.curves),
        lengths=charts.length_picture(report.lengths),
        no_eos_warning=NO_EOS_WARNING,
        no_references=NO_REFERENCES,
        examples_shown=_EXAMPLES_SHOWN,
        ranked=_ranked(metrics),
        plad=PLAD,
    )


def _facts(report: ReportData) -> dict[str, str]:
    """Return the lines of the section "What was distilled", as far as the config can be read."""
    try:
        config = load_plain_yaml(report.config_yaml)
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    config = config.get("config", config)  # run.yaml has the config beside its fingerprint
    facts = {role.capitalize(): _model_phrase(config[role]) for role in ("teacher", "student") if config.get(role)}
    source = (config.get("prompts") or {}).get("source") or {}
    if source:
        paths = source.get("paths") or []
        facts["Prompts from"] = ", ".join(map(str, paths)) if paths else str(source.get("type", "")).replace("_", " ")
    loss = ((config.get("training") or {}).get("round") or {}).get("loss") or {}
    if loss:
        facts["Objective"] = loss_phrase(Loss(**loss))
    if rejected := (config.get("sampling") or {}).get("rejected"):
        facts["Rejected responses by"] = writer_phrase(Rejected(**rejected))
    if report.pairing is not None:
        facts["Preference pairs"] = f"{report.pairing.pairs:,}"
    prompts, with_reference = report.metrics.prompts, report.metrics.prompts_with_reference
    references = "all with a reference" if with_reference == prompts else f"{with_reference:,} with a reference"
    return {**facts, "Held-out prompts": f"{prompts:,}, {references}"}


def _model_phrase(section: Mapping[str, Any]) -> str:
    """Return the origin of a model of the config: its path, or its shape if it is from scratch."""
    cut = section.get("from")
    source = cut or section
    if source.get("path"):
        name = f"{source['path']}{'@' + str(source['revision']) if source.get('revision') else ''}"
        return f"{layers_phrase(cut['layers'])} of {name}" if cut else name
    architecture = (section.get("scratch") or {}).get("architecture") or {}
    counts = [(architecture[key], word) for key, word in _SHAPE.items() if key in architecture]
    shape = [f"{count} {word.removesuffix('s') if count == 1 else word}" for count, word in counts]
    return f"{architecture.get('model_type', 'model')} from scratch{': ' + ', '.join(shape) if shape else ''}"


def _tiles(metrics: Metrics) -> list[Tile]:
    """Return the few figures at the top of the page."""
    main = metrics.main_decoding
    rows = metrics.rows_under(main)
    plad, warmup = rows.get(PLAD), rows.get(WARMUP)
    tiles = []
    if plad and plad.win_rate_vs_warmup:
        tiles.append(_win_tile(f"Wins against warm-up, {main}", plad.win_rate_vs_warmup))
    if plad and warmup and plad.rouge_l and warmup.rouge_l:
        value = f"{percent(warmup.rouge_l)} → {percent(plad.rouge_l)}"
        greedy = metrics.rouge_l_difference.plad_minus_warmup.get("greedy") if main != "greedy" else None
        note = f"greedy {100 * greedy.value:+.1f} {brackets(greedy)}" if greedy else "warm-up → PLaD"
        tiles.append(Tile(f"ROUGE-L, {main}", value, note))
    if rate := metrics.plad_vs_seqkd.get(main):
        tiles.append(_win_tile(f"Wins against seq-KD, {main}", rate))
    if plad_rows := [row for row in metrics.systems if row.system == PLAD]:
        worst = max(plad_rows, key=lambda row: row.no_eos_share.value)
        label = f"PLaD responses cut off, {worst.decoding}"
        tiles.append(Tile(label, f"{percent(worst.no_eos_share)}%", "no end-of-sequence"))
    return tiles


def _ranked(metrics: Metrics) -> list[tuple[System, HeldoutFigures | None]]:
    """Return the figures of the held-out pairs by the system that ranked them."""
    if metrics.ranking is None:
        return []
    return [(metrics.previous, metrics.ranking.before), (PLAD, metrics.ranking.after), (SEQKD, metrics.ranking.seqkd)]


def _win_tile(label: str, rate: Interval) -> Tile:
    return Tile(label, f"{percent(rate)}%", f"{brackets(rate)}, ties half")
