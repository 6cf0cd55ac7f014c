"""The run directory: paths of all inputs and outputs, and `run.yaml`, which binds it to one config.

``run.yaml`` holds the resolved config, its fingerprint, and the version of plad-dist that worked on
the run last. A command refuses a config with another value for a key once a step that depends on
the key has committed anything.

A command that writes claims the run first (:mod:`plad_dist.data.claims`). Only the owner of the run
replaces `run.yaml`, after a second comparison.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from plad_dist import __version__
from plad_dist.config import Config, Model, flatten, is_operational
from plad_dist.config_file import parse_config, yaml_reason
from plad_dist.config_yaml import dump_yaml, load_plain_yaml
from plad_dist.data.claims import check_owned, claim_run
from plad_dist.data.dataset import DAMAGED, Dataset
from plad_dist.data.journal import JOURNAL
from plad_dist.data.manifest import MANIFEST
from plad_dist.data.models import resolve_model
from plad_dist.data.parts import part_name
from plad_dist.data.schemas import PAIRS, PROMPTS, SAMPLES
from plad_dist.data.sealed import sealed_yaml
from plad_dist.data.storage import Storage
from plad_dist.data.templates import any_reads_clock
from plad_dist.drafts import RUN_FILE, complete_draft, has_content, settle_drafts
from plad_dist.errors import RunFailed, UserError
from plad_dist.fingerprint import FORMAT
from plad_dist.recipes import RECIPES, Recipe, recipes_decided_by
from plad_dist.systems import PLAD, System

_SHOWN_KEYS = 10
_NO_TRACES = {f"{DAMAGED}/", f"{JOURNAL}/"}  # of a step that has committed anything


@dataclass(frozen=True)
class RunDir:
    """Paths and models of a run, from the point of view of one round.

    Attributes:
        round: number of the round, from 0, to which samples, pairs, student and figures belong.
    """

    storage: Storage
    round: int = 0

    @classmethod
    def of(cls, config: Config) -> RunDir:
        """Return the run directory of a config."""
        return cls.at(config.run.dir)

    @classmethod
    def at(cls, url: str) -> RunDir:
        """Return the run directory at a path or URI.

        Paths become absolute, because workers have other working directories.
        """
        root = Storage(url).local_root
        return cls(Storage(str(root) if root is not None else url))

    def claimed(self, command: str) -> RunDir:
        """Claim the run for a command, and return the run directory as its owner uses it."""
        return replace(self, storage=replace(self.storage, claim=claim_run(self.storage, command)))

    def at_round(self, number: int) -> RunDir:
        """Return the run directory from the point of view of another round."""
        return replace(self, round=number)

    @property
    def root(self) -> Path:
        """Path of the run directory. Raises :class:`UserError` for an object store."""
        root = self.storage.local_root
        if root is None:
            raise UserError(
                f"run.dir: {self.storage.url}: training needs a run directory on a file system that all nodes share; "
                "an object store can hold prompts, samples and pairs only"
            )
        return root

    def samples(self, role: str) -> Dataset:
        """Return the samples of a role from which pairs are built."""
        return Dataset(self.storage, f"samples/{role}/round-{self._round_of(role)}", SAMPLES)

    def of_samples(self, config: Config) -> RunDir:
        """Return the run at the round whose samples the pairs use: round 0 if no round trains the
        model that writes the rejected ones."""
        return self if config.sampling.rejected is None else self.at_round(0)

    def pairs(self) -> Dataset:
        """Return the pairs on which the round trains."""
        return Dataset(self.storage, f"pairs/round-{self.round}", PAIRS)

    def heldout_samples(self, role: str) -> Dataset:
        """Return the samples from which held-out pairs are built."""
        return Dataset(self.storage, f"eval/round-{self._round_of(role)}/pair-samples/{role}", SAMPLES)

    def heldout_pairs(self) -> Dataset:
        """Return the pairs that are ranked during training but not trained on."""
        return Dataset(self.storage, f"eval/round-{self.round}/pairs", PAIRS)

    def system_samples(self, system: System, decoding: str) -> Dataset:
        """Return the responses of a system to the held-out prompts."""
        number = self.round if system == PLAD else system.round or 0
        return Dataset(self.storage, f"eval/round-{number}/samples/{system.kind}/{decoding}", SAMPLES)

    def candidates(self) -> Dataset:
        """Return the candidates: responses of the warm-up student to the held-out prompts."""
        return Dataset(self.storage, "eval/round-0/candidates", SAMPLES)

    @property
    def scores_folder(self) -> str:
        """Folder of the responses that were scored by their log-likelihood."""
        return f"eval/round-{self.round}/scored"

    def scored(self, group: str, system: System) -> Dataset:
        """Return responses with their log-likelihoods.

        Args:
            group: `candidates`, scored by `system`; or the name of a judge, by which the teacher
                scores the responses of `system`.
        """
        return Dataset(self.storage, f"{self.scores_folder}/{group}/{system}", SAMPLES)

    @property
    def judges_folder(self) -> str:
        """Folder of the questions to judges and of their verdicts."""
        return f"eval/round-{self.round}/judges"

    def judge_questions(self, judge: str, chunk: str) -> Dataset:
        """Return a chunk of questions to a judge, named by a fingerprint of both."""
        return Dataset(self.storage, f"{self.judges_folder}/{judge}/{chunk}/prompts", PROMPTS)

    def judge_verdicts(self, judge: str, chunk: str) -> Dataset:
        """Return the responses of a judge to a chunk of questions."""
        return Dataset(self.storage, f"{self.judges_folder}/{judge}/{chunk}/answers", SAMPLES)

    def _round_of(self, role: str) -> int:
        return self.round if role == "student" else 0

    @property
    def metrics(self) -> str:
        """Key of the round's figures in the storage."""
        return f"eval/round-{self.round}/metrics.json"

    @property
    def report(self) -> str:
        """Key of the round's report in the storage."""
        return f"eval/round-{self.round}/report.html"

    def model(self, name: str) -> Path:
        """Return the folder of a model that the run trains or creates."""
        return self.root / "models" / name

    def checkpoints(self, config: Config) -> Storage:
        """Return the storage of the checkpoints."""
        url = config.training.checkpoint_url
        return RunDir.at(url).storage if url else self.storage

    # -- models by their use

    def teacher(self, config: Config, name: str = "teacher") -> str:
        """Return the folder or hub name of a teacher, as it is sampled."""
        return str(self.model("teacher")) if config.training.teacher else resolve_model(config.all_teachers()[name])

    def student(self, config: Config) -> str:
        """Return the folder or hub name of the starting student of the round."""
        if self.round:
            return str(self.model(f"round-{self.round - 1}"))
        return str(self.model("warmup")) if config.training.warmup else resolve_model(config.student)

    @property
    def student_made_by(self) -> str:
        """Command that trains the starting student, if the run trains it."""
        return f"train --phase {f'round-{self.round - 1}' if self.round else 'warmup'}"

    def start_of(self, name: str, settings: Model) -> str:
        """Return the folder or hub name of the `teacher` or `student` before any training."""
        return str(self.model(f"{name}-init")) if settings.is_created else resolve_model(settings)


def round_of(name: str) -> int | None:
    """Return the round of a name such as `round-0`, or None for other names."""
    match = re.fullmatch(r"round-(\d+)", name)
    return int(match[1]) if match else None


def require_model(path: str, made_by: str) -> None:
    """Raise :class:`UserError` if a model that the run trains is missing.

    Args:
        made_by: command that trains the model, without `plad`.
    """
    if path.startswith("/") and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: missing; run `plad {made_by}` first")


# -- run.yaml


@dataclass(frozen=True)
class StoredRun:
    """Config of a run as `run.yaml` records it, with the fingerprint that was recorded with it."""

    config: Config
    fingerprint: str


@dataclass(frozen=True)
class _RunFile:
    """Content of `run.yaml`. The config may not match the schema of this version."""

    config: dict[str, Any]
    fingerprint: str
    version: str | None


def open_run(config: Config, command: str = "plad run") -> RunDir:
    """Claim the run directory of a config for a command, and bind it to the config.

    Returns:
        The run directory as its owner uses it, with an up-to-date `run.yaml` in it.

    Raises:
        UserError: the directory is not writable, or belongs to another config; the message names
            the keys that differ.
        RunFailed: the storage failed, or a later command has claimed the run.
    """
    run = RunDir.of(config)
    check_same_run(config, run)
    run.storage.check_writable()
    run = run.claimed(command)
    settle_drafts(run.storage)
    document = run_document(config)
    stored = run.storage.read(RUN_FILE)
    if stored is None and run.storage.create(RUN_FILE, document):
        return run
    check_same_run(config, run)  # another command may have bound or begun the run since the first comparison
    if stored != document:
        check_owned(run.storage)
        run.storage.replace(RUN_FILE, document)
    return run


def check_binding(config: Config, run: RunDir) -> None:
    """Raise :class:`RunFailed` if the run is no longer that of this command and this config."""
    check_owned(run.storage)
    stored = _read_run_file(run)
    if stored is None or stored.fingerprint != config.fingerprint():
        state = "is gone" if stored is None else f"has the fingerprint {stored.fingerprint[:12]} of another config"
        raise RunFailed(
            f"{run.storage.url}/{RUN_FILE}: {state}, expected {config.fingerprint()[:12]}; something else has changed "
            "the file while this command owned the run. This command ends and writes nothing more. Restore the file, "
            "or use another run.dir"
        )


def is_bound(run: RunDir) -> bool:
    """Return True if the run directory has a `run.yaml`, or a complete draft that has one."""
    return run.storage.read(RUN_FILE) is not None or complete_draft(run.storage) is not None


def is_bound_to(config: Config, run: RunDir) -> bool:
    """Return True if the `run.yaml` in the run directory has the fingerprint of a config."""
    stored = _read_run_file(run)
    return stored is not None and stored.fingerprint == config.fingerprint()


def run_document(config: Config) -> bytes:
    """Return the content of `run.yaml`."""
    document = {
        "format": FORMAT,
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "fingerprint": config.fingerprint(),  # last, so that a truncated file lacks it
    }
    return sealed_yaml(dump_yaml(document))


def with_date(config: Config, run: RunDir) -> Config:
    """Return a config with the date that the templates of its run read from the clock.

    A run that has started keeps its date. A new one gets today's, if any of its templates reads the
    clock.

    Raises:
        UserError: the run directory cannot be used.
    """
    if config.run.date is not None:
        return config
    file = _read_existing(run)
    if file is None:
        return config.with_date(date.today().isoformat()) if any_reads_clock(config) else config
    return _dated_like(config, file)


def _dated_like(config: Config, file: _RunFile) -> Config:
    """Return a config with the date of a stored run, unless it has one of its own."""
    stored = dict(file.config.get("run") or {}).get("date")
    return config.with_date(str(stored)) if stored and config.run.date is None else config


def check_same_run(config: Config, run: RunDir) -> None:
    """Raise :class:`UserError` if existing products depend on keys that have changed."""
    file = _read_existing(run)
    if file is None:
        return
    config = _dated_like(config, file)
    before, now = dict(flatten(_with_defaults(file.config))), config.flat()
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    conflicts = [key for key in differing if not is_operational(key) and _is_in_use(key, run)]
    if not conflicts:
        return
    lines = [f"{key}: {_shown(before, key)} before, {_shown(now, key)} now" for key in conflicts[:_SHOWN_KEYS]]
    if len(conflicts) > _SHOWN_KEYS:
        lines.append(f"and {len(conflicts) - _SHOWN_KEYS} more")
    advice = (
        "Restore the old values, or use another run.dir (with run.reuse, the new run takes over the products that "
        "both runs would produce identically)."
    )
    if file.version not in (None, __version__):
        advice = (
            f"The run was last continued with plad-dist {file.version}, this is {__version__}: finish it with that "
            "version, or use another run.dir."
        )
    raise UserError(
        f"run.dir: {run.storage.url}: belongs to another config. Keys that differ:\n  "
        + "\n  ".join(lines)
        + f"\n{advice}"
    )


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a config with defaults for newer keys, or unchanged if it is not valid any more."""
    try:
        return Config.model_validate(raw).model_dump(mode="json")
    except ValidationError:
        return raw


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if values.get(key) is not None else "not set"


def _is_in_use(key: str, run: RunDir) -> bool:
    """Return True if a step has begun that depends on a config key, directly or indirectly."""
    first = min(recipe.order for recipe in recipes_decided_by(key))
    draft = complete_draft(run.storage)
    folders = ("", f"{draft}/") if draft else ("",)  # the draft holds what is not moved yet
    return any(
        _has_begun(recipe, run.storage, folder) for folder in folders for recipe in RECIPES if recipe.order >= first
    )


def _has_begun(recipe: Recipe, storage: Storage, folder: str) -> bool:
    paths = [f"{folder}{trace}" for trace in recipe.traces]
    firsts = [f"{folder}{path}/{name}" for path in recipe.datasets for name in (part_name(0), MANIFEST)]
    if any(map(storage.exists, firsts)):
        return True
    if not recipe.can_withdraw:
        return any(map(storage.exists, paths))
    names = [name for path in paths for name in storage.sizes(path)]
    return any(not name.startswith(".") and name not in _NO_TRACES for name in names)


def load_run(path: str) -> StoredRun:
    """Return the config that a run directory belongs to.

    Raises:
        UserError: the path is not a run directory.
        RunFailed: its `run.yaml` is damaged.
    """
    run = RunDir.at(path)
    root = run.storage.local_root
    if root is not None and not root.is_dir():
        raise UserError(f"{path}: no such run directory")
    file = _read_run_file(run)
    if file is None:
        raise UserError(f"{path}: not a run directory: it has no {RUN_FILE}")
    return StoredRun(parse_config(file.config, f"{path}/{RUN_FILE}"), file.fingerprint)


def _read_existing(run: RunDir) -> _RunFile | None:
    """Return `run.yaml`, or None in a new run directory.

    Raises:
        UserError: the directory cannot be used.
    """
    root = run.storage.local_root
    if root is not None and not _is_folder(root):
        return None
    file = _read_run_file(run)
    if file is None and root is not None and has_content(root):
        raise UserError(f"run.dir: {root}: not empty and not a run directory (no {RUN_FILE}); use another one")
    return file


def _read_run_file(run: RunDir) -> _RunFile | None:
    data = run.storage.read(RUN_FILE)
    if data is None and (draft := complete_draft(run.storage)):
        data = run.storage.read(f"{draft}/{RUN_FILE}")
    if data is None:
        return None
    try:
        document = load_plain_yaml(data)
        file = _RunFile(dict(document["config"]), str(document["fingerprint"]), document.get("version"))
        run_format = int(document.get("format", 1))
    except yaml.YAMLError as error:
        problem = yaml_reason(error)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        problem = "expected `config` and `fingerprint`; a plain config is not a run directory, its run.dir names one"
    else:
        if run_format == FORMAT:
            return file
        raise UserError(
            f"{run.storage.url}/{RUN_FILE}: the run has format {run_format}, plad-dist {__version__} reads format "
            f"{FORMAT}. Finish it with plad-dist {file.version}, which last worked on it, or use another run.dir"
        )
    raise RunFailed(
        f"{run.storage.url}/{RUN_FILE}: damaged ({problem}). Nothing was changed. Restore the file from a copy, or use "
        "another run directory."
    )


def _is_folder(root: Path) -> bool:
    """Return True if the run directory exists. Raise :class:`UserError` if it cannot be created."""
    try:
        if root.exists():
            if not root.is_dir():
                raise UserError(f"run.dir: {root}: is a file, expected a directory")
            return True
        parent = next(path for path in root.parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"run.dir: {root}: cannot be created: {parent} is not a writable folder")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"run.dir: {str(root)!r:.100}: not a usable path: {error}") from None
    return False
