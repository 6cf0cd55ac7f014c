"""Judges other than the reference: reward models, the teacher's likelihood, and language models."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import numpy as np
import pyarrow as pa

from plad_dist.bounded_templates import BoundedEnvironment
from plad_dist.config import Config, LlmJudge, RewardJudge, TeacherJudge
from plad_dist.data.conversation import Conversation
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import resolve_model
from plad_dist.data.schemas import PROMPTS
from plad_dist.data.sources import JINJA_ERRORS
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.evaluation.metrics import compared_pairs
from plad_dist.evaluation.scores import Judgement, Preferences
from plad_dist.fingerprint import fingerprint
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.systems import System
from plad_dist.text_metrics import Output, Scores, SystemDecoding

_VARIABLES = {"messages", "reference", "first", "second"}
_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_BARE_VERDICT = re.compile(r"\W*(A|B|C|tie)\W*", re.IGNORECASE)
_CHUNK = 100  # prompts per dataset of questions
_FIRST_SHARE = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}

Prompts = Sequence[Mapping[str, Any]]
ResponsePair = tuple[Sequence[Output], Sequence[Output]]


def judge_all(
    config: Config,
    run: RunDir,
    prompts: Prompts,
    outputs: Mapping[SystemDecoding, Sequence[Output]],
    main: str,
    previous: System,
    progress: Progress,
) -> dict[str, Judgement]:
    """Return the verdicts of every judge of the config.

    Args:
        prompts: rows of the held-out prompts, in the order of the responses.
        outputs: responses by system and decoding.
        main: the main decoding; only reward models judge other decodings too.
        previous: the system with which the round began.
    """
    judgements = {}
    for name, judge in config.evaluation.judges.items():
        match judge:
            case RewardJudge():
                scores = _reward_scores(config, name, judge, prompts, outputs)
                judgements[name] = Judgement("reward_model", scores=scores)
            case TeacherJudge():
                scores = _teacher_scores(config, run, name, outputs, main, progress)
                judgements[name] = Judgement("teacher_likelihood", scores=scores)
            case LlmJudge():
                responses = {
                    (a, b): (outputs[a, main], outputs[b, main])
                    for a, b in compared_pairs(previous)
                    if (a, main) in outputs and (b, main) in outputs
                }
                preferences = ask_judge(config, run, name, judge, prompts, responses, progress)
                judgements[name] = Judgement("llm", preferences=preferences)
    return judgements


# -- scores of single responses


def _reward_scores(
    config: Config, name: str, judge: RewardJudge, prompts: Prompts, outputs: Mapping[SystemDecoding, Sequence[Output]]
) -> dict[SystemDecoding, Scores]:
    """Score all responses with one worker that loads the model once.

    NaN for conversations over the model's length.
    """
    import ray

    from plad_dist.pairing.answer import Answer
    from plad_dist.pairing.reward import as_model
    from plad_dist.sampling.engine_placement import engines_use_gpus

    conversations = [Conversation.from_row(prompt) for prompt in prompts]
    answers = [
        Answer(
            messages=conversation.messages,
            tools=conversation.tools,
            reference=prompt["reference"],
            response=output.text,
            role=str(system),
        )
        for (system, _), responses in outputs.items()
        for prompt, conversation, output in zip(prompts, conversations, responses, strict=True)
    ]
    gpus = config.evaluation.gpus_per_judge if engines_use_gpus() else 0.0
    score = ray.remote(num_cpus=config.pairing.cpus_per_worker, num_gpus=gpus, max_retries=2)(_score)
    # Workers have other working directories, so the path is resolved here.
    resolved = judge.model_copy(update={"path": resolve_model(as_model(judge))})
    try:
        scores, problem = ray.get(score.remote(resolved, _key(name), answers))
    except ray.exceptions.RayError as error:
        raise RunFailed(f"{_key(name)}: the scoring worker failed: {first_line(error)}") from error
    if problem is not None:
        raise UserError(problem)
    scores_KP = np.array(scores, dtype=np.float64).reshape(len(outputs), len(prompts))
    return dict(zip(outputs, scores_KP, strict=True))


def _score(judge: RewardJudge, key: str, answers: list[Any]) -> tuple[list[float | None], str | None]:
    """Return the scores and None, or nothing and the message of a :class:`UserError`."""
    from plad_dist.pairing.reward import RewardScorer

    try:
        return RewardScorer(judge, key)(answers), None
    except UserError as error:
        return [], str(error)


def _teacher_scores(
    config: Config,
    run: RunDir,
    name: str,
    outputs: Mapping[SystemDecoding, Sequence[Output]],
    main: str,
    progress: Progress,
) -> dict[SystemDecoding, Scores]:
    """Return the teacher's mean log-likelihood per token of responses under the main decoding."""
    from plad_dist.sampling.stage import score_by_teacher

    systems = [system for system, decoding in outputs if decoding == main]
    score_by_teacher(config, run, name, {system: run.system_samples(system, main) for system in systems}, progress)
    return {
        (system, main): mean_logprobs(run.scored(name, system).read(["logprob", "num_tokens"])) for system in systems
    }


def mean_logprobs(scored: pa.Table) -> Scores:
    """Return the mean log-likelihood per token of responses; NaN for a response without tokens."""
    logprobs = np.array(scored["logprob"].to_pylist(), dtype=np.float64)
    tokens = np.array(scored["num_tokens"].to_pylist(), dtype=np.float64)
    return np.where(tokens > 0, logprobs / np.maximum(tokens, 1), np.nan)


# -- verdicts on two responses


def ask_judge(
    config: Config,
    run: RunDir,
    name: str,
    judge: LlmJudge,
    prompts: Prompts,
    responses: Mapping[tuple[System, System], ResponsePair],
    progress: Progress,
) -> dict[tuple[System, System], Preferences]:
    """Let a judge read the responses of pairs of systems to the first prompts, in both orders.

    Questions are asked in chunks. Each chunk is a dataset whose name is a fingerprint of the
    questions and of the judge's model and decoding. If the limit is raised, complete chunks are not
    asked again; another judge or template starts with new datasets.

    Args:
        responses: responses of both systems of each pair, in the order of the prompts.
    """
    from plad_dist.sampling.stage import ask, judge_identity

    template, identity = load_template(judge, _key(name)), judge_identity(config, name, judge)
    count = min(judge.limit, len(prompts))
    answers_of: dict[tuple[System, System], list[Dataset]] = {pair: [] for pair in responses}
    chunks: dict[str, tuple[Dataset, Dataset]] = {}
    for pair, (a, b) in responses.items():
        for start in range(0, count, _CHUNK):
            end = min(start + _CHUNK, count)
            rows = judge_questions(template, prompts[start:end], (a[start:end], b[start:end]), _key(name))
            chunk = fingerprint("judge questions", judge=identity, questions=rows)[:16]
            questions, answers = run.judge_questions(name, chunk), run.judge_verdicts(name, chunk)
            _commit_questions(questions, rows)
            answers_of[pair].append(answers)
            # Systems with identical responses share a chunk, which is asked once.
            chunks.setdefault(answers.path, (questions, answers))
    rounds = (run.at_round(number) for number in range(run.round + 1))
    committed = [answers for at_round in rounds for answers in judge_answers(at_round, name)]
    earlier = [answers for answers in committed if answers.path not in chunks]
    ask(config, run, name, judge, list(chunks.values()), earlier, progress)
    return {pair: read_verdicts(_answer_texts(datasets), len(prompts)) for pair, datasets in answers_of.items()}


def judge_answers(run: RunDir, name: str) -> list[Dataset]:
    """Return the datasets of a judge's answers in a round, to any questions."""
    chunks = run.storage.sizes(f"{run.judges_folder}/{name}")
    return [run.judge_verdicts(name, chunk.rstrip("/")) for chunk in chunks]


def _answer_texts(datasets: Sequence[Dataset]) -> list[str]:
    """Return a judge's answers in the order of the questions; answers that were cut are empty."""
    rows = [row for dataset in datasets for row in dataset.read(["text", "finish_reason"]).to_pylist()]
    return [row["text"] if row["finish_reason"] == "stop" else "" for row in rows]


def judge_questions(
    template: jinja2.Template, prompts: Prompts, responses: ResponsePair, key: str
) -> list[dict[str, Any]]:
    """Return two rows of a prompts dataset per prompt: the first system's response shown first,
    then second.

    Args:
        key: config section of the judge, for messages.

    Raises:
        UserError: the template cannot be rendered for a prompt.
    """
    rows = []
    for prompt, a, b in zip(prompts, *responses, strict=True):
        for order, (first, second) in enumerate(((a.text, b.text), (b.text, a.text))):
            try:
                text = template.render(
                    messages=Conversation.from_row(prompt).with_empty_contents().messages,
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
    """Return a response that can neither end its own quotation nor contain a verdict."""
    return response.replace("[[", "[ [").replace("</answer", "< /answer")


def _commit_questions(dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    """Commit the questions as one block, unless an earlier attempt has committed them."""
    if dataset.manifest() is not None:
        return
    input_fingerprint = fingerprint("judge prompts", questions=rows)
    table = pa.Table.from_pylist(rows, schema=PROMPTS)
    dataset.commit(0, table, fingerprint=input_fingerprint, attempt=uuid.uuid4().hex)
    dataset.finish(1, fingerprint=input_fingerprint, facts={"content": input_fingerprint})


def read_verdicts(texts: Sequence[str], prompts: int) -> Preferences:
    """Return the verdicts in a judge's answers, which alternate between the two orders.

    The last verdict of an answer counts.

    Args:
        prompts: number of prompts of the comparison; the answers belong to the first ones.
    """
    shares = np.array([_first_share(text) for text in texts], dtype=np.float64).reshape(-1, 2)
    count = len(shares)
    a_first, a_second = np.full((2, prompts), np.nan)
    a_first[:count], a_second[:count] = shares[:, 0], 1.0 - shares[:, 1]
    return Preferences(a_first, a_second, count)


def _first_share(text: str) -> float:
    """Return 1 if the first response was preferred, 0 if the second, 0.5 for a tie, else NaN."""
    verdicts = _VERDICT.findall(text) or ([match[1]] if (match := _BARE_VERDICT.fullmatch(text)) else [])
    return _FIRST_SHARE[verdicts[-1].lower()] if verdicts else float("nan")


# -- templates


def _key(name: str) -> str:
    return f"evaluation.judges.{name}"


def template_text(judge: LlmJudge, key: str) -> str:
    """Return the template of a judge's question.

    Raises:
        UserError: the file cannot be read.
    """
    if judge.template is None:
        return (resources.files("plad_dist.evaluation") / "judge.j2").read_text(encoding="utf-8")
    if "{{" in judge.template or "\n" in judge.template:
        raise UserError(
            f"{key}.template: {judge.template!r:.80}: is the text of a template; expected the path of a file with it"
        )
    try:
        return Path(judge.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}.template: {judge.template}: cannot be read: {error}") from None


def load_template(judge: LlmJudge, key: str) -> jinja2.Template:
    """Return the template of a judge's question, checked.

    Raises:
        UserError: the file cannot be read, is not a template, uses unknown variables, or omits a
            response.
    """
    text, name = template_text(judge, key), judge.template or "judge.j2"
    environment = BoundedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(text)) - environment.globals.keys()
        if unknown := sorted(names - _VARIABLES):
            available = ", ".join(sorted(_VARIABLES))
            raise UserError(f"{key}.template: {name}: unknown variable {', '.join(unknown)}; available are {available}")
        if not {"first", "second"} <= names:
            raise UserError(f"{key}.template: {name}: must show both responses, `first` and `second`")
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(f"{key}.template: {name}: not a valid Jinja template: {error}") from None
