"""Several runs side by side: their systems on the held-out prompts that all of them have answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from plad_dist.catalog.systems import systems_of
from plad_dist.config import Config
from plad_dist.errors import UserError
from plad_dist.evaluation.metrics import score_system
from plad_dist.evaluation.report import comparison_page, with_interval
from plad_dist.evaluation.stage import evaluated_prompts, evaluated_run, outputs_of
from plad_dist.evaluation.statistics import bootstrap_mean, win_rate
from plad_dist.fingerprint import fingerprint
from plad_dist.rundir import PLAD, RUN_FILE, RunDir
from plad_dist.text_metrics import Output, Scores

_RESAMPLES, _SEED = 2000, 17


@dataclass(frozen=True)
class _Run:
    """A finished run as it is compared."""

    name: str
    config: Config
    run: RunDir
    metrics: Mapping[str, Any]
    prompts: list[
        str
    ]  # their texts, in the order of the answers: ids tell where a prompt stood in its source, which a seed may shuffle
    references: list[str | None]


@dataclass(frozen=True)
class _System:
    label: str
    system: str
    of: _Run
    contents: str
    rouge_l: Scores
    tokens: Scores
    finished: Scores


def compare_runs(paths: Sequence[str], decoding: str | None = None) -> dict[str, Any]:
    """Every system of the runs under one decoding, the main one where none is named, on the prompts that all have answered.

    Systems that are the same in several runs (a teacher that they share) appear once. Win rates are against the first run's
    PLaD student and against each run's own warm-up student.

    Raises:
        UserError: a run is not evaluated or has no such decoding, they have no prompt in common, or decode differently.
    """
    runs = [_opened(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    name = _decoding_of(runs, decoding)
    shared = set.intersection(*(set(run.prompts) for run in runs))
    common = [prompt for prompt in dict.fromkeys(runs[0].prompts) if prompt in shared]
    if not common:
        raise UserError(f"{', '.join(paths)}: have no held-out prompt in common: they were made of other prompts")
    systems = _systems(runs, name, common)
    first = next(each for each in systems if each.system == PLAD)
    return {
        "decoding": name,
        "prompts": len(common),
        "prompts_of_each": {run.name: len(run.prompts) for run in runs},
        "against": first.label,
        "systems": [_row(each, systems, first, name) for each in systems],
    }


def _decoding_of(runs: Sequence[_Run], wanted: str | None) -> str:
    """The name of a decoding that all runs have, and mean the same by."""
    used = []
    for run in runs:
        name, decodings = wanted or str(run.metrics["main_decoding"]), run.config.decodings()
        if name not in decodings:
            raise UserError(f"--decoding {name}: {run.name} has {', '.join(decodings)}")
        used.append((name, decodings[name]))
    if any(each != used[0] for each in used):
        told = "; ".join(f"{run.name}: {name}, {settings}" for run, (name, settings) in zip(runs, used, strict=True))
        raise UserError(f"these runs decode differently ({told}): evaluate them alike (evaluation.decodings)")
    return used[0][0]


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path that tells them apart."""
    parts = [RunDir.at(path).storage.url.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
    raise UserError(f"{twice}: is given twice")


def _opened(path: str, name: str) -> _Run:
    config, run, metrics = evaluated_run(path)
    prompts = evaluated_prompts(config, run).select(["messages", "reference"]).to_pylist()
    references = [prompt["reference"] for prompt in prompts]
    return _Run(name, config, run, metrics, [json.dumps(prompt, sort_keys=True) for prompt in prompts], references)


def _systems(runs: Sequence[_Run], decoding: str, common: Sequence[str]) -> list[_System]:
    """Those that say the same are one, but for the students that are compared, which may say what another system does."""
    found: list[_System] = []
    seen: set[str] = set()
    students: set[str] = set()
    order = {"teacher": 0, "warmup": 1, "seqkd": 2}
    named = [(order.get(system, 3), run, system) for run in runs for system in systems_of(run.config, run.run)]
    for _, run, system in sorted(named, key=lambda item: item[0]):
        place = {prompt: index for index, prompt in enumerate(run.prompts)}
        answers, rows = outputs_of(run.run, system, decoding), [place[prompt] for prompt in common]
        contents = _contents(run.prompts, answers)
        if contents in (students if system == PLAD else seen):
            continue
        seen.add(contents)
        if system == PLAD:
            students.add(contents)
        scores = score_system([run.references[row] for row in rows], [answers[row] for row in rows])
        of_a_run = f"{run.name}: {system}"
        label = run.name if system == PLAD else system if system in order or len(runs) == 1 else of_a_run
        if any(each.label == label for each in found):
            label = of_a_run
        found.append(_System(label, system, run, contents, scores.rouge_l, scores.tokens, scores.finished))
    return found


def _row(each: _System, systems: Sequence[_System], first: _System, decoding: str) -> dict[str, Any]:
    own = _contents(each.of.prompts, outputs_of(each.of.run, "warmup", decoding))
    warmup = next((other for other in systems if other.contents == own), None)
    calibration = (each.of.metrics.get("calibration") or {}).get("systems", {}).get(each.system) or {}
    loss = each.of.config.training.round.loss
    return {
        "label": each.label,
        "system": each.system,
        "loss": loss.name if each.system == PLAD else None,
        "rouge_l": _mean(each.rouge_l),
        "win_rate_vs_warmup": _wins(each, warmup),
        "win_rate_vs_first": _wins(each, first),
        "tokens_mean": _mean(each.tokens),
        "no_eos_share": _mean(1.0 - each.finished),
        "rank_correlation": calibration.get("rank_correlation"),
    }


def _contents(prompts: Sequence[str], answers: Sequence[Output]) -> str:
    """The same where a system said the same, however often it was sampled for it."""
    return fingerprint(
        "responses",
        prompts=list(prompts),
        responses=[[answer.text, answer.num_tokens, answer.finished] for answer in answers],
    )


def _mean(values_P: Scores) -> dict[str, float] | None:
    known = values_P[~np.isnan(values_P)]
    return bootstrap_mean(known, _RESAMPLES, _SEED).to_json() if known.size else None


def _wins(a: _System, b: _System | None) -> dict[str, float] | None:
    if b is None or a is b:
        return None
    known = ~np.isnan(a.rouge_l + b.rouge_l)
    return win_rate(a.rouge_l[known], b.rouge_l[known], _RESAMPLES, _SEED).to_json() if known.any() else None


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The systems for the terminal; percentages, 95% intervals in brackets."""
    most = max(comparison["prompts_of_each"].values())
    of = "" if most == comparison["prompts"] else f" of {most}"
    title = f"{comparison['prompts']}{of} held-out prompts in common, decoding {comparison['decoding']}"
    caption = (
        "Wins by ROUGE-L, ties half; warm-up: each run's own. Intervals over prompts: another seed may differ by more.\n"
        "A system that several runs share is one row, under its name in the first."
    )
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left", caption=caption,
        caption_justify="left",
    )  # fmt: skip
    headers = ["system", "loss", "ROUGE-L [95%]", "win vs\nwarm-up [95%]", f"win vs\n{comparison['against']} [95%]", "tokens", "no EOS",
               "rank\ncorrelation"]  # fmt: skip
    for place, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if place < 2 else "right")
    for row in comparison["systems"]:
        rank = row["rank_correlation"]
        table.add_row(
            Text(row["label"]),
            Text(row["loss"] or ""),
            *(Text(with_interval(row[key])) for key in ("rouge_l", "win_rate_vs_warmup", "win_rate_vs_first")),
            f"{row['tokens_mean']['value']:.1f}",
            f"{100 * row['no_eos_share']['value']:.1f}",
            "–" if rank is None else f"{rank['value']:.2f}",
            style="bold" if row["system"] == PLAD else "",
        )
    return table


def check_output(page: str) -> None:
    """Raise :class:`UserError` where a comparison must not be written: no page, in a run directory, over files of another kind."""
    html = Path(page)
    if html.suffix != ".html" or html.is_dir():
        raise UserError(
            f"--output {page!r}: expected the name of a page, such as compare.html; its figures go to compare.json"
        )
    if inside := next((folder for folder in html.absolute().parents if (folder / RUN_FILE).is_file()), None):
        raise UserError(
            f"--output {page}: lies in the run directory {inside}, whose files it must not mix with; write it beside it"
        )
    figures = html.with_suffix(".json")
    if (figures.exists() or html.exists()) and not _is_comparison(figures):
        raise UserError(
            f"--output {page}: {figures if figures.exists() else html} is there and is no comparison; use another name"
        )


def _is_comparison(figures: Path) -> bool:
    try:
        return {"against", "prompts_of_each", "systems"} <= dict(json.loads(figures.read_bytes())).keys()
    except (OSError, ValueError, TypeError):
        return False


def write_comparison(comparison: Mapping[str, Any], html: Path) -> None:
    """The page, and the figures as JSON beside it. Raises :class:`UserError` where they cannot be written."""
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.with_suffix(".json").write_text(json.dumps(comparison, indent=1), encoding="utf-8")
        html.write_text(comparison_page(comparison), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{html}: cannot be written ({error.strerror})") from None
