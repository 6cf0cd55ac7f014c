"""Work of a run: numbers of prompts and tokens, as far as they are given, measured or bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from plad_dist.config import Config, PythonFunctionsSource, RoleSampling
from plad_dist.data.dataset import Dataset
from plad_dist.data.manifest import Manifest
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.phases import SEQKD, TEACHER, WARMUP, phases_of, round_phase
from plad_dist.rundir import RunDir
from plad_dist.systems import System

_DEFAULT_PROMPT_TOKENS = 1024  # longest prompt if the config sets no limit


@dataclass(frozen=True)
class Workload:
    """Counts of a run.

    Attributes:
        prompts: training prompts, None if their number is unknown.
        sampled_prompts: the training prompts that are sampled for pairs.
        heldout_prompts: held-out prompts that every system responds to.
        prompt_tokens: mean length of a prompt.
        response_tokens: mean length of a response by role: `teacher`, `student` and, if another
            model writes the rejected responses, `rejected`.
        sources: where each value comes from, for messages.
    """

    prompts: int | None
    sampled_prompts: int | None
    heldout_prompts: int
    prompt_tokens: float
    response_tokens: dict[str, float]
    sources: dict[str, str]

    def sampled_responses(self, config: Config, role: str) -> int:
        """Return the responses of a role for the pairs of all rounds."""
        responses = (self.sampled_prompts or 0) * role_sampling(config, role).n
        return responses * _times_sampled(config, role)

    def heldout_responses(self, config: Config, role: str) -> int:
        """Return the responses of a role to held-out prompts.

        They are those of each of its systems under each decoding, the candidates, and those for
        held-out pairs.
        """
        for_pairs = _times_sampled(config, role)
        if role == "rejected":
            return self.heldout_prompts * for_pairs
        training = config.training
        trained = [System("seqkd")] * (training.seqkd is not None) + [System("plad")] * config.rounds.most
        systems = [System("warmup"), *trained] if role == "student" else [System("teacher")]
        per_prompt = sum(len(config.system_decodings(system)) for system in systems)
        if role == "student":
            per_prompt += config.candidates
        return self.heldout_prompts * (per_prompt + for_pairs)

    def generated_tokens(self, config: Config, role: str) -> float:
        """Return the tokens that a role generates in the whole run."""
        responses = self.sampled_responses(config, role) + self.heldout_responses(config, role)
        return responses * self.response_tokens[role]

    def trained_tokens(self, config: Config, name: str) -> float:
        """Return the tokens that a phase computes.

        References count with the teacher's response length.
        """
        if name == SEQKD:  # trains with the compute of round 0
            name = round_phase(0)
        phase = phases_of(config)[name]
        example = self.prompt_tokens + self.response_tokens["teacher"]
        warmup = config.training.warmup
        if name == WARMUP and warmup is not None and warmup.data == "teacher":
            rows, tokens = self.sampled_responses(config, "teacher"), example  # each response with its prompt
        elif name in (TEACHER, WARMUP):
            rows, tokens = self.prompts or 0, example
        else:
            rows, tokens = self.sampled_prompts or 0, self.group_tokens(config)
        groups = phase.epochs * rows
        if phase.max_steps:
            groups = min(groups, phase.max_steps * phase.batch_groups)
        return groups * tokens

    def group_tokens(self, config: Config) -> float:
        """Return the tokens of a prompt and of the responses in its pairs, each counted once."""
        pairs, sampling = config.pairing.kept_pairs, config.sampling
        chosen = min(pairs, sampling.teacher.n) * self.response_tokens["teacher"]
        rejected = min(pairs, sampling.student.n) * self.response_tokens[rejected_role(config)]
        return self.prompt_tokens + chosen + rejected


def workload_of(
    config: Config,
    prompts: int | None = None,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
    context: int | None = None,
) -> Workload:
    """Return the work of a run. Given values precede measured ones, which precede the bounds of the
    config.

    Args:
        prompts: number of prompts in the data set, of which at most `sampling.limit` are sampled.
        context: longest sequence of the models, which bounds the prompts; None if it is unknown.
    """
    run, sources = RunDir.of(config), dict[str, str]()
    heldout = _heldout_prompts(config, run, prompts)
    prompts, sources["prompts"] = _training_prompts(config, run, prompts)
    limit, sampled = config.sampling.limit, prompts
    if prompts is not None and limit is not None:
        sampled, sources["sampled_prompts"] = min(prompts, limit), "sampling.limit"
    if prompt_tokens is not None:
        sources["prompt_tokens"] = "--prompt-tokens"
    else:
        longest = config.prompts.max_tokens or min(_DEFAULT_PROMPT_TOKENS, context or _DEFAULT_PROMPT_TOKENS)
        prompt_tokens, sources["prompt_tokens"] = longest / 2, f"half of the maximum, {longest:,}"
    lengths: dict[str, float] = {}
    for role in dict.fromkeys(("teacher", "student", rejected_role(config))):
        lengths[role], sources[f"response_tokens.{role}"] = _response_tokens(config, run, role, response_tokens)
    return Workload(prompts, sampled, heldout, prompt_tokens, lengths, sources)


def role_sampling(config: Config, role: str) -> RoleSampling:
    """Return the sampling settings of a role."""
    other = config.rejected_writer()
    if role == "rejected" and other is not None:
        return other.sampling
    return config.sampling.student if role == "student" else config.sampling.teacher


def rejected_role(config: Config) -> Literal["student", "rejected"]:
    """Return the role that writes the rejected responses."""
    return "student" if config.rejected_writer() is None else "rejected"


def _times_sampled(config: Config, role: str) -> int:
    """Return how often a role is sampled for pairs."""
    if role == "student" and rejected_role(config) != "student":
        return 0
    return config.rounds.most if role == "student" and config.sampling.rejected is None else 1


def _training_prompts(config: Config, run: RunDir, option: int | None) -> tuple[int | None, str]:
    """Return the number of training prompts, None if it is unknown, and where it comes from."""
    if option is not None:
        return option, "--prompts"
    if (manifest := _manifest(run)) is not None:
        return manifest.rows, "the run directory"
    if isinstance(config.prompts.source, PythonFunctionsSource):
        return config.prompts.source.limit, "prompts.source.limit"
    if config.sampling.limit is not None:
        return config.sampling.limit, "sampling.limit; give --prompts if the data set has more"
    return None, "unknown: give --prompts"


def _heldout_prompts(config: Config, run: RunDir, option: int | None) -> int:
    """Return the number of held-out prompts that are used: the known or assumed number, up to the
    limit."""
    prepared, source = _manifest(run, heldout_prompts), config.prompts.source
    bound = config.evaluation.limit
    if prepared is not None:
        bound = prepared.rows
    elif isinstance(source, PythonFunctionsSource):
        bound = source.heldout_limit
    elif config.prompts.heldout is None and option is not None:
        bound = round(option * config.prompts.heldout_fraction)
    return min(config.evaluation.limit, bound)


def _response_tokens(config: Config, run: RunDir, role: str, option: float | None) -> tuple[float, str]:
    """Return the mean length of a role's responses, and where it comes from."""
    if option is not None:
        return option, "--response-tokens"
    side = "teacher" if role == "teacher" else "student" if role == rejected_role(config) else None
    if side is not None and (measured := _measured_response_tokens(run, side)) is not None:
        return measured, "the run directory"
    longest = role_sampling(config, role).max_tokens
    return longest / 2, f"half of the maximum, {longest:,}"


def _manifest(run: RunDir, prompts: Callable[[Storage], Dataset] = train_prompts) -> Manifest | None:
    try:
        return prompts(run.storage).manifest()
    except RunFailed:  # damaged; the run itself reports it
        return None


def _measured_response_tokens(run: RunDir, role: str) -> float | None:
    """Return the mean length of a role's samples in this run, None before they are complete."""
    try:
        manifest = run.samples(role).manifest()
    except RunFailed:
        return None
    return manifest.count("tokens") / manifest.rows if manifest is not None and manifest.rows else None
