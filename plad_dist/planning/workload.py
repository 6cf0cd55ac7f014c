"""How much a run has to do: prompts and tokens, as far as they are measured, given or bounded; and the disk that it fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from plad_dist.config import Config, PythonFunctionsSource, RoleSampling
from plad_dist.data.prompts import heldout_prompts, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Manifest
from plad_dist.errors import RunFailed
from plad_dist.phases import SEQKD, TEACHER, phases_of, round_phase
from plad_dist.planning.memory import checkpoint_bytes
from plad_dist.planning.sizes import Device, ModelSize
from plad_dist.rundir import RunDir
from plad_dist.systems import System

_BYTES_OF_A_TOKEN = 4 + 4.5  # its id, and its text
_BYTES_OF_A_ROW = 200.0


@dataclass(frozen=True)
class Workload:
    """Counts of a run.

    Attributes:
        prompts: to train on, None where nothing says how many; `sampled` are those that are sampled for pairs.
        heldout: held-out prompts that systems answer.
        prompt_tokens, response_tokens: means.
        sources: where each of them is from, for the reader.
    """

    prompts: int | None
    sampled: int | None
    heldout: int
    prompt_tokens: float
    response_tokens: dict[str, float]
    sources: dict[str, str]

    def sampled_tokens(self, config: Config, role: str) -> float:
        """Tokens that a role writes for the pairs of one round."""
        return (self.sampled or 0) * _sampling(config, role).n * self.response_tokens[role]

    def heldout_answers(self, config: Config, role: str) -> int:
        """Answers of a role to held-out prompts: of every system that it is in every decoding, for candidates, and for held-out pairs."""
        training = config.training
        trained = [System("seqkd")] * (training.seqkd is not None) + [System("plad")] * config.rounds.most
        systems = [System("warmup"), *trained] if role == "student" else [System("teacher")]
        answers = sum(len(config.system_decodings(system)) for system in systems)
        if role == "student":
            answers += config.candidates
        pairs = config.rounds.most if role == "student" else 1  # as they are sampled for pairs, one each
        return self.heldout * (answers + pairs)

    def trained_tokens(self, config: Config, name: str) -> float:
        """Tokens that a phase computes. Where references are learnt, their length is taken for the teacher's."""
        if name == SEQKD:  # of equal compute, as the trainer counts it
            name = round_phase(0)
        phase = phases_of(config)[name]
        answer = self.prompt_tokens + self.response_tokens["teacher"]
        match name:
            case "teacher":
                rows, tokens = self.prompts, answer
            case "warmup":
                warmup = config.training.warmup
                assert warmup is not None
                rows, tokens = self.prompts, answer
                if warmup.data == "teacher":  # every response with its prompt
                    rows = (self.sampled or 0) * config.sampling.teacher.n
            case _:
                rows, tokens = self.sampled, self.group_tokens(config)
        groups = phase.epochs * (rows or 0)
        if phase.max_steps:
            groups = min(groups, phase.max_steps * phase.batch_groups)
        return groups * tokens

    def group_tokens(self, config: Config) -> float:
        """Tokens of a prompt and the responses in its pairs, each once."""
        kept, sampling = config.pairing.kept_pairs, config.sampling
        chosen = min(kept, sampling.teacher.n) * self.response_tokens["teacher"]
        return self.prompt_tokens + chosen + min(kept, sampling.student.n) * self.response_tokens["student"]


def workload_of(
    config: Config, prompts: int | None = None, prompt_tokens: float | None = None, response_tokens: float | None = None
) -> Workload:
    """What is given goes before what the run directory has measured, and that before what the config bounds.

    Args:
        prompts: of the data set; `sampling.limit` bounds how many of them are sampled.
    """
    sources: dict[str, str] = {}
    run = RunDir.of(config)
    prepared, limit, given = _manifest(run), config.sampling.limit, prompts
    if prompts is not None:
        sources["prompts"] = "--prompts"
    elif prepared is not None:
        prompts, sources["prompts"] = prepared.rows, "the run directory"
    elif isinstance(config.prompts.source, PythonFunctionsSource):
        prompts, sources["prompts"] = config.prompts.source.limit, "prompts.source.limit"
    elif limit is not None:
        prompts, sources["prompts"] = limit, "sampling.limit; give --prompts where the data set has more"
    else:
        sources["prompts"] = "unknown: give --prompts"
    sampled = prompts
    if prompts is not None and limit is not None:
        sampled, sources["sampled_prompts"] = min(prompts, limit), "sampling.limit"
    if prompt_tokens is not None:
        sources["prompt_tokens"] = "--prompt-tokens"
    else:
        longest = config.prompts.max_tokens or 1024
        prompt_tokens, sources["prompt_tokens"] = longest / 2, f"half of {longest:,}, the longest"
    responses: dict[str, float] = {}
    for role in ("teacher", "student"):
        key = f"response_tokens.{role}"
        measured = _measured(run, role)
        if response_tokens is not None:
            responses[role], sources[key] = response_tokens, "--response-tokens"
        elif measured is not None:
            responses[role], sources[key] = measured, "the run directory"
        else:
            longest = _sampling(config, role).max_tokens
            responses[role], sources[key] = longest / 2, f"half of {longest:,}, the longest"
    return Workload(prompts, sampled, _heldout(config, run, given), prompt_tokens, responses, sources)


def _sampling(config: Config, role: str) -> RoleSampling:
    return config.sampling.student if role == "student" else config.sampling.teacher


def _heldout(config: Config, run: RunDir, prompts: int | None) -> int:
    """Held-out prompts that are answered: those that there are, as far as that is known, up to the limit."""
    prepared, source = _manifest(run, heldout_prompts), config.prompts.source
    bound = config.evaluation.limit
    if prepared is not None:
        bound = prepared.rows
    elif isinstance(source, PythonFunctionsSource):
        bound = source.heldout_limit
    elif config.prompts.heldout is None and prompts is not None:
        bound = round(prompts * config.prompts.heldout_fraction)
    return min(config.evaluation.limit, bound)


def _manifest(run: RunDir, prompts: Callable[[Storage], Dataset] = train_prompts) -> Manifest | None:
    try:
        return prompts(run.storage).manifest()
    except RunFailed:  # damaged; the run itself says so
        return None


def _measured(run: RunDir, role: str) -> float | None:
    """Mean tokens of the responses that a role has written in this run."""
    try:
        manifest = run.samples(role).manifest()
    except RunFailed:
        return None
    return manifest.count("tokens") / manifest.rows if manifest is not None and manifest.rows else None


def disk_bytes(config: Config, work: Workload, sizes: dict[str, ModelSize], device: Device) -> dict[str, float]:
    """Bytes of a run directory by kind, when the run is over, and one checkpoint more that is being written."""
    rounds, training = config.rounds.most, config.training
    row = _BYTES_OF_A_ROW + work.prompt_tokens * _BYTES_OF_A_TOKEN
    samples = 0.0
    for role, times in (("teacher", 1), ("student", rounds)):
        samples += (times * (work.sampled or 0) * _sampling(config, role).n + work.heldout_answers(config, role)) * (
            _BYTES_OF_A_ROW + work.response_tokens[role] * _BYTES_OF_A_TOKEN
        )
    kept = min(config.pairing.kept_pairs, config.sampling.teacher.n * config.sampling.student.n)
    pair = work.prompt_tokens + sum(work.response_tokens.values())
    pairs = (work.sampled or 0) * rounds * kept * (_BYTES_OF_A_ROW + pair * _BYTES_OF_A_TOKEN)
    student, weight = sizes["student"], 4 if device == "cpu" else 2
    models = weight * student.parameters * (rounds + (training.warmup is not None) + (training.seqkd is not None))
    if training.teacher is not None:
        models += weight * sizes["teacher"].parameters
    checkpoints = one = 0.0
    for name, phase in phases_of(config).items():
        one = checkpoint_bytes(sizes["teacher" if name == TEACHER else "student"], training, device)
        checkpoints += (phase.keep_checkpoints + (phase.evaluate_every is not None)) * one
    return {
        "prompts": (work.prompts or 0) * row, "samples": samples, "pairs": pairs, "checkpoints": checkpoints + one, "models": float(models)
    }  # fmt: skip
