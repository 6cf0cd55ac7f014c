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

from plad_dist.config import Config, LlmJudge, RewardJudge, TeacherJudge, fingerprint
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.data.store import Dataset
from plad_dist.errors import UserError
from plad_dist.evaluation.metrics import Judgement, Key, Output, Preferences, compared_pairs
from plad_dist.evaluation.statistics import Scores
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir

_VARIABLES = {"messages", "reference", "first", "second"}
_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_BARE = re.compile(r"\W*(A|B|C|tie)\W*", re.IGNORECASE)
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
                compared = [
                    (a, b) for a, b in compared_pairs(previous) if (a, main) in answers and (b, main) in answers
                ]
                preferences = {
                    (a, b): ask_judge(
                        config, run, name, judge, prompts, (a, b), (answers[a, main], answers[b, main]), progress
                    )
                    for a, b in compared
                }
                found[name] = Judgement("llm", preferences=preferences)
    return found


# ------------------------------------------------------------------------------------------------ scores of responses


def _reward_scores(
    config: Config, name: str, judge: RewardJudge, prompts: Prompts, answers: Mapping[Key, Sequence[Output]]
) -> dict[Key, Scores]:
    """Scores of all responses, by one worker that loads the model once. NaN for conversations over the model's length."""
    import ray

    from plad_dist.pairing.scores import Answer
    from plad_dist.sampling.placement import engines_use_gpus

    asked = [
        Answer(messages=prompt["messages"], reference=prompt["reference"], response=answer.text, role=system)
        for (system, _), given in answers.items()
        for prompt, answer in zip(prompts, given, strict=True)
    ]
    gpus = config.evaluation.gpus_per_judge if engines_use_gpus() else 0.0
    score = ray.remote(num_cpus=config.pairing.cpus_per_worker, num_gpus=gpus, max_retries=2)(_score)
    told, problem = ray.get(score.remote(judge, f"evaluation.judges.{name}", asked))
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


def ask_judge(
    config: Config,
    run: RunDir,
    name: str,
    judge: LlmJudge,
    prompts: Prompts,
    systems: tuple[str, str],
    answers: tuple[Sequence[Output], Sequence[Output]],
    progress: Progress,
) -> Preferences:
    """Let a judge read both systems' responses to the first prompts, in both orders. What it answered is never asked again."""
    from plad_dist.sampling.stage import ask

    count = min(judge.limit, len(prompts))
    questions = judge_questions(load_template(judge, f"evaluation.judges.{name}"), prompts[:count], answers)
    # A changed template or limit asks anew, beside what was asked before.
    folder = f"eval/round-{run.round}/judges/{name}-{fingerprint(questions)[:12]}/{systems[0]}-{systems[1]}"
    asked, told = (
        Dataset(run.storage, f"{folder}/{kind}", schema)
        for kind, schema in (("prompts", PROMPTS), ("answers", SAMPLES))
    )
    _keep_questions(asked, questions, config.prompts.block_size)
    ask(config, run, name, judge, asked, told, progress)
    return read_verdicts(told.read(["text"])["text"].to_pylist())


def judge_questions(
    template: jinja2.Template, prompts: Prompts, answers: tuple[Sequence[Output], Sequence[Output]]
) -> list[dict[str, Any]]:
    """Two rows of a prompts dataset for each prompt: the first system's response shown first, then second."""
    rows = []
    for prompt, a, b in zip(prompts, *answers, strict=False):
        for order, (first, second) in enumerate(((a.text, b.text), (b.text, a.text))):
            text = template.render(
                messages=prompt["messages"], reference=prompt["reference"], first=first, second=second
            )
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


def read_verdicts(texts: Sequence[str]) -> Preferences:
    """Verdicts from a judge's answers, which alternate between the orders; the last verdict of an answer counts."""
    shares = np.array([_first_share(text) for text in texts], dtype=np.float64).reshape(-1, 2)
    return Preferences(a_first=shares[:, 0], a_second=1.0 - shares[:, 1])


def _first_share(text: str) -> float:
    """1 where the response shown first was preferred, 0 where the second, 0.5 for a tie, NaN where no verdict is found."""
    found = _VERDICT.findall(text) or ([match[1]] if (match := _BARE.fullmatch(text)) else [])
    return _FIRST_SHARE[found[-1].lower()] if found else float("nan")


def load_template(judge: LlmJudge, key: str) -> jinja2.Template:
    """A judge's question. Raises :class:`UserError` where the file is none."""
    if judge.template is None:
        text, name = (resources.files("plad_dist.evaluation") / "judge.j2").read_text(encoding="utf-8"), "judge.j2"
    else:
        name = judge.template
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}.template: {name}: cannot be read: {error}") from None
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


def _keep_questions(asked: Dataset, questions: list[dict[str, Any]], block_size: int) -> None:
    """Commit the questions, the same ones wherever a run was cut."""
    if asked.manifest() is not None:
        return
    made_of = fingerprint(questions)
    blocks = range(0, len(questions), block_size)
    for block, start in enumerate(blocks):
        table = pa.Table.from_pylist(questions[start : start + block_size], schema=PROMPTS)
        asked.commit(block, table, fingerprint=made_of, attempt=uuid.uuid4().hex)
    asked.finish(len(blocks), fingerprint=made_of, facts={"content": made_of})
