"""Charts of the pages, as SVG images inside data URIs, each with the same content in words."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plad_dist.evaluation.document import Calibration, Interval, SystemCalibration
from plad_dist.evaluation.formatting import phase_phrase, system_title
from plad_dist.systems import Kind, System
from plad_dist.text_metrics import SystemDecoding

LogRecord = Mapping[str, Any]  # one line of a phase's metrics.jsonl

_COLORS: dict[Kind, str] = {"teacher": "#4b5563", "warmup": "#c2710c", "seqkd": "#00805f", "plad": "#0b5cad"}
_EARLIER_ROUND = "#7c5cbf"
_INK = "#111827"
_DASHED = (0, (4, 3))
_CURVE_POINTS = 200  # longer curves are averaged down to about this many points


@dataclass(frozen=True)
class Picture:
    """A chart as a data URI, with the same content in words."""

    src: str
    alt: str
    caption: str


@dataclass(frozen=True)
class QualityPoint:
    """Quality of one labelled system, for :func:`quality_pictures`."""

    label: str
    system: System
    rouge_l: Interval | None
    win_rate_vs_warmup: Interval | None


def _color(system: System) -> str:
    return _COLORS[system.kind] if system.round is None else _EARLIER_ROUND


def _new_figure(height: float) -> tuple[Any, Any]:
    """Return a figure and its axes.

    It is 4.6 inches (442 CSS pixels) wide, so that its text stays readable on a phone.
    """
    figure = Figure(figsize=(4.6, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _picture(figure: Any, alt: str, caption: str) -> Picture:
    """Return the figure as SVG in a data URI: sharp in print, with ids separate from the page's.

    The same data gives the same bytes.
    """
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "plad"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", alt, caption)


# -- whiskers


@dataclass(frozen=True)
class _Whisker:
    """A labelled value with a thin range and, optionally, a thick range."""

    label: str
    system: System
    value: float
    thin: tuple[float, float]
    thick: tuple[float, float] | None = None


def _whisker_picture(
    rows: Sequence[_Whisker], axis: str, caption: str, line_at: float | None = None, digits: int = 1
) -> Picture:
    figure, axes = _new_figure(0.75 + 0.29 * len(rows))
    if line_at is not None:
        axes.axvline(line_at, color=_INK, linewidth=1, linestyle=_DASHED)
    for y, row in enumerate(rows):
        color = _color(row.system)
        axes.hlines(y, *row.thin, color=color, linewidth=1.6)
        if row.thick:
            axes.hlines(y, *row.thick, color=color, linewidth=6, alpha=0.45)
        axes.plot(row.value, y, "o", color=color, markersize=5.5)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(length=0)
    if any(row.thick for row in rows):
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(axis)
    words = "; ".join(
        f"{row.label} {row.value:.{digits}f} ({row.thin[0]:.{digits}f} to {row.thin[1]:.{digits}f})" for row in rows
    )
    return _picture(figure, f"{axis}: {words}.", caption)


def quality_pictures(quality: Sequence[QualityPoint]) -> list[Picture]:
    """Return the charts of ROUGE-L and of wins, as far as there are values."""

    def whiskers(intervals: Sequence[Interval | None]) -> list[_Whisker]:
        return [
            _Whisker(point.label, point.system, 100 * x.value, (100 * x.low, 100 * x.high))
            for point, x in zip(quality, intervals, strict=True)
            if x is not None
        ]

    pictures = []
    if rows := whiskers([point.rouge_l for point in quality]):
        caption = "Dots: mean over the prompts. Lines: 95% interval."
        pictures.append(_whisker_picture(rows, "ROUGE-L (points of 100)", caption))
    if rows := whiskers([point.win_rate_vs_warmup for point in quality]):
        caption = "Right of the dashed line: better than the warm-up student."
        pictures.append(_whisker_picture(rows, "Wins against the warm-up student (%)", caption, 50.0))
    return pictures


def length_picture(lengths: Mapping[SystemDecoding, Sequence[int]]) -> Picture | None:
    """Return the chart of response lengths, by system and decoding; None without responses."""
    rows = []
    for (system, decoding), tokens in lengths.items():
        if len(tokens):
            p5, p25, p50, p75, p95 = (float(p) for p in np.percentile(tokens, [5, 25, 50, 75, 95]))
            rows.append(_Whisker(f"{system_title(system)}, {decoding}", system, p50, (p5, p95), (p25, p75)))
    caption = (
        "Dots: median. Bars: middle half. Lines: 5th to 95th percentile. Tokens of the model that wrote the response."
    )
    return _whisker_picture(rows, "Tokens in a response", caption) if rows else None


# -- calibration


def calibration_pictures(calibration: Calibration | None) -> list[Picture]:
    """Return the charts of rank correlations and of reliability, as far as there are values."""
    if calibration is None:
        return []
    rows = [
        _Whisker(f"{system_title(system)}, {kind}", system, x.value, (x.low, x.high))
        for system, figures in calibration.systems.items()
        for kind, x in (("sum", figures.rank_correlation), ("per token", figures.rank_correlation_per_token))
        if x is not None
    ]
    pictures = []
    if rows:
        caption = (
            "Over the candidates of a prompt: does the likelier response have the higher quality? 1: always, 0: no "
            "relation."
        )
        pictures.append(_whisker_picture(rows, "Rank correlation with quality", caption, 0.0, digits=2))
    if any(figures.reliability.curve for figures in calibration.systems.values()):
        pictures.append(_reliability_picture(calibration.systems))
    return pictures


def _reliability_picture(systems: Mapping[System, SystemCalibration]) -> Picture:
    figure, axes = _new_figure(3.0)
    axes.plot([0.5, 1], [0.5, 1], color=_INK, linewidth=1, linestyle=_DASHED)
    errors = []
    for system, figures in systems.items():
        if not figures.reliability.curve:
            continue
        predicted = [row.predicted for row in figures.reliability.curve]
        observed = [row.observed for row in figures.reliability.curve]
        title = system_title(system)
        axes.plot(predicted, observed, "o-", color=_color(system), label=title, linewidth=1.6, markersize=4)
        errors.append(f"{title} error {figures.reliability.error:.3f}")
    axes.set_xlabel("probability by the gap of likelihoods")
    axes.set_ylabel("share that was better")
    axes.set_xlim(0.49, 1.01)
    axes.legend(frameon=False, fontsize=9)
    caption = "Reliability of two candidates' likelihoods as a preference; dashed: perfectly reliable"
    return _picture(figure, f"{caption}: {', '.join(errors)}.", f"{caption}.")


# -- training curves


def curve_pictures(curves: Mapping[str, Sequence[LogRecord]]) -> list[Picture]:
    """Return the charts of loss, pair accuracy and load of experts over the steps, by phase."""
    pictures: list[Picture | None] = []
    for phase, records in curves.items():
        name = phase_phrase(phase)
        speeds = [record["tokens_per_s"] for record in records if record.get("tokens_per_s")]
        speed = f" (median {statistics.median(speeds):,.0f} tokens/s)" if speeds else ""
        pictures.append(_line_picture(records, {"loss": "loss"}, "loss", f"Loss of {name}{speed}"))
        shares = {"pair_accuracy": "ranked correctly", "active_share": "inside the margin (active)"}
        pictures.append(_line_picture(records, shares, "% of pairs", f"Training pairs of {name}", 100.0))
        load = {"largest_expert_load": "the expert with most tokens of a layer"}
        pictures.append(_line_picture(records, load, "% of tokens", f"Largest load of an expert in {name}", 100.0))
    return [picture for picture in pictures if picture]


def likelihood_pictures(curves: Mapping[str, Sequence[LogRecord]]) -> list[Picture]:
    """Return the charts of chosen and rejected likelihoods, for each phase that trains on pairs."""
    labels = {"chosen_logp": "chosen (teacher's)", "rejected_logp": "rejected (student's)"}
    pictures = [
        _line_picture(records, labels, "log-likelihood (nats)", f"Responses of the pairs during {phase_phrase(phase)}")
        for phase, records in curves.items()
        if any("rejected_logp" in record for record in records)
    ]
    return [picture for picture in pictures if picture]


def _line_picture(
    records: Sequence[LogRecord], labels: Mapping[str, str], axis: str, caption: str, factor: float = 1.0
) -> Picture | None:
    """Return curves of some keys over the steps; None if none of the keys was logged."""
    figure, axes = _new_figure(2.7)
    words = []
    for (key, label), color, style in zip(labels.items(), ("#0b5cad", "#c2710c"), ("-", "--"), strict=False):
        steps, values = _series(records, key)
        if not values:
            continue
        axes.plot(steps, [factor * value for value in values], style, color=color, label=label, linewidth=1.7)
        words.append(f"{label} from {factor * values[0]:.3g} to {factor * values[-1]:.3g}")
    if not words:
        return None
    axes.set_xlabel("step")
    axes.set_ylabel(axis)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(labels) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best")
    return _picture(figure, f"{caption}: {', '.join(words)}.", caption)


def _series(records: Sequence[LogRecord], key: str) -> tuple[list[float], list[float]]:
    """Return the steps and the logged values of a key, averaged down to a few hundred points."""
    points = [
        (record["step"], record[key])
        for record in records
        if record.get(key) is not None and math.isfinite(record[key])
    ]
    size = max(1, math.ceil(len(points) / _CURVE_POINTS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    steps = [statistics.fmean(step for step, _ in members) for members in bins]
    return steps, [statistics.fmean(value for _, value in members) for members in bins]
