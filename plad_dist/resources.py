"""Folders that are shipped with the package: beside it in a checkout, inside it in a wheel."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def resource(folder: str) -> Path:
    """Return the path of a shipped folder: `ds_configs` or `ray_jobs`."""
    packaged = Path(str(importlib.resources.files("plad_dist"))) / folder
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / folder
