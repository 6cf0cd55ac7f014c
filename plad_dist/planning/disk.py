"""Disk that a run needs."""

from __future__ import annotations

from plad_dist.config import Config
from plad_dist.phases import phases_of
from plad_dist.planning.fit import trained_size
from plad_dist.planning.sizes import Device, ModelSize
from plad_dist.planning.training_memory import checkpoint_bytes
from plad_dist.planning.workload import Workload, rejected_role

_BYTES_PER_TOKEN = 4 + 4.5  # the token's id, and its text
_BYTES_PER_ROW = 200.0


def disk_bytes(config: Config, work: Workload, sizes: dict[str, ModelSize], device: Device) -> dict[str, float]:
    """Return the bytes of a finished run directory by kind, plus one checkpoint in progress."""
    rounds = config.rounds.most
    pairs_per_prompt = min(config.pairing.kept_pairs, config.sampling.teacher.n * config.sampling.student.n)
    samples = sum(
        (work.sampled_responses(config, role) + work.heldout_responses(config, role)) * _row_bytes(tokens)
        for role, tokens in work.response_tokens.items()
    )
    pair_tokens = work.response_tokens["teacher"] + work.response_tokens[rejected_role(config)]
    pair = _row_bytes(work.prompt_tokens + pair_tokens)
    return {
        "prompts": (work.prompts or 0) * _row_bytes(work.prompt_tokens),
        "samples": samples,
        "pairs": (work.sampled_prompts or 0) * rounds * pairs_per_prompt * pair,
        "checkpoints": _checkpoint_bytes(config, sizes, device),
        "models": float(_model_bytes(config, sizes, device)),
    }


def _row_bytes(tokens: float) -> float:
    return _BYTES_PER_ROW + tokens * _BYTES_PER_TOKEN


def _checkpoint_bytes(config: Config, sizes: dict[str, ModelSize], device: Device) -> float:
    """Return the bytes of the checkpoints that all phases keep, plus one more of the last phase."""
    total = checkpoint = 0.0
    for name, phase in phases_of(config).items():
        checkpoint = checkpoint_bytes(trained_size(name, sizes), config.training, device)
        total += (phase.keep_checkpoints + (phase.evaluate_every is not None)) * checkpoint
    return total + checkpoint


def _model_bytes(config: Config, sizes: dict[str, ModelSize], device: Device) -> int:
    """Return the bytes of the models that the phases export, and of a student cut from a model."""
    training, width = config.training, 4 if device == "cpu" else 2
    students = config.rounds.most + (training.warmup is not None) + (training.seqkd is not None)
    cut = 2 * sizes["student"].parameters if config.student.cut is not None else 0
    models = cut + width * sizes["student"].parameters * students
    return models + (width * sizes["teacher"].parameters if training.teacher is not None else 0)
