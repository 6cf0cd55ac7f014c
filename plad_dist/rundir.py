"""The run directory: where every stage finds its inputs and puts its outputs, and what guards them.

``run.yaml`` holds the resolved config, its fingerprint and the version of plad-dist that worked on it last. A config that differs in a key that decides what the run
produces is refused once a stage that depends on the key has begun.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from plad_dist import __version__
from plad_dist.config import Config, Model, flatten, is_operational
from plad_dist.config_file import yaml_reason
from plad_dist.data.models import resolve_model
from plad_dist.data.schemas import PAIRS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset
from plad_dist.errors import RunFailed, UserError
from plad_dist.fingerprint import FORMAT

RUN_FILE = "run.yaml"
TIMINGS = "logs/timings.json"
PLAD = "plad"  # the student of the round, among the systems that are compared
_SHOWN_KEYS = 10
_FIGURES = {"systems", "main_decoding", "judges", "verdict", "settings"}

# What each stage leaves first, in the order of the stages.
_STAGES = (
    ("prompts/manifest.json", "eval/prompts/manifest.json"),
    ("models", "checkpoints/teacher", "checkpoints/warmup", "events/teacher", "events/warmup"),
    ("samples",),
    ("pairs",),
    ("checkpoints/round-0", "events/round-0"),
    ("checkpoints/seqkd", "events/seqkd"),
    ("eval/round-0/metrics.json",),
)
# The first stage that reads a config section; all stages after it depend on the section too.
_FIRST_READER = {
    "run": 0,
    "prompts": 0,
    "teacher": 0,  # its tokenizer measures the prompts
    "teachers": 0,
    "student": 0,
    "training.teacher": 1,
    "training.warmup": 1,
    "training.dtype": 1,
    "sampling": 2,
    "evaluation.decodings": 2,
    "evaluation.limit": 2,
    "evaluation.candidates": 2,
    "evaluation.warmup_temperatures": 2,
    "pairing": 3,
    "training.round": 4,
    "training.heldout_pairs": 4,
    "training.max_group_tokens": 1,
    "training.over_long": 1,
    "training.lora": 1,
    "training.seqkd": 5,
    "evaluation": 6,
}


@dataclass(frozen=True)
class RunDir:
    """Paths and models of a run, as one of its rounds sees them.

    Attributes:
        round: whose samples, pairs, student and figures are meant, from 0.
    """

    storage: Storage
    round: int = 0

    @classmethod
    def of(cls, config: Config) -> RunDir:
        return cls.at(config.run.dir)

    @classmethod
    def at(cls, url: str) -> RunDir:
        """The run directory at a path or URI. Paths are made absolute: workers have other working directories."""
        root = Storage(url).local_root
        return cls(Storage(str(root) if root is not None else url))

    def at_round(self, number: int) -> RunDir:
        """The same run as another of its rounds sees it."""
        return replace(self, round=number)

    @property
    def root(self) -> Path:
        """The run directory on this machine. Raises :class:`UserError` for an object store."""
        root = self.storage.local_root
        if root is None:
            raise UserError(
                f"run.dir: {self.storage.url}: training needs a run directory on a file system that all nodes share; object "
                "stores hold prompts, samples and pairs, not yet checkpoints"
            )
        return root

    def samples(self, role: str) -> Dataset:
        """Samples for pairs. The teacher does not change: it is sampled once, for all rounds."""
        return Dataset(self.storage, f"samples/{role}/round-{self._round_of(role)}", SAMPLES)

    def pairs(self) -> Dataset:
        return Dataset(self.storage, f"pairs/round-{self.round}", PAIRS)

    def heldout_samples(self, role: str) -> Dataset:
        """Samples of the held-out prompts, drawn as those for pairs are."""
        return Dataset(self.storage, f"eval/round-{self._round_of(role)}/pair-samples/{role}", SAMPLES)

    def heldout_pairs(self) -> Dataset:
        return Dataset(self.storage, f"eval/round-{self.round}/pairs", PAIRS)

    def system_samples(self, system: str, decoding: str) -> Dataset:
        """A system's answers to the held-out prompts."""
        number = self.round if system == PLAD else round_of(system) or 0
        name = PLAD if round_of(system) is not None else system
        return Dataset(self.storage, f"eval/round-{number}/samples/{name}/{decoding}", SAMPLES)

    def candidates(self) -> Dataset:
        """Several responses of the warm-up student to each held-out prompt, which all students are asked about."""
        return Dataset(self.storage, "eval/round-0/candidates", SAMPLES)

    def scored(self, what: str, system: str) -> Dataset:
        """Given responses with their likelihoods under a system."""
        return Dataset(self.storage, f"eval/round-{self.round}/scored/{what}/{system}", SAMPLES)

    def _round_of(self, role: str) -> int:
        return self.round if role == "student" else 0

    def figures(self) -> dict[str, Any] | None:
        """The figures of the round, None where it is not evaluated. Raises :class:`RunFailed` where they are damaged."""
        found = self.storage.read_json(self.metrics)
        if found is not None and not (isinstance(found, dict) and found.keys() >= _FIGURES):
            raise RunFailed(
                f"{self.storage.url}/{self.metrics}: damaged: these are no figures of an evaluation. Delete it and run `plad evaluate` "
                "again: it is made anew from what was sampled"
            )
        return found

    @property
    def metrics(self) -> str:
        """Where the figures of the round lie."""
        return f"eval/round-{self.round}/metrics.json"

    @property
    def report(self) -> str:
        return f"eval/round-{self.round}/report.html"

    def model(self, name: str) -> Path:
        """Folder of a model that the run makes."""
        return self.root / "models" / name

    def checkpoints(self, config: Config) -> Storage:
        """Where the checkpoints of the phases are kept."""
        url = config.training.checkpoint_url
        return RunDir.at(url).storage if url else self.storage

    # -- models by what they are

    def teacher(self, config: Config, name: str = "teacher") -> str:
        """Folder or hub name of a teacher that is sampled."""
        return str(self.model("teacher")) if config.training.teacher else resolve_model(config.all_teachers()[name])

    def student(self, config: Config) -> str:
        """Folder or hub name of the student before the round's calibration."""
        if self.round:
            return str(self.model(f"round-{self.round - 1}"))
        return str(self.model("warmup")) if config.training.warmup else resolve_model(config.student)

    @property
    def student_made_by(self) -> str:
        """The command that makes it, where the run does."""
        return f"train --phase {f'round-{self.round - 1}' if self.round else 'warmup'}"

    def start_of(self, name: str, settings: Model) -> str:
        """Folder or hub name of a model as the config gives it: `teacher` or `student`."""
        return str(self.model(f"{name}-init")) if settings.scratch else resolve_model(settings)


def round_of(system: str) -> int | None:
    """The round of a phase or system that is named like `round-0`, None for others."""
    found = re.fullmatch(r"round-(\d+)", system)
    return int(found[1]) if found else None


def require_model(path: str, made_by: str) -> None:
    """Raise :class:`UserError` where a model that the run makes is not there yet."""
    if path.startswith("/") and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: not there yet; run `plad {made_by}` first")


# ---------------------------------------------------------------------------------------------------------- run.yaml


def open_run(config: Config) -> RunDir:
    """The run directory with ``run.yaml`` in it, made if it is new.

    Raises:
        UserError: the directory is not writable, or was begun with another config; the keys that differ are named.
    """
    run = RunDir.of(config)
    check_same_run(config, run)
    run.storage.check_writable()
    run.storage.replace(RUN_FILE, run_document(config))
    return run


def run_document(config: Config) -> bytes:
    """The content of ``run.yaml``."""
    document = {
        "config": config.model_dump(mode="json"),
        "fingerprint": config.fingerprint(),
        "version": __version__,
        "format": FORMAT,
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()


def check_same_run(config: Config, run: RunDir) -> None:
    """Raise :class:`UserError` if the run directory was begun with a config that would have made other data."""
    data = _existing(run)
    if data is None:
        return
    old, new = dict(flatten(_with_defaults(data["config"]))), dict(flatten(config.model_dump(mode="json")))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    conflicts = [key for key in differing if not is_operational(key) and _has_begun(key, run)]
    if conflicts:
        lines = [f"{key}: {_shown(old, key)} there, {_shown(new, key)} now" for key in conflicts[:_SHOWN_KEYS]]
        if len(conflicts) > _SHOWN_KEYS:
            lines.append(f"and {len(conflicts) - _SHOWN_KEYS} more")
        advice = "Use another run.dir (run.reuse takes over what both would make alike), or give these keys their old values."
        if data["version"] not in (None, __version__):
            advice = f"plad-dist {data['version']} has worked on it, this is {__version__}: finish it with that one, or use another run.dir."
        raise UserError(
            f"run.dir: {run.storage.url}: was begun with another config. Keys that differ:\n  "
            + "\n  ".join(lines)
            + f"\n{advice}"
        )


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys that are new since it was written; as it is where it cannot be read as one."""
    try:
        return Config.model_validate(raw).model_dump(mode="json")
    except ValidationError:
        return raw


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if values.get(key) is not None else "not set"


def load_run(path: str) -> dict[str, Any]:
    """The document in a run directory's ``run.yaml``. Raises :class:`UserError` where there is none."""
    run = RunDir.at(path)
    root = run.storage.local_root
    if root is not None and not root.is_dir():
        raise UserError(f"{path}: no such run directory")
    document = _run_file(run)
    if document is None:
        raise UserError(f"{path}: not a run directory: it has no {RUN_FILE}")
    return document


def _existing(run: RunDir) -> dict[str, Any] | None:
    root = run.storage.local_root
    if root is not None and not _is_folder(root):
        return None
    document = _run_file(run)
    if document is None and root is not None and any(not item.name.startswith(".") for item in root.iterdir()):
        raise UserError(f"run.dir: {root}: not empty and not a run directory (no {RUN_FILE}); use another one")
    return document


def _run_file(run: RunDir) -> dict[str, Any] | None:
    data = run.storage.read(RUN_FILE)
    if data is None:
        return None
    try:
        document = yaml.safe_load(data)
        run_format = int(document.get("format", 1))
        if run_format != FORMAT:
            raise UserError(
                f"{run.storage.url}/{RUN_FILE}: the run has format {run_format}, plad-dist {__version__} reads format {FORMAT}. Finish "
                f"it with plad-dist {document.get('version')}, which started it, or use another run.dir"
            )
        return {
            "config": dict(document["config"]),
            "fingerprint": str(document["fingerprint"]),
            "version": document.get("version"),
        }
    except yaml.YAMLError as error:
        why = yaml_reason(error)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        why = "expected `config` and `fingerprint`; a config of yours is no run directory, its run.dir names that"
    raise RunFailed(
        f"{run.storage.url}/{RUN_FILE}: damaged ({why}). Nothing was changed. Put the file back from a copy, or use another "
        "run directory."
    )


def _is_folder(root: Path) -> bool:
    """Whether the run directory exists. Raises :class:`UserError` where it could not be made."""
    try:
        if root.exists():
            if not root.is_dir():
                raise UserError(f"run.dir: {root}: is a file, expected a directory")
            return True
        parent = next(path for path in root.parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"run.dir: {root}: cannot be made: {parent} is not a folder that may be written")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"run.dir: {str(root)!r:.100}: not a usable path: {error}") from None
    return False


def _has_begun(key: str, run: RunDir) -> bool:
    """Whether a stage that depends on a key has left something."""
    return any(run.storage.holds(path) for stage in _STAGES[first_reader(key) :] for path in stage)


def first_reader(key: str) -> int:
    """Number of the first stage whose outcome depends on a config key."""
    parts = key.split(".")
    sections = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((_FIRST_READER[section] for section in sections if section in _FIRST_READER), 0)


def read_timings(run: RunDir) -> dict[str, float]:
    """Seconds by stage. They decide nothing: a damaged file counts as none."""
    try:
        found = run.storage.read_json(TIMINGS)
    except RunFailed:
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: seconds for name, seconds in found.items() if isinstance(seconds, int | float)}


def log_to_run(run: RunDir) -> None:
    """Keep the plain log beside the data too, in ``logs/plad.log``."""
    if run.storage.local_root is not None:
        folder = run.storage.local_root / "logs"
        folder.mkdir(exist_ok=True)
        handler = logging.FileHandler(folder / "plad.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("plad")
        for other in [
            each for each in logger.handlers if isinstance(each, logging.FileHandler)
        ]:  # of a study's last run
            logger.removeHandler(other)
            other.close()
        logger.addHandler(handler)
