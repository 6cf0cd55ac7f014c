"""The report of a round: one HTML page that needs nothing else, and the table that the terminal shows.

The page holds no script and asks for nothing over the network (its own Content-Security-Policy forbids both). Model
outputs are untrusted: everything is escaped by the template.
"""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from rich.text import Text

from plad_dist.config import Loss
from plad_dist.evaluation.verdict import NO_EOS_WARNING
from plad_dist.rundir import round_of
from plad_dist.training.records.collapse import CollapseRecord

Record = Mapping[str, Any]
Key = tuple[str, str]  # system, decoding

NAMES = {"teacher": "Teacher", "warmup": "Warm-up student", "seqkd": "Seq-KD control", "plad": "PLaD student"}
_JUDGES = {"rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
_EARLIER_ROUND = "#7c5cbf"
_COLORS = {"teacher": "#4b5563", "warmup": "#c2710c", "seqkd": "#00805f", "plad": "#0b5cad"}
_CURVE_POINTS = 200  # longer curves are averaged down to so many points
_TEXT_LIMIT = 4000  # characters of one prompt or output that are shown
# Control characters but tab and line ends, bidirectional controls, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_EXAMPLES_SHOWN = 4  # the others are folded away


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. Empty parts are said to be empty, never an error.

    `metrics`: from :func:`~plad_dist.evaluation.metrics.compare`. `curves`: log records of each phase in the order
    trained; those of a round also hold `pair_accuracy`, `active_share`, `chosen_logp`, `rejected_logp`. `lengths`:
    tokens of every output. `examples`: `prompt`, `reference` (or None) and `outputs` by label. `pairing`: `pairs`,
    `drops` by reason, `teacher_win_share` and `teacher_loss_share` (or None). `timings`: seconds by stage. `cost`: by who was
    sampled, `samples`, `prompt_tokens`, `tokens`, and `money` at endpoints (or None). `watched`: what watching has found of
    each phase, and the step of its model. `facts`: more lines for "what was distilled".
    """

    title: str
    metrics: Mapping[str, Any]
    curves: Mapping[str, Sequence[Record]]
    lengths: Mapping[Key, Sequence[int]]
    examples: Sequence[Record]
    config_yaml: str
    versions: Mapping[str, str]
    pairing: Mapping[str, Any]
    timings: Mapping[str, float]
    cost: Mapping[str, Record] = field(default_factory=dict)
    watched: Mapping[str, tuple[CollapseRecord, int | None]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A plot as a data URI, with the same content in words."""

    src: str
    alt: str
    caption: str


def render_report(report: ReportData) -> str:
    """The page as one string that encodes to UTF-8."""
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            metrics=report.metrics,
            facts=_facts(report),
            tiles=_tiles(report.metrics),
            quality=_quality_pictures(report.metrics["systems"]),
            curves=_curve_pictures(report.curves),
            calibration=_calibration_pictures(report.metrics["calibration"]),
            likelihood=[p for p in (_likelihood_picture(phase, r) for phase, r in report.curves.items()) if p],
            lengths=_length_picture(report.lengths),
            no_eos_warning=NO_EOS_WARNING,
            examples_shown=_EXAMPLES_SHOWN,
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """Several runs on one page. `comparison`: from :func:`~plad_dist.evaluation.comparison.compare_runs`."""
    pictures = _quality_pictures(comparison["systems"])
    page = _environment().get_template("comparison.html.j2").render(comparison=comparison, pictures=pictures)
    return page.encode("utf-8", "replace").decode("utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("plad_dist", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "brackets": _brackets,
        "clip": _clip,
        "duration": _duration,
        "system": _name,
        "phase": _phase,
        "judge": _judge,
    }
    environment.filters.update(filters)
    return environment


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """The systems for the terminal, a row for each system and decoding; percentages, 95% intervals in brackets."""
    title = f"{metrics['prompts']} held-out prompts"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for header in ("system", "decoding"):
        table.add_column(header, no_wrap=True)
    for header in ("ROUGE-L [95%]", "exact", "win vs\nwarm-up [95%]", "tokens", "no EOS"):
        table.add_column(Text(header), justify="right")
    for row in metrics["systems"]:
        endless = row["no_eos_share"]["value"]
        cells = [
            Text(row["system"]),
            Text(row["decoding"]),
            Text(with_interval(row["rouge_l"])),
            Text(_percent(row["exact_match"])),
            Text(with_interval(row["win_rate_vs_warmup"])),
            Text(f"{row['tokens_mean']['value']:.1f}"),
            Text(f"{100 * endless:.1f}", style="bold red" if endless >= NO_EOS_WARNING else ""),
        ]
        table.add_row(*cells, style="bold" if row["system"] == "plad" else "")
    return table


# ----------------------------------------------------------------------------------------------------- words, numbers


def _percent(x: Mapping[str, float] | None, factor: float = 100.0, digits: int = 1) -> str:
    return "–" if x is None else f"{factor * x['value']:.{digits}f}"


def _brackets(x: Mapping[str, float] | None, factor: float = 100.0, digits: int = 1) -> str:
    return "" if x is None else f"[{factor * x['low']:.{digits}f}, {factor * x['high']:.{digits}f}]"


def with_interval(x: Mapping[str, float] | None) -> str:
    """A share in per cent with its 95% interval, a dash for none."""
    return f"{_percent(x)} {_brackets(x)}".strip()


def _name(system: str) -> str:
    number = round_of(system)
    return NAMES.get(system, system) if number is None else f"PLaD, round {number}"


def _judge(name: str) -> str:
    return _JUDGES.get(name, name)


def _color(system: str) -> str:
    return _COLORS.get(system, _EARLIER_ROUND)


def _clip(text: str | None) -> str:
    """A model's text, shortened, with the characters named that would be invisible or turn the line around."""
    text = text or ""
    left_out = len(text) - _TEXT_LIMIT
    shown = _UNPRINTABLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text[:_TEXT_LIMIT])
    return shown if left_out <= 0 else f"{shown} … ({left_out} more characters)"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def _facts(report: ReportData) -> dict[str, str]:
    """What was distilled, from the config as far as it tells, and from the counts."""
    try:
        config = yaml.safe_load(report.config_yaml)
    except yaml.YAMLError:
        config = None
    config = config if isinstance(config, dict) else {}
    config = config.get("config", config)  # run.yaml holds it beside the fingerprint
    facts = {role.capitalize(): _model(config[role]) for role in ("teacher", "student") if config.get(role)}
    source = (config.get("prompts") or {}).get("source") or {}
    if source:
        paths = source.get("paths") or []
        facts["Prompts from"] = ", ".join(map(str, paths)) if paths else str(source.get("type", "")).replace("_", " ")
    loss = ((config.get("training") or {}).get("round") or {}).get("loss") or {}
    if loss:
        facts["Objective"] = loss_in_words(Loss(**loss))
    if "pairs" in report.pairing:
        facts["Preference pairs"] = f"{report.pairing['pairs']:,}"
    prompts, with_reference = report.metrics["prompts"], report.metrics["prompts_with_reference"]
    known = "all with a reference" if with_reference == prompts else f"{with_reference:,} with a reference"
    return {**facts, "Held-out prompts": f"{prompts:,}, {known}", **report.facts}


def loss_in_words(loss: Loss) -> str:
    """The loss with those of its numbers that it uses."""
    used: list[str] = [loss.name]
    if loss.name in ("rank", "margin", "listwise", "simpo"):
        used.append(f"margin {loss.margin:g}")
    if loss.name in ("dpo", "ipo", "simpo", "cpo", "orpo"):
        used.append(f"beta {loss.strength:g}")
    return ", ".join([*used, *(["per token"] if loss.per_token else []), f"anchor {loss.anchor:g}"])


def _model(section: Mapping[str, Any]) -> str:
    if section.get("path"):
        return f"{section['path']}{'@' + str(section['revision']) if section.get('revision') else ''}"
    architecture = (section.get("scratch") or {}).get("architecture") or {}
    counts = [(architecture[key], word) for key, word in _SHAPE.items() if key in architecture]
    shape = [f"{count} {word.removesuffix('s') if count == 1 else word}" for count, word in counts]
    return f"{architecture.get('model_type', 'model')} from scratch{': ' + ', '.join(shape) if shape else ''}"


_SHAPE = {"num_hidden_layers": "layers", "hidden_size": "wide", "num_attention_heads": "heads"}


def _tiles(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few figures at the top of the page."""
    main = metrics["main_decoding"]
    rows = {row["system"]: row for row in metrics["systems"] if row["decoding"] == main}
    tiles = []
    plad, warmup = rows.get("plad"), rows.get("warmup")
    if plad and plad["win_rate_vs_warmup"]:
        x = plad["win_rate_vs_warmup"]
        tiles.append(
            {"label": f"Wins against warm-up, {main}", "value": f"{_percent(x)}%", "note": f"{_brackets(x)}, ties half"}
        )
    if plad and warmup and plad["rouge_l"] and warmup["rouge_l"]:
        value = f"{_percent(warmup['rouge_l'])} → {_percent(plad['rouge_l'])}"
        greedy = metrics["rouge_l_difference"]["plad_minus_warmup"].get("greedy") if main != "greedy" else None
        note = f"greedy {100 * greedy['value']:+.1f} {_brackets(greedy)}" if greedy else "warm-up → PLaD"
        tiles.append({"label": f"ROUGE-L, {main}", "value": value, "note": note})
    if x := metrics["plad_vs_seqkd"].get(main):
        tiles.append(
            {"label": f"Wins against seq-KD, {main}", "value": f"{_percent(x)}%", "note": f"{_brackets(x)}, ties half"}
        )
    if of_plad := [row for row in metrics["systems"] if row["system"] == "plad"]:
        worst = max(of_plad, key=lambda row: float(row["no_eos_share"]["value"]))
        share = f"{_percent(worst['no_eos_share'])}%"
        tiles.append(
            {"label": f"PLaD outputs cut off, {worst['decoding']}", "value": share, "note": "no end-of-sequence"}
        )
    return tiles


# --------------------------------------------------------------------------------------------------------------- plots


def _figure(height: float) -> tuple[Any, Any]:
    """A figure 4.6 inches (442 CSS pixels) wide, so that its text stays readable on a phone."""
    figure = Figure(figsize=(4.6, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _picture(figure: Any, alt: str, caption: str) -> Picture:
    """SVG inside a data URI: sharp in print, its ids apart from the page's, and the same bytes for the same data."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "plad"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", alt, caption)


@dataclass(frozen=True)
class _Whisker:
    system: str
    decoding: str
    value: float
    thin: tuple[float, float]
    thick: tuple[float, float] | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        return self.name or f"{_name(self.system)}, {self.decoding}"


def _whisker_picture(
    rows: Sequence[_Whisker], what: str, caption: str, line_at: float | None = None, digits: int = 1
) -> Picture:
    figure, axes = _figure(0.75 + 0.29 * len(rows))
    if line_at is not None:
        axes.axvline(line_at, color="#111827", linewidth=1, linestyle=(0, (4, 3)))
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
    axes.set_xlabel(what)
    told = "; ".join(
        f"{row.label} {row.value:.{digits}f} ({row.thin[0]:.{digits}f} to {row.thin[1]:.{digits}f})" for row in rows
    )
    return _picture(figure, f"{what}: {told}.", caption)


def _quality_pictures(rows: Sequence[Record]) -> list[Picture]:
    """ROUGE-L and wins of systems, each by its `label` where it has one."""
    kinds = (
        ("rouge_l", "ROUGE-L (points of 100)", "Dots: mean over the prompts. Lines: 95% interval.", None),
        ("win_rate_vs_warmup", "Wins against the warm-up student (%)", "Right of the dashed line: better.", 50.0),
    )
    pictures = []
    for key, what, caption, line_at in kinds:
        whiskers = [
            _Whisker(
                row["system"],
                row.get("decoding", ""),
                100 * x["value"],
                (100 * x["low"], 100 * x["high"]),
                name=row.get("label"),
            )
            for row in rows
            if (x := row[key]) is not None
        ]
        if whiskers:
            pictures.append(_whisker_picture(whiskers, what, caption, line_at))
    return pictures


def _calibration_pictures(calibration: Mapping[str, Any] | None) -> list[Picture]:
    """Rank correlations of every system, and how far a gap of likelihoods can be believed."""
    if calibration is None:
        return []
    systems = calibration["systems"]
    rows = [
        _Whisker(system, how, x["value"], (x["low"], x["high"]))
        for system, found in systems.items()
        for key, how in (("rank_correlation", "sum"), ("rank_correlation_per_token", "per token"))
        if (x := found[key]) is not None
    ]
    pictures = []
    if rows:
        caption = "Of a prompt's candidates: does the likelier one have the higher quality? 1: always, 0: no relation."
        pictures.append(_whisker_picture(rows, "Rank correlation with quality", caption, 0.0, digits=2))
    curves = {system: found["reliability"] for system, found in systems.items() if found["reliability"]["curve"]}
    if curves:
        figure, axes = _figure(3.0)
        axes.plot([0.5, 1], [0.5, 1], color="#111827", linewidth=1, linestyle=(0, (4, 3)))
        told = []
        for system, found in curves.items():
            predicted, observed = ([row[key] for row in found["curve"]] for key in ("predicted", "observed"))
            axes.plot(predicted, observed, "o-", color=_color(system), label=_name(system), linewidth=1.6, markersize=4)
            told.append(f"{_name(system)} error {found['error']:.3f}")
        axes.set_xlabel("probability by the gap of likelihoods")
        axes.set_ylabel("share that was better")
        axes.set_xlim(0.49, 1.01)
        axes.legend(frameon=False, fontsize=9)
        caption = "Reliability of two candidates' likelihoods as a preference; dashed: as it should be"
        pictures.append(_picture(figure, f"{caption}: {', '.join(told)}.", f"{caption}."))
    return pictures


def _length_picture(lengths: Mapping[Key, Sequence[int]]) -> Picture | None:
    rows = []
    for (system, decoding), tokens in lengths.items():
        if len(tokens):
            p5, p25, p50, p75, p95 = (float(p) for p in np.percentile(tokens, [5, 25, 50, 75, 95]))
            rows.append(_Whisker(system, decoding, p50, (p5, p95), (p25, p75)))
    caption = "Dots: median. Bars: middle half. Lines: 5th to 95th percentile. Tokens of the model that wrote them."
    return _whisker_picture(rows, "Tokens in an output", caption) if rows else None


def _series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of what was logged under a key, averaged down to a few hundred points."""
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
    bins = [
        points[i : i + size]
        for size in [max(1, math.ceil(len(points) / _CURVE_POINTS))]
        for i in range(0, len(points), size)
    ]
    return [statistics.fmean(x for x, _ in b) for b in bins], [statistics.fmean(y for _, y in b) for b in bins]


def _line_picture(
    records: Sequence[Record], labels: Mapping[str, str], what: str, caption: str, factor: float = 1.0
) -> Picture | None:
    """Curves of some keys over the steps; nothing where none of the keys was logged."""
    figure, axes = _figure(2.7)
    told = []
    for (key, label), color, style in zip(labels.items(), ("#0b5cad", "#c2710c"), ("-", "--"), strict=False):
        steps, values = _series(records, key)
        if not values:
            continue
        axes.plot(steps, [factor * v for v in values], style, color=color, label=label, linewidth=1.7)
        told.append(f"{label} from {factor * values[0]:.3g} to {factor * values[-1]:.3g}")
    if not told:
        return None
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(labels) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best")
    return _picture(figure, f"{caption}: {', '.join(told)}.", caption)


def _curve_pictures(curves: Mapping[str, Sequence[Record]]) -> list[Picture]:
    pictures: list[Picture | None] = []
    for phase, records in curves.items():
        speeds = [r["tokens_per_s"] for r in records if r.get("tokens_per_s")]
        speed = f" (median {statistics.median(speeds):,.0f} tokens/s)" if speeds else ""
        pictures.append(_line_picture(records, {"loss": "loss"}, "loss", f"Loss of {_phase(phase)}{speed}"))
        shares = {"pair_accuracy": "ranked right", "active_share": "inside the margin (active)"}
        pictures.append(_line_picture(records, shares, "% of pairs", f"Training pairs of {_phase(phase)}", 100.0))
    return [picture for picture in pictures if picture]


def _likelihood_picture(phase: str, records: Sequence[Record]) -> Picture | None:
    if not any("rejected_logp" in record for record in records):  # a phase without pairs
        return None
    labels = {"chosen_logp": "chosen (teacher's)", "rejected_logp": "rejected (student's)"}
    return _line_picture(records, labels, "log-likelihood (nats)", f"Responses of the pairs during {_phase(phase)}")


def _phase(phase: str) -> str:
    return {"seqkd": "sequence-level KD", "warmup": "warm-up", "teacher": "teacher training"}.get(phase, phase)
