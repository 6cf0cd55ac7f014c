"""Tables for the terminal: percentages with 95% intervals in brackets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from plad_dist.evaluation.comparison import Comparison
from plad_dist.evaluation.document import Metrics
from plad_dist.evaluation.formatting import NO_EOS_WARNING, duration, percent, with_interval
from plad_dist.evaluation.over_seeds import VariantFigures
from plad_dist.systems import PLAD
from plad_dist.timeline import StageTime
from plad_dist.untrusted import cell


def _new_table(title: str, caption: str | None = None) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )


def metrics_table(metrics: Metrics) -> Table:
    """Return the systems of a round, one row per system and decoding."""
    table = _new_table(f"{metrics.prompts} held-out prompts")
    for header in ("system", "decoding"):
        table.add_column(header, no_wrap=True)
    for header in ("ROUGE-L [95%]", "exact", "win vs\nwarm-up [95%]", "tokens", "no EOS"):
        table.add_column(Text(header), justify="right")
    for row in metrics.systems:
        cut_off = row.no_eos_share.value
        cells = [
            Text(str(row.system)),
            cell(row.decoding),
            Text(with_interval(row.rouge_l)),
            Text(percent(row.exact_match)),
            Text(with_interval(row.win_rate_vs_warmup)),
            Text(percent(row.tokens_mean, 1.0)),
            Text(percent(row.no_eos_share), style="bold red" if cut_off >= NO_EOS_WARNING else ""),
        ]
        table.add_row(*cells, style="bold" if row.system == PLAD else "")
    return table


def times_table(times: Mapping[str, StageTime]) -> Table:
    """Return the wall time of a run in minutes and seconds by stage and activity."""
    table = _new_table("Where the time went")
    table.add_column("stage", no_wrap=True)
    for header in (*StageTime._fields, "total"):
        table.add_column(header, justify="right")
    total = StageTime()
    for stage, spent in times.items():
        total = total.plus(spent)
        table.add_row(cell(stage), *map(duration, (*spent, spent.total)))
    table.add_row("total", *map(duration, (*total, total.total)), style="bold")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Return the systems of several runs."""
    largest = max(comparison.prompts_of_each.values())
    total = "" if largest == comparison.prompts else f" of {largest}"
    table = _new_table(
        f"{comparison.prompts}{total} held-out prompts in common, decoding {comparison.decoding}",
        "Wins by ROUGE-L, ties half; warm-up: the run's own. Intervals over prompts: another seed may differ by more.\n"
        "A system that several runs share is one row, under its name in the first of them.",
    )
    for header in ("system", "loss"):
        table.add_column(Text(header))
    for header in (
        "ROUGE-L [95%]", "win vs\nwarm-up [95%]", f"win vs\n{comparison.against} [95%]", "tokens", "no EOS",
        "rank\ncorrelation",
    ):  # fmt: skip
        table.add_column(Text(header), justify="right")
    for row in comparison.systems:
        table.add_row(
            cell(row.label),
            cell(row.loss or ""),
            *(Text(with_interval(x)) for x in (row.rouge_l, row.win_rate_vs_warmup, row.win_rate_vs_first)),
            percent(row.tokens_mean, 1.0),
            percent(row.no_eos_share),
            percent(row.rank_correlation, 1.0, 2),
            style="bold" if row.system == PLAD else "",
        )
    return table


def seeds_table(variants: Sequence[VariantFigures]) -> Table:
    """Return a table with one row for each variant of a study.

    A cell is the mean over the seeds with its 95% interval. All values are in per cent, except the
    gain in rank correlation.
    """
    table = _new_table(f"PLaD over {variants[0].seeds} seeds; 95% intervals over seeds and prompts")
    columns = {
        "rouge_l_plad": "ROUGE-L",
        "win_rate_vs_warmup": "win vs warm-up",
        "win_rate_vs_seqkd": "win vs seqkd",
        "greedy_win_rate_vs_seqkd": "greedy:\nwin vs seqkd",
        "pair_accuracy_gain": "pairs ranked\nright, gain",
    }
    table.add_column("variant")
    for header in [*columns.values(), "rank\ncorrelation, gain"]:
        table.add_column(Text(header), justify="right")
    for variant in variants:
        shares = [with_interval(variant.figures.get(name)) for name in columns]
        correlation = with_interval(variant.figures.get("calibration_gain"), 1.0, 2)
        table.add_row(cell(variant.variant), *map(Text, shares), Text(correlation))
    return table
