"""Judges beyond the reference: a reward model, the teacher's likelihood, and language models that read two responses."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np
import pyarrow as pa

from plad_dist.config import Config, LlmJudge, RewardJudge, TeacherJudge
from plad_dist.data.models import resolve_model
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.data.sources import JINJA_ERRORS
from plad_dist.data.store import Dataset
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.evaluation.metrics import Judgement, Preferences, compared_pairs
from plad_dist.fingerprint import fingerprint
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.text_metrics import Key, Output, Scores

_VARIABLES = {"messages", "reference", "first", "second"}
_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_BARE = re.compile(r"\W*(A|B|C|tie)\W*", re.IGNORECASE)
_CHUNK = 100  # prompts of a dataset of questions
_FIRST_SHARE = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}

Prompts = Sequence[Mapping[str, Any]]


def judge_all(
    config: Config,
    run: RunDir,
    prompts: Prompts,
    answers: Mapping[Key, Sequence[Output]],
    main: str,
    previous: str,
    progress: Progress,
) -> dict[str, Judgement]:
    """What every judge of the config says of the answers under the main decoding.

    Args:
        prompts: rows of the held-out prompts, in the order of the answers.
        previous: the system that the round began as.
    """
    found = {}
    for name, judge in config.evaluation.judges.items():
        match judge:
            case RewardJudge():
                scores = _reward_scores(config, name, judge, prompts, answers)
                found[name] = Judgement("reward_model", scores=scores)
            case TeacherJudge():
                found[name] = Judgement(
                    "teacher_likelihood", scores=_teacher_scores(config, run, name, answers, main, progress)
                )
            case LlmJudge():
                pairs = [(a, b) for a, b in compared_pairs(previous) if (a, main) in answers and (b, main) in answers]
                shown = {pair: (answers[pair[0], main], answers[pair[1], main]) for pair in pairs}
                found[name] = Judgement(
                    "llm", preferences=ask_judge(config, run, name, judge, prompts, shown, progress)
                )
    return found


# ------------------------------------------------------------------------------------------------ scores of responses


def _reward_scores(
    config: Config, name: str, judge: RewardJudge, prompts: Prompts, answers: Mapping[Key, Sequence[Output]]
) -> dict[Key, Scores]:
    """Scores of all responses, by one worker that loads the model once. NaN for conversations over the model's length."""
    import ray

    from plad_dist.pairing.answer import Answer
    from plad_dist.pairing.reward import as_model
    from plad_dist.sampling.engine_placement import engines_use_gpus

    asked = [
        Answer(messages=prompt["messages"], reference=prompt["reference"], response=answer.text, role=system)
        for (system, _), given in answers.items()
        for prompt, answer in zip(prompts, given, strict=True)
    ]
    gpus = config.evaluation.gpus_per_judge if engines_use_gpus() else 0.0
    score = ray.remote(num_cpus=config.pairing.cpus_per_worker, num_gpus=gpus, max_retries=2)(_score)
    found = judge.model_copy(update={"path": resolve_model(as_model(judge))})  # workers have other working directories
    try:
        told, problem = ray.get(score.remote(found, _key(name), asked))
    except ray.exceptions.RayError as error:
        raise RunFailed(f"{_key(name)}: the worker that scores failed: {first_line(error)}") from error
    if problem is not None:
        raise UserError(problem)
    scores_KP = np.array(told, dtype=np.float64).reshape(len(answers), len(prompts))
    return dict(zip(answers, scores_KP, strict=True))


def _score(judge: RewardJudge, key: str, asked: list[Any]) -> tuple[list[float | None], str | None]:
    """Scores, or what the user must mend."""
    from plad_dist.pairing.reward import RewardScorer

    try:
        return RewardScorer(judge, key)(asked), None
    except UserError as error:
        return [], str(error)


def _teacher_scores(
    config: Config, run: RunDir, name: str, answers: Mapping[Key, Sequence[Output]], main: str, progress: Progress
) -> dict[Key, Scores]:
    """The teacher's mean log-likelihood of a token of each response under the main decoding."""
    from plad_dist.sampling.stage import score_by_teacher

    systems = [system for system, decoding in answers if decoding == main]
    score_by_teacher(config, run, name, {system: run.system_samples(system, main) for system in systems}, progress)
    return {
        (system, main): per_token_P
        for system in systems
        for per_token_P in [mean_logprobs(run.scored(name, system).read(["logprob", "num_tokens"]))]
    }


def mean_logprobs(scored: pa.Table) -> Scores:
    """Log-likelihood of a token on average, NaN without one."""
    logprobs = np.array(scored["logprob"].to_pylist(), dtype=np.float64)
    tokens = np.array(scored["num_tokens"].to_pylist(), dtype=np.float64)
    return np.where(tokens > 0, logprobs / np.maximum(tokens, 1), np.nan)


# -------------------------------------------------------------------------------------------- a reader of two responses

Shown = tuple[Sequence[Output], Sequence[Output]]


def ask_judge(
    config: Config,
    run: RunDir,
    name: str,
    judge: LlmJudge,
    prompts: Prompts,
    shown: Mapping[tuple[str, str], Shown],
    progress: Progress,
) -> dict[tuple[str, str], Preferences]:
    """Let a judge read the responses of pairs of systems to the first prompts, in both orders.

    Questions are asked in chunks, each a dataset named by its text and by who is asked how: whole chunks that were answered are not
    asked again when the limit is raised, and another judge or question begins anew.
    """
    from plad_dist.sampling.stage import ask, judge_identity

    template, identity = load_template(judge, _key(name)), judge_identity(config, name, judge)
    count, folder = min(judge.limit, len(prompts)), f"eval/round-{run.round}/judges/{name}"
    told: dict[tuple[str, str], list[Dataset]] = {pair: [] for pair in shown}
    asked: list[tuple[Dataset, Dataset]] = []
    for pair, (a, b) in shown.items():
        for start in range(0, count, _CHUNK):
            end = min(start + _CHUNK, count)
            questions = judge_questions(template, prompts[start:end], (a[start:end], b[start:end]), _key(name))
            place = f"{folder}/{fingerprint('judge questions', judge=identity, questions=questions)[:16]}"
            given = Dataset(run.storage, f"{place}/prompts", PROMPTS)
            _keep_questions(given, questions)
            told[pair].append(Dataset(run.storage, f"{place}/answers", SAMPLES))
            if all(told[pair][-1].path != answers.path for _, answers in asked):  # two systems may say the same
                asked.append((given, told[pair][-1]))
    now = {answers.path for _, answers in asked}
    rounds = (run.at_round(number) for number in range(run.round + 1))
    earlier = [answers for each in rounds for answers in judge_answers(each, name) if answers.path not in now]
    ask(config, run, name, judge, asked, earlier, progress)
    return {pair: read_verdicts(_answers(datasets), len(prompts)) for pair, datasets in told.items()}


def judge_answers(run: RunDir, name: str) -> list[Dataset]:
    """What a judge has answered in a round, to any questions."""
    folder = f"eval/round-{run.round}/judges/{name}"
    return [
        Dataset(run.storage, f"{folder}/{place.rstrip('/')}/answers", SAMPLES) for place in run.storage.sizes(folder)
    ]


def _answers(datasets: Sequence[Dataset]) -> list[str]:
    """A judge's answers in the order of the questions, empty where one was cut off before its verdict."""
    rows = [row for dataset in datasets for row in dataset.read(["text", "finish_reason"]).to_pylist()]
    return [row["text"] if row["finish_reason"] == "stop" else "" for row in rows]


def judge_questions(template: jinja2.Template, prompts: Prompts, shown: Shown, key: str) -> list[dict[str, Any]]:
    """Two rows of a prompts dataset for each prompt: the first system's response shown first, then second.

    Raises:
        UserError: the template cannot be rendered for a prompt; `key` is the judge's section.
    """
    rows = []
    for prompt, a, b in zip(prompts, *shown, strict=True):
        for order, (first, second) in enumerate(((a.text, b.text), (b.text, a.text))):
            try:
                text = template.render(
                    messages=prompt["messages"],
                    reference=prompt["reference"],
                    first=_quoted(first),
                    second=_quoted(second),
                )
            except JINJA_ERRORS as error:
                raise UserError(
                    f"{key}.template: cannot be rendered for prompt {prompt['prompt_id']}: {error}"
                ) from None
            rows.append(
                {
                    "prompt_id": f"{prompt['prompt_id']}-{order}",
                    "messages": [{"role": "user", "content": text}],
                    "reference": None,
                    "meta": None,
                    "teacher": None,
                }
            )
    return rows


def _quoted(response: str) -> str:
    """A response that can neither end its own quotation nor contain a verdict."""
    return response.replace("[[", "[ [").replace("</answer", "< /answer")


def read_verdicts(texts: Sequence[str], prompts: int) -> Preferences:
    """Verdicts from a judge's answers, which alternate between the orders; the last verdict of an answer counts.

    Args:
        prompts: of the comparison, of which the first ones were asked about.
    """
    shares = np.array([_first_share(text) for text in texts], dtype=np.float64).reshape(-1, 2)
    asked = len(shares)
    first, second = np.full((2, prompts), np.nan)
    first[:asked], second[:asked] = shares[:, 0], 1.0 - shares[:, 1]
    return Preferences(first, second, asked)


def _first_share(text: str) -> float:
    """1 where the response shown first was preferred, 0 where the second, 0.5 for a tie, NaN where no verdict is found."""
    found = _VERDICT.findall(text) or ([match[1]] if (match := _BARE.fullmatch(text)) else [])
    return _FIRST_SHARE[found[-1].lower()] if found else float("nan")


def _key(name: str) -> str:
    return f"evaluation.judges.{name}"


def template_text(judge: LlmJudge, key: str) -> str:
    """The text of a judge's question. Raises :class:`UserError` where the file cannot be read."""
    if judge.template is None:
        return (resources.files("plad_dist.evaluation") / "judge.j2").read_text(encoding="utf-8")
    try:
        return Path(judge.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}.template: {judge.template}: cannot be read: {error}") from None


def load_template(judge: LlmJudge, key: str) -> jinja2.Template:
    """A judge's question. Raises :class:`UserError` where the file is none."""
    text, name = template_text(judge, key), judge.template or "judge.j2"
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(text)) - environment.globals.keys()
        if names - _VARIABLES:
            raise UserError(
                f"{key}.template: {name}: there is no {', '.join(sorted(names - _VARIABLES))}; it is given {', '.join(sorted(_VARIABLES))}"
            )
        if not {"first", "second"} <= names:
            raise UserError(f"{key}.template: {name}: must show both responses, `first` and `second`")
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(f"{key}.template: {name}: not a valid Jinja template: {error}") from None


def _keep_questions(asked: Dataset, questions: list[dict[str, Any]]) -> None:
    """Commit the questions as one block, the same ones wherever a run was cut."""
    if asked.manifest() is not None:
        return
    input_fingerprint = fingerprint("judge prompts", questions=questions)
    table = pa.Table.from_pylist(questions, schema=PROMPTS)
    asked.commit(0, table, fingerprint=input_fingerprint, attempt=uuid.uuid4().hex)
    asked.finish(1, fingerprint=input_fingerprint, facts={"content": input_fingerprint})
