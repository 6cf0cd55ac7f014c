"""A study: one config in several variants, each a run of its own; what they have in common is made once."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from plad_dist.config import Config, flatten, is_operational
from plad_dist.config.section import Section
from plad_dist.config_file import explain, load_config, override, parse_config, read_yaml
from plad_dist.errors import UserError
from plad_dist.rundir import FILES, RUN_FILE, RunDir, first_reader, run_document

logger = logging.getLogger("plad")


class Study(Section):
    """Variants of a run."""

    base: str = Field(min_length=1, description="The run's config, relative to this file.")
    dir: str = Field(min_length=1, description="Folder of the runs: <dir>/<variant>, or <dir>/seed-<seed>/<variant>.")
    set: dict[str, Any] = Field(default={}, description="Keys of the config that are the same in all variants.")
    seeds: list[int] = Field(default=[], description="Values of run.seed; every variant is run with each.")
    variants: dict[str, dict[str, Any]] = Field(min_length=1, description="Keys of the config by variant.")

    @field_validator("variants")
    @classmethod
    def _names(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"name {name!r}: use letters, digits, '-', '_' and '.' alone")
        return value


def load_study(path: str, overrides: list[str]) -> list[list[tuple[str, Config]]]:
    """The runs of a study by seed, each with the name of its variant.

    Args:
        overrides: `key=value` for every run, over what the file sets.

    Raises:
        UserError: for anything wrong with the study or one of its configs.
    """
    file = Path(path)
    try:
        study = Study.model_validate(read_yaml(file, "base, dir, variants"))
    except ValidationError as error:
        raise UserError(explain(error, path)) from None
    base = read_yaml(file.parent / study.base)
    for argument in overrides:
        if argument.partition("=")[0] in ("run.dir", "run.seed"):
            raise UserError(f"override {argument!r}: is set for each run by the study's `dir` and `seeds`")
    found = []
    seeds: list[int | None] = [*study.seeds] or [None]
    for seed in seeds:
        folder = f"{study.dir}/seed-{seed}" if seed is not None else study.dir
        runs = []
        for name, changes in study.variants.items():
            keys = (
                study.set | changes | ({"run.seed": seed} if seed is not None else {}) | {"run.dir": f"{folder}/{name}"}
            )
            runs.append((name, parse_config(override(base, keys, overrides), f"{path}: variant {name}")))
        found.append(runs)
    return found


def load_runs(path: str, overrides: list[str]) -> list[tuple[str, Config]]:
    """The run of a config, by the file's name; of a study its variants with the first seed, as the seed changes no size.

    Raises:
        UserError: for anything wrong with the file.
    """
    if {"base", "variants"} <= read_yaml(Path(path)).keys():
        return load_study(path, overrides)[0]
    return [(path, load_config(path, overrides))]


def begin(config: Config, earlier: list[Config]) -> None:
    """Take over what an earlier run of the study has made and this one would make alike, where this one is not begun.

    These are the stages before the first one that a differing key decides, of the run that has most in common. They are put together
    beside the run directory, which appears as a whole or not at all. Files are linked: nothing rewrites one in place but the
    logs under events/, which are copied.
    """
    run = RunDir.of(config)
    if not earlier or run.storage.local_root is None or run.root.exists():
        return
    shared, source = max(((_stages_alike(config, other), other) for other in earlier), key=lambda item: item[0])
    there, draft = RunDir.of(source).root, run.root.with_name(f".{run.root.name}-begun")
    shutil.rmtree(draft, ignore_errors=True)
    files = {
        file for patterns in FILES[:shared] for pattern in patterns for file in there.glob(pattern) if file.is_file()
    }
    for file in sorted(files):
        _take_over(file, draft / file.relative_to(there))
    if files:
        (draft / RUN_FILE).write_bytes(run_document(config))
        draft.rename(run.root)
        logger.info("%s: %d files of the first %d stages taken over from %s", run.root, len(files), shared, there)


def _stages_alike(config: Config, other: Config) -> int:
    """How many stages, from the first, two configs carry out alike."""
    here, there = (dict(flatten(each.model_dump(mode="json"))) for each in (config, other))
    differing = [
        key for key in here.keys() | there.keys() if here.get(key) != there.get(key) and not is_operational(key)
    ]
    alike = min(map(first_reader, differing), default=len(FILES))
    warmup = config.training.warmup
    of_samples = warmup is not None and warmup.data == "teacher"
    return min(alike, 1) if of_samples and alike == 2 else alike  # the warm-up learnt from other samples


def _take_over(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if "events" in to.parts:
        shutil.copy2(file, to)
        return
    try:
        os.link(file, to)
    except OSError:  # another file system
        shutil.copy2(file, to)
