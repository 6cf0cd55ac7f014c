"""A study: one config in several variants, each a run of its own; what they have in common is made once."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from plad_dist.config import Config, Decoding, flatten, is_operational
from plad_dist.config.section import Section
from plad_dist.config_file import explain, load_config, override, parse_config, read_yaml
from plad_dist.errors import UserError
from plad_dist.evaluation.metrics import main_decoding
from plad_dist.rundir import PLAD, RUN_FILE, RunDir, first_reader, run_document

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


@dataclass(frozen=True)
class _Part:
    """One piece of a run's work: what it leaves, and the pieces that it is made of."""

    files: tuple[str, ...]
    needs: tuple[str, ...] = ()


def _model_files(*names: str) -> tuple[str, ...]:
    return tuple(f"{kind}/{name}/**/*" for name in names for kind in ("models", "events"))


def _sample_files(role: str, system: str) -> tuple[str, ...]:
    return tuple(
        f"{folder}/**/*"
        for folder in (f"samples/{role}/round-0", f"eval/round-0/pair-samples/{role}", f"eval/round-0/samples/{system}")
    )


_PARTS = {
    "prompts": _Part(("prompts/**/*", "eval/prompts/**/*")),
    "teacher": _Part(_model_files("teacher-init", "teacher"), ("prompts",)),
    "teacher samples": _Part(_sample_files("teacher", "teacher"), ("teacher",)),
    "warmup": _Part(_model_files("student-init", "warmup"), ("prompts",)),
    "student samples": _Part((*_sample_files("student", "warmup"), "eval/round-0/candidates/**/*"), ("warmup",)),
    "pairs": _Part(("pairs/round-0/**/*", "eval/round-0/pairs/**/*"), ("teacher samples", "student samples")),
    "round": _Part(_model_files("round-0"), ("pairs",)),
}
# What of these a config section decides: by the section, else by the first stage that reads it.
_DECIDES: dict[str | int, tuple[str, ...]] = {
    "training.teacher": ("teacher",),
    "training.warmup": ("warmup",),
    "training.deepspeed": ("teacher", "warmup"),  # operational, but quantised weights give other students
    "training.watch": ("round",),  # operational, but a collapse ends the round at another checkpoint
    "sampling.teacher": ("teacher samples",),
    "sampling.student": ("student samples",),
    "evaluation.candidates": ("student samples",),
    "evaluation.warmup_temperatures": ("student samples",),
    0: ("prompts",),
    1: ("teacher", "warmup"),
    2: ("teacher samples", "student samples"),
    3: ("pairs",),
    4: ("round",),
}


def begin(config: Config, earlier: list[Config]) -> None:
    """Take over what an earlier run of the study has made and this one would make alike, where this one is not begun.

    It comes from the run that has most in common: what no differing key decides, and nothing that it is made of. It is put together
    beside the run directory, which appears as a whole or not at all. Files are linked: nothing rewrites one in place but the
    logs under events/, which are copied. Cards are left: they show another run's figures.
    """
    run = RunDir.of(config)
    if not earlier or run.storage.local_root is None or run.root.exists():
        return
    shared, source = max(((_made_alike(config, other), other) for other in earlier), key=lambda item: len(item[0]))
    there, draft = RunDir.of(source).root, run.root.with_name(f".{run.root.name}-begun")
    shutil.rmtree(draft, ignore_errors=True)
    files = {
        file.relative_to(there)
        for part in shared
        for pattern in _PARTS[part].files
        for file in there.glob(pattern)
        if file.is_file() and file.name != "README.md"
    }
    for file in sorted(files):
        _take_over(there / file, draft / file, copied=file.parts[0] == "events")
    if files:
        (draft / RUN_FILE).write_bytes(run_document(config))
        draft.rename(run.root)
        logger.info("%s: %d files taken over from %s: %s", run.root, len(files), there, ", ".join(shared))


def _made_alike(config: Config, other: Config) -> list[str]:
    """The parts that two configs make alike."""
    here, there = map(_deciding_keys, (config, other))
    differing = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
    decided = {part for key in differing for part in _decided_by(key)}
    alike: list[str] = []
    for name, part in _PARTS.items():  # in an order in which what a part is made of comes before it
        needs = part.needs
        if name == "warmup" and config.training.warmup and config.training.warmup.data == "teacher":
            needs = (*needs, "teacher samples")
        if name not in decided and set(needs) <= set(alike):
            alike.append(name)
    return alike


def _deciding_keys(config: Config) -> dict[str, Any]:
    """What decides how a run comes out, by key; the decodings as they are used, whichever section they come from."""
    raw = config.model_dump(mode="json")
    raw["evaluation"]["decodings"] = {name: each.model_dump(mode="json") for name, each in config.decodings().items()}
    return {key: value for key, value in flatten(raw) if not is_operational(key) or _section(key) is not None}


def _section(key: str) -> str | None:
    """The section of a key, or the key, of which it is told what it decides."""
    parts = key.split(".")
    sections = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((section for section in sections if section in _DECIDES), None)


def _decided_by(key: str) -> tuple[str, ...]:
    return _DECIDES.get(_section(key) or first_reader(key), ())


def _take_over(file: Path, to: Path, *, copied: bool) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if copied:
        shutil.copy2(file, to)
        return
    try:
        os.link(file, to)
    except OSError:  # another file system
        shutil.copy2(file, to)
