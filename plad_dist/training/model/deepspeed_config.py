"""DeepSpeed configs by name or path, and checks of their keys."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from plad_dist.config import Training
from plad_dist.errors import UserError
from plad_dist.resources import resource
from plad_dist.untrusted import parse_json

# Keys that the run's config decides, with the config key of each.
_RUN_KEYS = {
    "train_batch_size": "training.<phase>.batch_groups",
    "train_micro_batch_size_per_gpu": "training.micro_batch_tokens",
    "gradient_accumulation_steps": "training.<phase>.batch_groups and micro_batch_tokens",
    "gradient_clipping": "training.<phase>.optimizer.clip_norm",
    "optimizer": "training.<phase>.optimizer",
    "scheduler": "training.<phase>.optimizer.schedule",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "amp": "training.dtype",
    "torch_autocast": "training.dtype",
    "data_types": "training.dtype",
}


def load_deepspeed(name: str) -> dict[str, Any]:
    """Return a DeepSpeed config by its name in ds_configs/ or by its path.

    Raises:
        UserError: the file is missing or not JSON, is not of ZeRO stage 2 or 3, offloads to NVMe,
            or sets a key that the run's config decides. The message names all of these.
    """
    path, config = _read(name)
    problems = _conflicts(config)
    if len(problems) > 1:
        raise UserError(f"training.deepspeed: {path}: {len(problems)} problems:\n  " + "\n  ".join(problems))
    if problems:
        raise UserError(f"training.deepspeed: {path}: {problems[0]}")
    return config


def _read(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the path and the content of a DeepSpeed config."""
    path = Path(name)
    if path.suffix != ".json" and "/" not in name:
        path = resource("ds_configs") / f"{name}.json"
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        names = ", ".join(sorted(item.stem for item in path.parent.glob("*.json")))
        raise UserError(f"training.deepspeed: {name!r}: no such file {path}; available by name: {names}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"training.deepspeed: {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"training.deepspeed: {path}: expected a JSON object, got {type(config).__name__}")
    return path, config


def _conflicts(config: dict[str, Any]) -> list[str]:
    """Return the keys of a DeepSpeed config that a run cannot use, each with what to do."""
    problems = []
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or type(zero.get("stage")) is not int or zero["stage"] not in (2, 3):
        problems.append("expected zero_optimization.stage 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) if isinstance(zero, dict) else None
        if section is not None and not isinstance(section, dict):
            problems.append(f'zero_optimization.{key}: expected an object such as {{"device": "cpu"}}')
        elif section and section.get("device") == "nvme":
            problems.append(f"zero_optimization.{key}.device: nvme: checkpoints do not contain states on NVMe; set cpu")
    problems += [
        f"{key}: is decided by {run_key} of the run's config; remove it"
        for key, run_key in _RUN_KEYS.items()
        if key in config
    ]
    return problems


def is_offloaded(config: dict[str, Any]) -> bool:
    """Return True if the optimizer is on the CPU, where DeepSpeed uses an AdamW of its own."""
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def check_optimizers(name: str, training: Training) -> None:
    """Raise :class:`UserError` if the DeepSpeed config offloads an optimizer that cannot be."""
    if not is_offloaded(load_deepspeed(name)):
        return
    for phase in ("teacher", "warmup", "round", "seqkd"):
        section = getattr(training, phase)
        if section is not None and section.optimizer.name == "adamw_8bit":
            raise UserError(
                f"training.{phase}.optimizer.name: adamw_8bit: DeepSpeed cannot offload this optimizer to the CPU "
                f"(training.deepspeed: {name}); set adamw, or another DeepSpeed config"
            )


def check_workers(training: Training) -> None:
    """Raise :class:`UserError` if the DeepSpeed config forbids the number of workers or the watch.

    An elastic group needs no check of the second partition (hpZ): it takes the largest one that
    divides its size.
    """
    zero = load_deepspeed(training.deepspeed)["zero_optimization"]
    fewest, most = training.workers
    is_elastic = fewest < most
    partition = min(int(zero.get("zero_hpz_partition_size", 1)), most)
    if not is_elastic and partition > 1 and most % partition:
        raise UserError(
            f"training.num_workers={most} is no multiple of zero_hpz_partition_size={partition} (training.deepspeed: "
            f"{training.deepspeed}); set a multiple, or another DeepSpeed config"
        )
    if training.watch is not None and zero["stage"] != 3:
        raise UserError(
            f"training.watch: reads checkpoints of ZeRO stage 3, but training.deepspeed: {training.deepspeed} has "
            f"stage {zero['stage']}; set another DeepSpeed config, or remove training.watch"
        )
    if is_elastic and zero["stage"] != 3:
        raise UserError(
            f"training.num_workers: an elastic group needs ZeRO stage 3, but training.deepspeed: {training.deepspeed} "
            f"has stage {zero['stage']}; set another DeepSpeed config, or a single number of workers"
        )


def check_deepspeed(name: str) -> None:
    """Raise :class:`UserError` if the installed DeepSpeed rejects `zero_optimization`.

    Conflicts with the run's config are left to :func:`load_deepspeed`, so that both are reported.
    """
    # The import warns if there is no GPU, and a driver needs none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    zero = _read(name)[1].get("zero_optimization")
    if not isinstance(zero, dict):
        return
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        lines = [f"zero_optimization.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UserError(
            f"training.deepspeed: {name}: rejected by the installed DeepSpeed:\n  " + "\n  ".join(lines)
        ) from None
