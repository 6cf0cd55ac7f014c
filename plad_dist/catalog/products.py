"""Catalog of a run: every dataset, model and set of figures, with its inputs and the recipe that makes it.

Status, verification, reuse and the report's table of costs loop over the catalog. A new kind of
dataset needs one entry here, and none of these needs to know its path.

The judges of a config may change while the run is under way, and the names of some datasets contain
a fingerprint. The catalog lists such datasets as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

import pyarrow as pa

from plad_dist.catalog import recipes
from plad_dist.catalog.recipes import Recipe
from plad_dist.catalog.systems import systems_of, trained_systems
from plad_dist.config import Config
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.schemas import INITIAL_LOGPS
from plad_dist.data.store import Dataset
from plad_dist.phases import SEQKD, TEACHER, WARMUP, phases_of, round_phase
from plad_dist.rundir import PLAD, RunDir, round_of
from plad_dist.text_metrics import main_decoding


class Purpose(Enum):
    """Use of a dataset in a run."""

    PROMPTS = auto()
    SAMPLES = auto()  # responses from which pairs are built
    PAIRS = auto()
    INITIAL_LOGPS = auto()  # log-likelihoods of pairs by the starting student
    RESPONSES = auto()  # of a system to the held-out prompts
    CANDIDATES = auto()
    CANDIDATE_SCORES = auto()  # log-likelihoods of the candidates by a trained student
    TEACHER_SCORES = auto()  # log-likelihoods of responses by the teacher as a judge
    QUESTIONS = auto()  # to a judge
    VERDICTS = auto()  # of a judge


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset of a run.

    Attributes:
        round: round that makes the dataset; 0 for the datasets that all rounds share.
        inputs: paths of the datasets and models from which it is made, all of them entries of the catalog.
        prompts: prompts to which the rows belong; None for the prompts themselves.
        limit: maximum number of these prompts; None for all.
        rows_per_prompt: None if the number differs from prompt to prompt.
        responder: `teacher`, `student` or the name of a judge, for datasets of responses.
    """

    dataset: Dataset
    purpose: Purpose
    recipe: Recipe
    round: int = 0
    inputs: tuple[str, ...] = ()
    prompts: Dataset | None = None
    limit: int | None = None
    rows_per_prompt: int | None = None
    responder: str | None = None

    @property
    def path(self) -> str:
        return self.dataset.path

    @property
    def schema(self) -> pa.Schema:
        return self.dataset.schema

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders of the run directory that belong to the dataset."""
        return (self.path,)

    @property
    def is_heldout(self) -> bool:
        """Whether the dataset depends on held-out prompts, and the figures of its round on the dataset."""
        return self.prompts is not None and self.prompts != train_prompts(self.dataset.storage)


@dataclass(frozen=True)
class ModelEntry:
    """A model that a run trains, or creates as the start of training.

    Attributes:
        phase: phase that trains the model; None for an untrained model from scratch.
        inputs: paths of the datasets and models from which it is made.
    """

    name: str
    phase: str | None
    recipe: Recipe
    inputs: tuple[str, ...]

    @property
    def path(self) -> str:
        return _model_path(self.name)

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders of the run directory that belong to the model, except checkpoints."""
        return (self.path, f"events/{self.name}") if self.phase else (self.path,)


@dataclass(frozen=True)
class FiguresEntry:
    """Figures of a round's evaluation, with its report."""

    run: RunDir
    recipe: Recipe = recipes.EVALUATION

    @property
    def path(self) -> str:
        return self.run.metrics

    @property
    def report(self) -> str:
        return self.run.report


Product = DatasetEntry | ModelEntry | FiguresEntry


def datasets_of(config: Config, run: RunDir, rounds: int | None = None) -> Iterator[DatasetEntry]:
    """Yield an entry for every dataset of a run, as :func:`products_of` does for all products."""
    return (product for product in products_of(config, run, rounds) if isinstance(product, DatasetEntry))


def models_of(config: Config, run: RunDir, rounds: int | None = None) -> Iterator[ModelEntry]:
    """Yield an entry for every model of a run, as :func:`products_of` does for all products."""
    return (product for product in products_of(config, run, rounds) if isinstance(product, ModelEntry))


def products_of(config: Config, run: RunDir, rounds: int | None = None) -> Iterator[Product]:
    """Yield an entry for every product of a run, whether it exists yet or not.

    Args:
        rounds: number of rounds; None for the maximum that the config allows.
    """
    if rounds is not None:
        config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"most": rounds})})
    for prompts in (train_prompts(run.storage), heldout_prompts(run.storage)):
        yield DatasetEntry(prompts, Purpose.PROMPTS, recipes.PROMPTS)
    yield from _models(config, run)
    for number in range(config.rounds.most):
        at_round = run.at_round(number)
        yield from _training_data(config, at_round)
        yield from _heldout_pairing_data(config, at_round)
        yield from _responses(config, at_round)
        yield from _candidates(config, at_round)
        yield from _judgements(config, at_round)
        yield FiguresEntry(at_round)


def stored_rounds(config: Config, run: RunDir) -> int:
    """Return the number of rounds that the config allows, or that storage has if these are more."""
    folders = ("samples/student", "pairs", "eval", "models")
    numbers = [round_of(name.rstrip("/")) for folder in folders for name in run.storage.sizes(folder)]
    return max(config.rounds.most, *(number + 1 for number in numbers if number is not None), 1)


# ------------------------------------------------------------------------------------------------------------ models


def _models(config: Config, run: RunDir) -> Iterator[ModelEntry]:
    train = train_prompts(run.storage).path
    scratch = {
        name: f"{name}-init"
        for name, model in (("teacher", config.teacher), ("student", config.student))
        if model is not None and model.scratch
    }
    for name, recipe in (("teacher", recipes.TEACHER), ("student", recipes.WARMUP)):
        if name in scratch:
            yield ModelEntry(scratch[name], None, recipe, (train,))
    for phase in phases_of(config):
        number = round_of(phase)
        if phase == TEACHER:
            start = (_model_path(scratch["teacher"]),) if "teacher" in scratch else ()
            yield ModelEntry(phase, phase, recipes.TEACHER, (train, *start))
        elif phase == WARMUP:
            start = (_model_path(scratch["student"]),) if "student" in scratch else ()
            yield ModelEntry(phase, phase, recipes.WARMUP, (train, *_warmup_responses(config, run), *start))
        else:
            at_round = run.at_round(number or 0)
            pairs = (at_round.pairs().path, at_round.heldout_pairs().path)
            recipe = recipes.CONTROL if phase == SEQKD else recipes.ROUND
            yield ModelEntry(phase, phase, recipe, (*pairs, *_student_model(config, at_round)))


def _warmup_responses(config: Config, run: RunDir) -> tuple[str, ...]:
    """Return the path of the teacher's samples if the warm-up learns from them."""
    warmup = config.training.warmup
    return (run.samples("teacher").path,) if warmup is not None and warmup.data == "teacher" else ()


def _model_path(name: str) -> str:
    return f"models/{name}"


def _teacher_model(config: Config) -> tuple[str, ...]:
    """Return the path of the teacher if the run trains it."""
    return (_model_path(TEACHER),) if config.training.teacher else ()


def _student_model(config: Config, run: RunDir) -> tuple[str, ...]:
    """Return the path of the student with which a round starts if the run trains it."""
    if run.round:
        return (_model_path(round_phase(run.round - 1)),)
    return (_model_path(WARMUP),) if config.training.warmup else ()


def _role(config: Config, run: RunDir, role: str) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe of a role's samples and the path of its model if the run trains it."""
    if role == "teacher":
        return recipes.TEACHER_SAMPLES, _teacher_model(config)
    return recipes.STUDENT_SAMPLES, _student_model(config, run)


# -------------------------------------------------------------------------------------------- samples and pairs


def _roles(run: RunDir) -> tuple[str, ...]:
    """Return the roles that a round samples: the teacher is sampled once, for all rounds."""
    return ("student",) if run.round else ("teacher", "student")


def _training_data(config: Config, run: RunDir) -> Iterator[DatasetEntry]:
    prompts, limit = train_prompts(run.storage), config.sampling.limit
    for role in _roles(run):
        recipe, model = _role(config, run, role)
        n = config.sampling.teacher.n if role == "teacher" else config.sampling.student.n
        inputs = (prompts.path, *model)
        yield DatasetEntry(run.samples(role), Purpose.SAMPLES, recipe, run.round, inputs, prompts, limit, n, role)
    yield from _pairs(config, run, run.pairs(), (run.samples("teacher"), run.samples("student")), prompts, limit)


def _heldout_pairing_data(config: Config, run: RunDir) -> Iterator[DatasetEntry]:
    prompts, limit = heldout_prompts(run.storage), config.evaluation.limit
    for role in _roles(run):
        recipe, model = _role(config, run, role)
        inputs = (prompts.path, *model)
        yield DatasetEntry(
            run.heldout_samples(role), Purpose.SAMPLES, recipe, run.round, inputs, prompts, limit, 1, role
        )
    samples = (run.heldout_samples("teacher"), run.heldout_samples("student"))
    yield from _pairs(config, run, run.heldout_pairs(), samples, prompts, limit)


def _pairs(
    config: Config, run: RunDir, pairs: Dataset, samples: tuple[Dataset, Dataset], prompts: Dataset, limit: int | None
) -> Iterator[DatasetEntry]:
    """Yield the entry of a dataset of pairs, and of the log-likelihoods that are stored beside the pairs."""
    start = _student_model(config, run)
    inputs = (*(dataset.path for dataset in samples), *start)
    yield DatasetEntry(pairs, Purpose.PAIRS, recipes.PAIRS, run.round, inputs, prompts, limit)
    for name in _stored_folders(run, pairs.path):
        if name.startswith("initial-logps-"):
            dataset = Dataset(run.storage, f"{pairs.path}/{name}", INITIAL_LOGPS)
            inputs = (pairs.path, *start)
            yield DatasetEntry(dataset, Purpose.INITIAL_LOGPS, recipes.ROUND, run.round, inputs, prompts, limit)


# ------------------------------------------------------------------------------------------------------- evaluation


def _responses(config: Config, run: RunDir) -> Iterator[DatasetEntry]:
    """Yield the responses of the systems that a round adds, under every decoding."""
    heldout, limit = heldout_prompts(run.storage), config.evaluation.limit
    trained = trained_systems(config, run)
    for system in trained if run.round else systems_of(config, run):
        role = "teacher" if system == TEACHER else "student"
        recipe, model = _role(config, run, role)
        if system in trained:
            recipe, model = recipes.EVALUATION, (_model_path(trained[system]),)
        inputs = (heldout.path, *model)
        for name in config.system_decodings(system):
            dataset = run.system_samples(system, name)
            yield DatasetEntry(dataset, Purpose.RESPONSES, recipe, run.round, inputs, heldout, limit, 1, role)


def _candidates(config: Config, run: RunDir) -> Iterator[DatasetEntry]:
    """Yield the candidates, and their scores by the students that a round trains."""
    heldout, limit, n = heldout_prompts(run.storage), config.evaluation.limit, config.candidates
    if not n:
        return
    if not run.round:
        recipe, model = _role(config, run, "student")
        inputs = (heldout.path, *model)
        yield DatasetEntry(run.candidates(), Purpose.CANDIDATES, recipe, 0, inputs, heldout, limit, n, "student")
    for system, phase in trained_systems(config, run).items():
        dataset, inputs = run.scored("candidates", system), (run.candidates().path, _model_path(phase))
        yield DatasetEntry(
            dataset, Purpose.CANDIDATE_SCORES, recipes.EVALUATION, run.round, inputs, heldout, limit, n, "student"
        )


def _judgements(config: Config, run: RunDir) -> Iterator[DatasetEntry]:
    """Yield the stored questions to judges, their verdicts, and the scores by the teacher."""
    heldout, limit, recipe = heldout_prompts(run.storage), config.evaluation.limit, recipes.EVALUATION
    for judge in _stored_folders(run, run.judges_folder):
        for name in _stored_folders(run, f"{run.judges_folder}/{judge}"):
            questions, verdicts = run.judge_questions(judge, name), run.judge_verdicts(judge, name)
            yield DatasetEntry(questions, Purpose.QUESTIONS, recipe, run.round, (heldout.path,), heldout)
            inputs: tuple[str, ...] = (questions.path,)
            yield DatasetEntry(verdicts, Purpose.VERDICTS, recipe, run.round, inputs, questions, None, 1, judge)
    decodings = config.decodings()
    main = main_decoding(
        [(PLAD, name) for name in decodings], {name: each.temperature for name, each in decodings.items()}
    )
    for judge in _stored_folders(run, run.scores_folder):
        for system in _stored_folders(run, f"{run.scores_folder}/{judge}") if judge != "candidates" else ():
            inputs = (run.system_samples(system, main).path, *_teacher_model(config))
            yield DatasetEntry(
                run.scored(judge, system), Purpose.TEACHER_SCORES, recipe, run.round, inputs, heldout, limit, 1, judge
            )


def _stored_folders(run: RunDir, folder: str) -> list[str]:
    """Return the names of the folders in a folder of the run directory."""
    return sorted(name[:-1] for name in run.storage.sizes(folder) if name.endswith("/"))
