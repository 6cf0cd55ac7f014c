"""Catalog of a run: every dataset, model and set of figures, with its inputs and its recipe.

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

from plad_dist import recipes, systems
from plad_dist.config import Config
from plad_dist.data.dataset import Dataset
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.schemas import INITIAL_LOGPS
from plad_dist.phases import SEQKD, TEACHER, WARMUP, phases_of, round_phase
from plad_dist.recipes import Recipe
from plad_dist.rundir import RunDir, round_of
from plad_dist.systems import PLAD, System
from plad_dist.text_metrics import main_decoding


def trained_systems(config: Config, run: RunDir) -> dict[System, str]:
    """Return the systems that a round trains, each with the phase that makes its model."""
    control = {systems.SEQKD: SEQKD} if config.training.seqkd and not run.round else {}
    return control | {PLAD: round_phase(run.round)}


def systems_of(config: Config, run: RunDir) -> list[System]:
    """Return all systems that a round compares, including the students of earlier rounds."""
    control = [systems.SEQKD] if config.training.seqkd else []
    earlier = [System("plad", number) for number in range(run.round)]
    return [systems.TEACHER, systems.WARMUP, *control, *earlier, PLAD]


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
        round: round that makes the dataset; 0 for datasets that all rounds share.
        inputs: paths of the datasets and models from which it is made, all of which have entries.
        prompts: prompts to which the rows belong; None for the prompts themselves.
        limit: maximum number of these prompts; None for all.
        rows_per_prompt: None if the number differs from prompt to prompt.
        responder: `teacher`, `student`, `rejected` (a model that writes the rejected responses in
            place of the student of the round) or the name of a judge, for datasets of responses.
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
        """True if the rows belong to held-out prompts, so that the figures depend on them."""
        return self.prompts is not None and self.prompts != train_prompts(self.dataset.storage)


@dataclass(frozen=True)
class ModelEntry:
    """A model that a run trains, or creates as the start of training.

    Attributes:
        phase: phase that trains the model; None for one that the run creates before any training.
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
    """Yield an entry for every dataset of a run, whether it exists yet or not.

    Args:
        rounds: number of rounds; None for the maximum that the config allows.
    """
    return (product for product in products_of(config, run, rounds) if isinstance(product, DatasetEntry))


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
        at_round = _Round(config, run.at_round(number))
        yield from at_round.training_data()
        yield from at_round.heldout_pairing_data()
        yield from at_round.responses()
        yield from at_round.candidates()
        yield from at_round.verdicts()
        yield from at_round.teacher_scores()
        yield FiguresEntry(at_round.run)


def stored_rounds(config: Config, run: RunDir) -> int:
    """Return the number of rounds that the config allows, or that storage has if these are more."""
    folders = ("samples/student", "pairs", "eval", "models")
    numbers = [round_of(name.rstrip("/")) for folder in folders for name in run.storage.sizes(folder)]
    return max(config.rounds.most, *(number + 1 for number in numbers if number is not None), 1)


def _models(config: Config, run: RunDir) -> Iterator[ModelEntry]:
    prompts = train_prompts(run.storage).path
    untrained: dict[str, tuple[str, ...]] = {"teacher": (), "student": ()}
    for name, model, recipe in (
        ("teacher", config.teacher, recipes.TEACHER),
        ("student", config.student, recipes.STUDENT),
    ):
        if model is not None and model.is_created:
            yield (entry := ModelEntry(f"{name}-init", None, recipe, (prompts,)))
            untrained[name] = (entry.path,)
    for phase in phases_of(config):
        number = round_of(phase)
        at_round = _Round(config, run.at_round(number or 0))
        if phase == TEACHER:
            yield ModelEntry(phase, phase, recipes.TEACHER, (prompts, *untrained["teacher"]))
        elif phase == WARMUP:
            inputs = (prompts, *at_round.warmup_responses(), *untrained["student"])
            yield ModelEntry(phase, phase, recipes.WARMUP, inputs)
        else:
            recipe = recipes.CONTROL if phase == SEQKD else recipes.ROUND
            pairs = (at_round.run.pairs().path, at_round.run.heldout_pairs().path)
            yield ModelEntry(phase, phase, recipe, (*pairs, *at_round.student()))


def _model_path(name: str) -> str:
    return f"models/{name}"


@dataclass(frozen=True)
class _Round:
    """Datasets of one round. Models that the run does not train have no path."""

    config: Config
    run: RunDir

    # -- models, as tuples of at most one path

    def teacher(self) -> tuple[str, ...]:
        return (_model_path(TEACHER),) if self.config.training.teacher else ()

    def student(self) -> tuple[str, ...]:
        """Return the path of the starting student."""
        if self.run.round:
            return (_model_path(round_phase(self.run.round - 1)),)
        return (_model_path(WARMUP),) if self.config.training.warmup else ()

    def warmup_responses(self) -> tuple[str, ...]:
        """Return the path of the teacher's samples if the warm-up learns from them."""
        warmup = self.config.training.warmup
        return (self.run.samples("teacher").path,) if warmup is not None and warmup.data == "teacher" else ()

    def _roles(self) -> Iterator[tuple[str, Recipe, tuple[str, ...], str]]:
        """Yield the roles that the round samples for pairs, each with its recipe, model and
        responder."""
        rejected = self.config.sampling.rejected
        if not self.run.round:  # models that the rounds do not train are sampled once, for all rounds
            yield "teacher", recipes.TEACHER_SAMPLES, self.teacher(), "teacher"
        if rejected is None:
            yield "student", recipes.REJECTED_SAMPLES, self.student(), "student"
        elif not self.run.round:
            is_created = rejected.phase is not None and self.config.student.is_created
            model = (_model_path("student-init"),) if is_created else ()
            yield "student", recipes.REJECTED_SAMPLES, model, "rejected"

    # -- samples and pairs

    def training_data(self) -> Iterator[DatasetEntry]:
        prompts, sampling = train_prompts(self.run.storage), self.config.sampling
        for role, recipe, model, responder in self._roles():
            yield DatasetEntry(
                self.run.samples(role),
                Purpose.SAMPLES,
                recipe,
                self.run.round,
                inputs=(prompts.path, *model),
                prompts=prompts,
                limit=sampling.limit,
                rows_per_prompt=sampling.teacher.n if role == "teacher" else sampling.student.n,
                responder=responder,
            )
        sampled = self.run.of_samples(self.config)
        samples = (sampled.samples("teacher").path, sampled.samples("student").path)
        yield from self._pairs(self.run.pairs(), samples, prompts, sampling.limit)

    def heldout_pairing_data(self) -> Iterator[DatasetEntry]:
        for role, recipe, model, responder in self._roles():
            yield self._heldout(self.run.heldout_samples(role), Purpose.SAMPLES, recipe, model, responder)
        sampled = self.run.of_samples(self.config)
        samples = (sampled.heldout_samples("teacher").path, sampled.heldout_samples("student").path)
        prompts, limit = heldout_prompts(self.run.storage), self.config.evaluation.limit
        yield from self._pairs(self.run.heldout_pairs(), samples, prompts, limit)

    def _pairs(
        self, pairs: Dataset, samples: tuple[str, ...], prompts: Dataset, limit: int | None
    ) -> Iterator[DatasetEntry]:
        """Yield a dataset of pairs, and the log-likelihoods that are stored with it."""
        number, start = self.run.round, self.student()
        yield DatasetEntry(pairs, Purpose.PAIRS, recipes.PAIRS, number, (*samples, *start), prompts, limit)
        for name in _stored_folders(self.run, pairs.path):
            if name.startswith("initial-logps-"):
                logps, inputs = Dataset(self.run.storage, f"{pairs.path}/{name}", INITIAL_LOGPS), (pairs.path, *start)
                yield DatasetEntry(logps, Purpose.INITIAL_LOGPS, recipes.ROUND, number, inputs, prompts, limit)

    # -- evaluation

    def _heldout(
        self, dataset: Dataset, purpose: Purpose, recipe: Recipe, inputs: tuple[str, ...], responder: str, n: int = 1
    ) -> DatasetEntry:
        """Return the entry of a dataset with `n` rows for every held-out prompt."""
        prompts, limit = heldout_prompts(self.run.storage), self.config.evaluation.limit
        inputs = (prompts.path, *inputs)
        return DatasetEntry(dataset, purpose, recipe, self.run.round, inputs, prompts, limit, n, responder)

    def responses(self) -> Iterator[DatasetEntry]:
        """Yield the responses of the systems that the round adds, under every decoding."""
        trained = trained_systems(self.config, self.run)
        for system in trained if self.run.round else systems_of(self.config, self.run):
            model = self.teacher() if system.kind == "teacher" else self.student()
            recipe = recipes.TEACHER_SAMPLES if system.kind == "teacher" else recipes.STUDENT_SAMPLES
            if system in trained:
                recipe, model = recipes.EVALUATION, (_model_path(trained[system]),)
            role = "teacher" if system.kind == "teacher" else "student"
            for decoding in self.config.system_decodings(system):
                dataset = self.run.system_samples(system, decoding)
                yield self._heldout(dataset, Purpose.RESPONSES, recipe, model, role)

    def candidates(self) -> Iterator[DatasetEntry]:
        """Yield the candidates, and their scores by the students that the round trains."""
        candidates, n = self.run.candidates(), self.config.candidates
        if not n:
            return
        if not self.run.round:
            recipe = recipes.STUDENT_SAMPLES
            yield self._heldout(candidates, Purpose.CANDIDATES, recipe, self.student(), "student", n)
        for system, phase in trained_systems(self.config, self.run).items():
            scores, inputs = self.run.scored("candidates", system), (candidates.path, _model_path(phase))
            yield self._heldout(scores, Purpose.CANDIDATE_SCORES, recipes.EVALUATION, inputs, "student", n)

    def verdicts(self) -> Iterator[DatasetEntry]:
        """Yield the stored questions to judges and their verdicts."""
        number, recipe, heldout = self.run.round, recipes.EVALUATION, heldout_prompts(self.run.storage)
        for judge in _stored_folders(self.run, self.run.judges_folder):
            for chunk in _stored_folders(self.run, f"{self.run.judges_folder}/{judge}"):
                questions, verdicts = self.run.judge_questions(judge, chunk), self.run.judge_verdicts(judge, chunk)
                yield DatasetEntry(questions, Purpose.QUESTIONS, recipe, number, (heldout.path,), heldout)
                inputs = (questions.path,)
                yield DatasetEntry(verdicts, Purpose.VERDICTS, recipe, number, inputs, questions, None, 1, judge)

    def teacher_scores(self) -> Iterator[DatasetEntry]:
        """Yield the stored scores of responses by the teacher as a judge."""
        temperatures = {name: decoding.temperature for name, decoding in self.config.decodings().items()}
        main = main_decoding([(PLAD, name) for name in temperatures], temperatures)
        for judge in _stored_folders(self.run, self.run.scores_folder):
            if judge == "candidates":
                continue
            stored = _stored_folders(self.run, f"{self.run.scores_folder}/{judge}")
            for system in (system for system in systems_of(self.config, self.run) if str(system) in stored):
                inputs = (self.run.system_samples(system, main).path, *self.teacher())
                scores = self.run.scored(judge, system)
                yield self._heldout(scores, Purpose.TEACHER_SCORES, recipes.EVALUATION, inputs, judge)


def _stored_folders(run: RunDir, folder: str) -> list[str]:
    """Return the names of the folders in a folder of the run directory."""
    return sorted(name[:-1] for name in run.storage.sizes(folder) if name.endswith("/"))
