"""A study: variants of one config, each a run of its own. Common work is done once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from plad_dist.config import Config, Decoding
from plad_dist.config.section import Section
from plad_dist.config.values import PathText, escape_path, refuse_clash
from plad_dist.config_file import load_config, override, parse_config, parse_section, read_yaml
from plad_dist.data.local_files import failure_explained, write_durably
from plad_dist.errors import UserError
from plad_dist.rundir import RunDir
from plad_dist.systems import PLAD
from plad_dist.text_metrics import main_decoding

if TYPE_CHECKING:
    from plad_dist.evaluation.comparison import Comparison
    from plad_dist.evaluation.over_seeds import VariantFigures


class Study(Section):
    """Variants of a run."""

    base: PathText = Field(min_length=1, description="The run's config, relative to this file.")
    dir: PathText = Field(
        min_length=1, description="Folder of the runs: <dir>/<variant>, or <dir>/seed-<seed>/<variant>."
    )
    set: dict[str, Any] = Field(default={}, description="Keys of the config that are the same in all variants.")
    seeds: list[int] = Field(default=[], description="Values of run.seed; every variant is run with each.")
    variants: dict[str, dict[str, Any]] = Field(min_length=1, description="Keys of the config by variant.")

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is given twice")
        return value

    @field_validator("variants")
    @classmethod
    def _check_names(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"name {name!r}: use only letters, digits, '-', '_' and '.'")
        return refuse_clash("variants", value)


def load_study(path: str, overrides: list[str]) -> list[list[tuple[str, Config]]]:
    """Return the runs of a study by seed, each with the name of its variant.

    Args:
        overrides: `key=value` for every run; they override the values of the file.

    Raises:
        UserError: the study or one of its configs is invalid.
    """
    study = _read_study(path)
    base = read_yaml(Path(path).parent / study.base)
    for argument in overrides:
        if argument.partition("=")[0] in ("run.dir", "run.seed"):
            raise UserError(f"override {argument!r}: set by the study's `dir` and `seeds` for each run; remove it")
    seeds: list[int | None] = [*study.seeds] or [None]
    by_seed = []
    for seed in seeds:
        folder = f"{study.dir}/seed-{seed}" if seed is not None else study.dir
        runs = []
        for name, changes in study.variants.items():
            own_seed = {"run.seed": seed} if seed is not None else {}
            keys = study.set | changes | own_seed | {"run.dir": escape_path(f"{folder}/{name}")}
            runs.append((name, parse_config(override(base, keys, overrides), f"{path}: variant {name}")))
        _check_common_decoding(path, runs)
        by_seed.append(runs)
    return by_seed


def _read_study(path: str) -> Study:
    raw, keys = read_yaml(Path(path), "base, dir, variants"), ", ".join(Study.model_fields)
    if "variants" not in raw and {"prompts", "student"} & raw.keys():
        raise UserError(f"{path}: is the config of a run (`plad run`); a study has {keys}")
    if unknown := raw.keys() - Study.model_fields.keys():
        raise UserError(f"{path}: {', '.join(map(str, sorted(unknown, key=str)))}: unknown key; a study has {keys}")
    study = parse_section(Study, raw, path)
    # The scalars as they were written, for messages about the variants.
    study = study.model_copy(update={"set": raw.get("set", {}), "variants": raw["variants"]})
    reserved = {"run", "run.dir", *(["run.seed"] if study.seeds else [])}
    for name, changes in study.variants.items():
        if conflicts := reserved & changes.keys():
            raise UserError(
                f"{path}: variant {name}: {min(conflicts)}: set by the study's `dir` and `seeds` for each run; "
                "remove it"
            )
    return study


def _check_common_decoding(path: str, runs: list[tuple[str, Config]]) -> None:
    """Raise :class:`UserError` if the variants have different main decodings."""
    first_name, first = runs[0]
    for name, config in runs:
        if _main_decoding(config) != _main_decoding(first):
            raise UserError(
                f"{path}: variant {name}: its main decoding differs from that of {first_name}, so they cannot be "
                "compared; give all variants the same `evaluation.decodings`"
            )


def _main_decoding(config: Config) -> tuple[str, Decoding]:
    decodings = config.decodings()
    temperatures = {name: decoding.temperature for name, decoding in decodings.items()}
    name = main_decoding([(PLAD, name) for name in decodings], temperatures)
    return name, decodings[name]


def load_runs(path: str, overrides: list[str]) -> list[tuple[str, Config]]:
    """Return the run of a config, named like its file, or the variants of a study.

    The variants have the first seed of the study, because the seed changes no size.

    Raises:
        UserError: the file is invalid.
    """
    if {"base", "variants"} <= read_yaml(Path(path)).keys():
        return load_study(path, overrides)[0]
    return [(path, load_config(path, overrides))]


def run_variants(
    runs: Sequence[tuple[str, Config]], run_pipeline: Callable[[Config], object]
) -> tuple[Comparison, Path]:
    """Run the variants of one seed in order, and compare them.

    A variant takes over the results that earlier variants have in common with it.

    Args:
        runs: the variants of one seed, as :func:`load_study` returns them.
        run_pipeline: runs one config to its end.

    Returns:
        The comparison of the variants, and the folder of their runs.
    """
    from plad_dist.evaluation.comparison import compare_runs
    from plad_dist.reuse import take_over

    finished: list[Config] = []
    for _, config in runs:
        take_over(config, finished)
        run_pipeline(config)
        finished.append(config)
    return compare_runs([config.run.dir for config in finished]), RunDir.of(finished[0]).root.parent


def write_figures_over_seeds(seeds: Sequence[Sequence[tuple[str, Config]]]) -> tuple[list[VariantFigures], Path]:
    """Write the figures of every variant over all seeds to `study.json` in the study's folder.

    Args:
        seeds: finished runs, as :func:`load_study` returns them.

    Returns:
        The figures of each variant, and the path of the file.

    Raises:
        RunFailed: the file cannot be written.
    """
    from plad_dist.evaluation.over_seeds import study_over_seeds

    variants = study_over_seeds([{name: config.run.dir for name, config in runs} for runs in seeds])
    _, first = seeds[0][0]
    path = RunDir.of(first).root.parent.parent / "study.json"
    figures = json.dumps([variant.to_json() for variant in variants], indent=1)
    with failure_explained(str(path), "written"):
        write_durably(path, figures.encode(), os.replace)
    return variants, path
