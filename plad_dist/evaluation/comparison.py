"""Comparison of several runs: their systems on the held-out prompts that all runs have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plad_dist.catalog import systems_of
from plad_dist.config import Config, Decoding
from plad_dist.data.conversation import COLUMNS
from plad_dist.errors import UserError
from plad_dist.evaluation.document import Interval, JsonModel, Metrics, SystemName
from plad_dist.evaluation.heldout import evaluated_prompts, outputs_of
from plad_dist.evaluation.report.charts import QualityPoint, quality_pictures
from plad_dist.evaluation.report.templating import render_page
from plad_dist.evaluation.rounds import evaluated_run
from plad_dist.evaluation.scores import score_system
from plad_dist.evaluation.statistics import mean_interval, win_rate
from plad_dist.fingerprint import fingerprint
from plad_dist.rundir import RUN_FILE, RunDir
from plad_dist.systems import PLAD, SEQKD, TEACHER, WARMUP, System
from plad_dist.text_metrics import Output, Scores

_RESAMPLES, _SEED = 2000, 17
_SHARED = (TEACHER, WARMUP, SEQKD)  # systems that runs may share, in the order of the table


class ComparisonRow(JsonModel):
    """Figures of one system of one run.

    Attributes:
        label: the run's name for its PLaD student, otherwise the name of the system.
        loss: loss of the round that trained a PLaD student.
        win_rate_vs_warmup: against the warm-up student of the system's own run.
        win_rate_vs_first: against the PLaD student of the first run.
        rank_correlation: of likelihood and quality over the candidates of the system's run.
    """

    label: str
    system: SystemName
    loss: str | None
    rouge_l: Interval | None
    win_rate_vs_warmup: Interval | None
    win_rate_vs_first: Interval | None
    tokens_mean: Interval | None
    no_eos_share: Interval | None
    rank_correlation: Interval | None


class Comparison(JsonModel):
    """Systems of several runs under one decoding: the content of ``compare.json``.

    Attributes:
        prompts: number of held-out prompts that all runs have in common.
        prompts_of_each: number of held-out prompts by run.
        against: label of the first run's PLaD student.
    """

    decoding: str
    prompts: int
    prompts_of_each: dict[str, int]
    against: str
    systems: tuple[ComparisonRow, ...]


@dataclass(frozen=True)
class _ComparedRun:
    """A finished run.

    Attributes:
        prompts: texts of the held-out prompts, in the order of the responses. Ids would not do:
            they give the position of a prompt in its source, which may be shuffled by the seed.
    """

    name: str
    config: Config
    run: RunDir
    metrics: Metrics
    prompts: list[str]
    references: list[str | None]


@dataclass(frozen=True)
class _ComparedSystem:
    """A system of a run, with its scores on the common prompts.

    Attributes:
        contents: fingerprint of all its responses, by which runs share a system.
    """

    label: str
    system: System
    owner: _ComparedRun
    contents: str
    rouge_l: Scores
    tokens: Scores
    finished: Scores


def compare_runs(paths: Sequence[str], decoding: str | None = None) -> Comparison:
    """Compare every system of the runs on the prompts that all runs have responded to.

    Systems with identical responses in several runs, such as a common teacher, appear once. Win
    rates are against the first run's PLaD student and against each run's own warm-up student.

    Args:
        decoding: name of a decoding of all runs; the main decoding if None.

    Raises:
        UserError: a run is not evaluated or has no such decoding, or the runs have no prompt in
            common or decode differently.
    """
    runs = [_open_run(path, name) for path, name in zip(paths, _distinct_names(paths), strict=True)]
    name = _common_decoding(runs, decoding)
    shared = set.intersection(*(set(run.prompts) for run in runs))
    common = [prompt for prompt in dict.fromkeys(runs[0].prompts) if prompt in shared]
    if not common:
        raise UserError(f"{', '.join(paths)}: no held-out prompt in common; compare runs of the same prompts")
    systems = _distinct_systems(runs, name, common)
    first = next(system for system in systems if system.system == PLAD)
    return Comparison(
        decoding=name,
        prompts=len(common),
        prompts_of_each={run.name: len(run.prompts) for run in runs},
        against=first.label,
        systems=tuple(_row(system, systems, first, name) for system in systems),
    )


def _distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest end of each path that differs from those of all other paths."""
    parts = [RunDir.at(path).storage.url.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
    raise UserError(f"{twice}: given twice; name each run once")


def _open_run(path: str, name: str) -> _ComparedRun:
    config, run, metrics = evaluated_run(path)
    prompts = evaluated_prompts(config, run).select([*COLUMNS, "reference"]).to_pylist()
    references = [prompt["reference"] for prompt in prompts]
    texts = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
    return _ComparedRun(name, config, run, metrics, texts, references)


def _common_decoding(runs: Sequence[_ComparedRun], name: str | None) -> str:
    """Return the name of a decoding that all runs have with the same settings."""
    used: list[tuple[str, Decoding]] = []
    for run in runs:
        own_name, decodings = name or run.metrics.main_decoding, run.config.decodings()
        if own_name not in decodings:
            raise UserError(f"--decoding {own_name}: {run.name} has {', '.join(decodings)}")
        used.append((own_name, decodings[own_name]))
    if any(decoding != used[0] for decoding in used):
        settings = [f"{run.name}: {used_name}, {own}" for run, (used_name, own) in zip(runs, used, strict=True)]
        raise UserError(
            f"these runs decode differently ({'; '.join(settings)}); evaluate them with the same evaluation.decodings"
        )
    return used[0][0]


def _distinct_systems(runs: Sequence[_ComparedRun], decoding: str, common: Sequence[str]) -> list[_ComparedSystem]:
    """Return the systems of all runs, each once.

    Systems with identical responses count as one, except that a PLaD student is kept even if its
    responses are those of another kind of system.
    """
    systems: list[_ComparedSystem] = []
    seen: set[str] = set()
    seen_students: set[str] = set()
    candidates = [(run, system) for run in runs for system in systems_of(run.config, run.run)]
    order = {system: position for position, system in enumerate(_SHARED)}
    for run, system in sorted(candidates, key=lambda pair: order.get(pair[1], len(order))):
        outputs = outputs_of(run.run, system, decoding)
        contents = _contents(run.prompts, outputs)
        if contents in (seen_students if system == PLAD else seen):
            continue
        seen.add(contents)
        if system == PLAD:
            seen_students.add(contents)
        row_of_prompt = {prompt: row for row, prompt in enumerate(run.prompts)}
        rows = [row_of_prompt[prompt] for prompt in common]
        scores = score_system([run.references[row] for row in rows], [outputs[row] for row in rows])
        label = _label(run, system, is_only_run=len(runs) == 1, used={other.label for other in systems})
        systems.append(_ComparedSystem(label, system, run, contents, scores.rouge_l, scores.tokens, scores.finished))
    return systems


def _label(run: _ComparedRun, system: System, *, is_only_run: bool, used: set[str]) -> str:
    full = f"{run.name}: {system}"
    short = str(system) if system in _SHARED or is_only_run else full
    label = run.name if system == PLAD else short
    return full if label in used else label


def _row(
    system: _ComparedSystem, systems: Sequence[_ComparedSystem], first: _ComparedSystem, decoding: str
) -> ComparisonRow:
    owner = system.owner
    warmup_contents = _contents(owner.prompts, outputs_of(owner.run, WARMUP, decoding))
    warmup = next((other for other in systems if other.contents == warmup_contents), None)
    calibration = owner.metrics.calibration
    calibrated = calibration.systems.get(system.system) if calibration is not None else None
    return ComparisonRow(
        label=system.label,
        system=system.system,
        loss=owner.config.training.round.loss.name if system.system == PLAD else None,
        rouge_l=mean_interval(system.rouge_l, _RESAMPLES, _SEED),
        win_rate_vs_warmup=_win_rate(system, warmup),
        win_rate_vs_first=_win_rate(system, first),
        tokens_mean=mean_interval(system.tokens, _RESAMPLES, _SEED),
        no_eos_share=mean_interval(1.0 - system.finished, _RESAMPLES, _SEED),
        rank_correlation=calibrated.rank_correlation if calibrated is not None else None,
    )


def _contents(prompts: Sequence[str], outputs: Sequence[Output]) -> str:
    """Return a fingerprint of a system's responses, whichever run sampled them."""
    return fingerprint(
        "responses",
        prompts=list(prompts),
        responses=[[output.text, output.num_tokens, output.finished] for output in outputs],
    )


def _win_rate(a: _ComparedSystem, b: _ComparedSystem | None) -> Interval | None:
    if b is None or a is b:
        return None
    has_both = ~np.isnan(a.rouge_l + b.rouge_l)
    return win_rate(a.rouge_l[has_both], b.rouge_l[has_both], _RESAMPLES, _SEED) if has_both.any() else None


# -- files and page


def comparison_page(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    quality = [QualityPoint(row.label, row.system, row.rouge_l, row.win_rate_vs_warmup) for row in comparison.systems]
    return render_page("comparison.html.j2", comparison=comparison, pictures=quality_pictures(quality), plad=PLAD)


def check_output(page: str) -> None:
    """Check that a comparison may be written to a page.

    Raises:
        UserError: the path is not an HTML page, is inside a run directory, or names existing files
            of another kind.
    """
    html = Path(page)
    if html.suffix != ".html" or html.is_dir():
        raise UserError(
            f"--output {page!r}: expected the name of a page, such as compare.html; its figures go to compare.json"
        )
    if inside := next((folder for folder in html.absolute().parents if (folder / RUN_FILE).is_file()), None):
        raise UserError(f"--output {page}: inside the run directory {inside}; choose a path outside of it")
    figures = html.with_suffix(".json")
    if (figures.exists() or html.exists()) and not _is_comparison(figures):
        raise UserError(
            f"--output {page}: {figures if figures.exists() else html} exists and is not a comparison; choose another "
            "name"
        )


def _is_comparison(figures: Path) -> bool:
    try:
        raw: Mapping[str, Any] = dict(json.loads(figures.read_bytes()))
    except (OSError, ValueError, TypeError):
        return False
    return {"against", "prompts_of_each", "systems"} <= raw.keys()


def write_comparison(comparison: Comparison, html: Path) -> None:
    """Write the page, and its figures as JSON beside it.

    Raises:
        UserError: the files cannot be written.
    """
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.with_suffix(".json").write_text(json.dumps(comparison.to_json(), indent=1), encoding="utf-8")
        html.write_text(comparison_page(comparison), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{html}: cannot be written ({error.strerror})") from None
