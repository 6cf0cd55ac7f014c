"""Stage `evaluate`: all systems respond to the held-out prompts, and the responses are compared."""

from __future__ import annotations

from pathlib import Path

from plad_dist.catalog import systems_of, trained_systems
from plad_dist.config import Config, LlmJudge, RewardJudge
from plad_dist.data.claims import check_owned
from plad_dist.data.conversation import COLUMNS
from plad_dist.data.models import model_marker
from plad_dist.evaluation.document import Metrics, load_metrics
from plad_dist.evaluation.heldout import (
    candidates_of,
    evaluated_prompts,
    heldout_ranking,
    outputs_of,
    response_datasets,
)
from plad_dist.evaluation.judges import judge_all, template_text
from plad_dist.evaluation.metrics import compare
from plad_dist.evaluation.rounds import previous_system
from plad_dist.fingerprint import fingerprint
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir, require_model
from plad_dist.sampling.stage import are_systems_sampled, sample_systems
from plad_dist.systems import TEACHER, WARMUP, System
from plad_dist.text_metrics import main_decoding


def require_inputs(config: Config, run: RunDir) -> None:
    """Raise :class:`UserError` if the output of an earlier stage is missing."""
    _model_folders(config, run)
    for system in (TEACHER, WARMUP):
        for dataset in response_datasets(config, run, system):
            dataset.require("sample")


def _model_folders(config: Config, run: RunDir) -> dict[System, str]:
    """Return the model folders of the systems that a round trains.

    Raises:
        UserError: a model is missing.
    """
    folders = {system: str(run.model(phase)) for system, phase in trained_systems(config, run).items()}
    for folder in folders.values():
        require_model(folder, "train")
    return folders


def is_evaluated(config: Config, run: RunDir) -> bool:
    """Return True if the round has figures by these settings, and all responses are committed.

    Raises:
        UserError: the responses of a trained system are those of another config or model.
    """
    metrics = load_metrics(run)
    if metrics is None or metrics.settings != settings_fingerprint(config):
        return False
    trained = {system: str(run.model(phase)) for system, phase in trained_systems(config, run).items()}
    finished = {system: folder for system, folder in trained.items() if model_marker(Path(folder)) is not None}
    return are_systems_sampled(config, run, finished) and all(
        dataset.manifest() is not None
        for system in systems_of(config, run)
        for dataset in response_datasets(config, run, system)
    )


def settings_fingerprint(config: Config) -> str:
    """Return the fingerprint of how systems are compared, which may change after sampling."""
    evaluation = config.evaluation
    templates = [
        template_text(judge, f"evaluation.judges.{name}")
        for name, judge in evaluation.judges.items()
        if isinstance(judge, LlmJudge)
    ]
    return fingerprint(
        "evaluation", settings=evaluation.model_dump(mode="json", exclude={"gpus_per_judge"}), templates=templates
    )


def evaluate(config: Config, run: RunDir, progress: Progress) -> Metrics:
    """Sample the trained systems on the held-out prompts, compare all, and write the figures."""
    sample_systems(config, run, _model_folders(config, run), progress)
    decodings = {system: config.system_decodings(system) for system in systems_of(config, run)}
    outputs = {(system, name): outputs_of(run, system, name) for system, names in decodings.items() for name in names}
    temperatures = {name: decoding.temperature for by_name in decodings.values() for name, decoding in by_name.items()}
    prompts = evaluated_prompts(config, run).select(["prompt_id", "reference", *COLUMNS]).to_pylist()
    references = [prompt["reference"] for prompt in prompts]
    previous, main = previous_system(run), main_decoding(outputs, temperatures)
    metrics = compare(
        outputs,
        references,
        temperatures=temperatures,
        resamples=config.evaluation.bootstrap,
        seed=config.run.seed,
        ranking=heldout_ranking(config, run),
        judge=config.evaluation.judge,
        judgements=judge_all(config, run, prompts, outputs, main, previous, progress),
        trained_on=_trained_on(config),
        previous=previous,
        candidates=candidates_of(config, run, references),
        settings=settings_fingerprint(config),
    )
    check_owned(run.storage)
    run.storage.delete(run.report)  # it shows the previous figures
    run.storage.replace(run.metrics, metrics.to_bytes())
    return metrics


def _trained_on(config: Config) -> str | None:
    """Return the judge whose score decided which pairs were trained on, or how; else None."""
    pairing = config.pairing
    uses_scores = (
        pairing.min_score_gap is not None or pairing.combine == "best_worst" or config.training.round.loss.needs_scores
    )
    if not uses_scores or pairing.score == "none":
        return None
    if pairing.reward_model is None:
        return pairing.score
    paths = {judge.path: name for name, judge in config.evaluation.judges.items() if isinstance(judge, RewardJudge)}
    return paths.get(pairing.reward_model.path)
