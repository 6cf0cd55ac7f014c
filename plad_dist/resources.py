"""Folders that come with the package: beside it in a checkout, inside it when it is installed from a wheel."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def resource(folder: str) -> Path:
    """Path of `ds_configs` or `ray_jobs`."""
    packaged = Path(str(importlib.resources.files("plad_dist"))) / folder
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / folder
