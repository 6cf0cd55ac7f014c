"""DeepSpeed configs by name or path."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from plad_dist.errors import UserError


def load_deepspeed(name: str) -> dict[str, Any]:
    """A DeepSpeed config by name in ds_configs/ or by path. Raises :class:`UserError` where it is not ZeRO-3 JSON."""
    path = Path(name)
    if path.suffix != ".json" and "/" not in name:
        packaged = Path(str(importlib.resources.files("plad_dist"))) / "ds_configs" / f"{name}.json"
        path = packaged if packaged.is_file() else Path(__file__).parents[2] / "ds_configs" / f"{name}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(item.stem for item in path.parent.glob("*.json")))
        raise UserError(f"training.deepspeed: {name!r}: no such file {path}; known by name: {known}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"training.deepspeed: {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("zero_optimization", {}).get("stage") != 3:
        raise UserError(f"training.deepspeed: {path}: expected zero_optimization.stage 3")
    return config
