"""A study: one config in several variants, each a run of its own; what they have in common is made once."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from plad_dist.config import Config, Decoding
from plad_dist.config.section import Section
from plad_dist.config_file import explain, load_config, override, parse_config, read_yaml
from plad_dist.errors import UserError
from plad_dist.rundir import PLAD
from plad_dist.text_metrics import main_decoding

logger = logging.getLogger("plad")


class Study(Section):
    """Variants of a run."""

    base: str = Field(min_length=1, description="The run's config, relative to this file.")
    dir: str = Field(min_length=1, description="Folder of the runs: <dir>/<variant>, or <dir>/seed-<seed>/<variant>.")
    set: dict[str, Any] = Field(default={}, description="Keys of the config that are the same in all variants.")
    seeds: list[int] = Field(default=[], description="Values of run.seed; every variant is run with each.")
    variants: dict[str, dict[str, Any]] = Field(min_length=1, description="Keys of the config by variant.")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is given twice")
        return value

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
    raw, known = read_yaml(file, "base, dir, variants"), ", ".join(Study.model_fields)
    if "variants" not in raw and {"prompts", "student"} & raw.keys():
        raise UserError(f"{path}: is the config of a run (`plad run`); a study has {known}")
    if unknown := raw.keys() - Study.model_fields.keys():
        raise UserError(f"{path}: {', '.join(map(str, sorted(unknown, key=str)))}: unknown key; a study has {known}")
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, path)) from None
    for name, changes in study.variants.items():
        if own := {"run", "run.dir", *(["run.seed"] if study.seeds else [])} & changes.keys():
            raise UserError(f"{path}: variant {name}: {min(own)}: is set for each run by the study's `dir` and `seeds`")
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
        for name, config in runs:
            if _main_decoding(config) != _main_decoding(runs[0][1]):
                raise UserError(
                    f"{path}: variant {name}: its main decoding is not that of {runs[0][0]}, so that they could not be compared; give "
                    "all the same `evaluation.decodings`"
                )
    return found


def _main_decoding(config: Config) -> tuple[str, Decoding]:
    decodings = config.decodings()
    name = main_decoding(
        [(PLAD, name) for name in decodings], {name: each.temperature for name, each in decodings.items()}
    )
    return name, decodings[name]


def load_runs(path: str, overrides: list[str]) -> list[tuple[str, Config]]:
    """The run of a config, by the file's name; of a study its variants with the first seed, as the seed changes no size.

    Raises:
        UserError: for anything wrong with the file.
    """
    if {"base", "variants"} <= read_yaml(Path(path)).keys():
        return load_study(path, overrides)[0]
    return [(path, load_config(path, overrides))]
