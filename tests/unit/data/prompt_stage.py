"""Helpers for tests of the stage `prepare`: small prompt files, configs and written datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data.dataset import Dataset
from plad_dist.data.manifest import Manifest
from plad_dist.data.prompts import heldout_prompts, prepare, train_prompts
from plad_dist.data.storage import Storage
from tests.conftest import tiny_config

Rows = list[dict[str, Any]]
SERVER = {"endpoint": {"url": "http://host/v1", "model": "m"}}
TWO_TEACHERS = {
    "short": SERVER | {"share": 3, "filter": "messages[0].content|length < 3"},
    "any": SERVER | {"share": 1},
}


def raw_config(folder: Path, texts: Iterable[str], **prompts: Any) -> dict[str, Any]:
    """Return the config of a run whose prompts have the given texts."""
    raw = tiny_config(folder)
    write_rows(folder / "prompts.jsonl", texts)
    raw["prompts"] |= prompts
    return raw


def write_rows(path: Path, texts: Iterable[str]) -> None:
    """Write a prompts file with a row per text."""
    with path.open("w") as file:
        file.writelines(json.dumps({"prompt": text, "answer": f"re {text}"}) + "\n" for text in texts)


def with_teachers(raw: dict[str, Any], teachers: dict[str, Any]) -> dict[str, Any]:
    del raw["teacher"], raw["training"]["teacher"]
    return raw | {"teachers": teachers}


def config_of(raw: dict[str, Any]) -> Config:
    return parse_config(raw, "test")


def prepared(config: Config) -> tuple[Dataset, Dataset]:
    """Run the stage and return the training and the held-out dataset."""
    storage = Storage(config.run.dir)
    prepare(config, storage)
    return train_prompts(storage), heldout_prompts(storage)


def rows_of(dataset: Dataset) -> Rows:
    rows: Rows = dataset.read().to_pylist()
    return rows


def texts_of(dataset: Dataset) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows_of(dataset)]


def manifest_of(dataset: Dataset) -> Manifest:
    manifest = dataset.manifest()
    assert manifest is not None
    return manifest


def content_of(rows: Rows) -> str:
    """Return the fact `content` that the manifest of these rows must have."""
    lines = [json.dumps([row["prompt_id"], row["reference"], row["teacher"]]) + "\n" for row in rows]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
