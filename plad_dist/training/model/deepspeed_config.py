"""DeepSpeed configs by name or path."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from plad_dist.config import Training
from plad_dist.errors import UserError
from plad_dist.resources import resource

# What the run's own config decides, and by which key.
_OURS = {
    "train_batch_size": "training.<phase>.batch_groups",
    "train_micro_batch_size_per_gpu": "training.micro_batch_tokens",
    "gradient_accumulation_steps": "training.<phase>.batch_groups and micro_batch_tokens",
    "gradient_clipping": "training.<phase>.optimizer.clip_norm",
    "optimizer": "training.<phase>.optimizer",
    "scheduler": "training.<phase>.optimizer.schedule",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "data_types": "training.dtype",
}


def load_deepspeed(name: str) -> dict[str, Any]:
    """A DeepSpeed config by name in ds_configs/ or by path.

    Raises:
        UserError: it is no JSON, not ZeRO stage 2 or 3, offloads to NVMe, or sets what the run's config sets.
    """
    path = Path(name)
    if path.suffix != ".json" and "/" not in name:
        path = resource("ds_configs") / f"{name}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(item.stem for item in path.parent.glob("*.json")))
        raise UserError(f"training.deepspeed: {name!r}: no such file {path}; known by name: {known}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"training.deepspeed: {path}: not valid JSON: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (2, 3):
        raise UserError(f"training.deepspeed: {path}: expected zero_optimization.stage 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise UserError(
                f"training.deepspeed: {path}: zero_optimization.{name}.device: nvme: what lies there is in no checkpoint; set cpu"
            )
    for key, ours in _OURS.items():
        if key in config:
            raise UserError(f"training.deepspeed: {path}: {key}: is set by the run's {ours}; remove one of the two")
    return config


def is_offloaded(config: dict[str, Any]) -> bool:
    """Whether the optimizer is on the CPU, where DeepSpeed has one AdamW of its own."""
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def check_optimizers(name: str, training: Training) -> None:
    """Raise :class:`UserError` for phases whose optimizer cannot be offloaded as the DeepSpeed config wants it."""
    if not is_offloaded(load_deepspeed(name)):
        return
    for phase in ("teacher", "warmup", "round", "seqkd"):
        section = getattr(training, phase)
        if section is not None and section.optimizer.name == "adamw_8bit":
            raise UserError(
                f"training.{phase}.optimizer.name: adamw_8bit: DeepSpeed offloads no such optimizer to the CPU "
                f"(training.deepspeed: {name}); set adamw, or another DeepSpeed config"
            )


def check_deepspeed(name: str) -> None:
    """Raise :class:`UserError` for keys of `zero_optimization` that the installed DeepSpeed does not take."""
    # Importing it warns of having no GPU, which a driver needs not.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**load_deepspeed(name)["zero_optimization"])
    except ValidationError as error:
        lines = [f"zero_optimization.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UserError(
            f"training.deepspeed: {name}: not as the installed DeepSpeed takes it:\n  " + "\n  ".join(lines)
        ) from None
