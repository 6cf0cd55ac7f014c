"""What another run has made and this one would make alike: taken over rather than made again."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plad_dist.config import Config, flatten, is_operational
from plad_dist.config_file import parse_config
from plad_dist.data.storage import sync_tree
from plad_dist.errors import UserError
from plad_dist.rundir import RUN_FILE, RunDir, first_reader, load_run, run_document

logger = logging.getLogger("plad")


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
_OPERATIONAL_THAT_DECIDE = {"training.deepspeed", "training.watch"}
_GROWS = {"events", "journal", "spool"}
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK}  # another file system, or one without links


def take_over(config: Config, earlier: list[Config]) -> None:
    """Take over what an earlier run has made and this one would make alike, where this one is not begun.

    It comes from the run that has most in common: what no differing key decides, and nothing that it is made of. Prompts and models
    are those that the earlier run read, whatever has become of their sources since. It is put together in a hidden folder; the run
    directory appears as a whole, or, where it is there and empty, a run with its `run.yaml`, which comes last. Files are linked:
    nothing rewrites one in place but what grows (logs, journals, answers that were paid for), which is copied. Cards are left: they
    show another run's figures.
    """
    run = RunDir.of(config)
    if not earlier or run.storage.local_root is None or _is_taken(run.root):
        return
    shared, source = max(((_made_alike(config, other), other) for other in earlier), key=lambda item: len(item[0]))
    there, name = RunDir.of(source).root, f".begun-{uuid.uuid4().hex}"
    draft = run.root / name if run.root.exists() else run.root.with_name(name)
    # What grows first: a block that is committed in between is found among the parts then.
    files = [
        file
        for growing in (True, False)
        for file in sorted(_files(there, shared))
        if (not _GROWS.isdisjoint(file.parts)) == growing and _link(there / file, draft / file, copied=growing)
    ]
    taken = (
        f"{len(files)} files taken over: {', '.join(shared)}" if files else "nothing that is there would be made alike"
    )
    if files:
        (draft / RUN_FILE).write_bytes(run_document(config))
        sync_tree(draft)
        if draft.parent == run.root:
            for part in sorted(draft.iterdir(), key=lambda part: part.name == RUN_FILE):
                part.rename(run.root / part.name)
            draft.rmdir()
        else:
            try:
                draft.rename(run.root)
            except OSError:
                shutil.rmtree(draft)
                if not _is_taken(run.root):
                    raise
                taken = "another command has begun it meanwhile"
    logger.info("%s: from %s: %s", run.root, there, taken)


def _is_taken(root: Path) -> bool:
    """Whether a run directory is begun, or holds something else."""
    return root.exists() and (not root.is_dir() or any(not file.name.startswith(".") for file in root.iterdir()))


def _files(root: Path, parts: list[str]) -> set[Path]:
    """What parts have left in a run directory, relative to it."""
    found = (file for part in parts for pattern in _PARTS[part].files for file in root.glob(pattern))
    return {
        file.relative_to(root)
        for file in found
        if file.is_file()
        and file.name != "README.md"
        and not file.name.startswith(".")  # is being written
        and _is_of_a_finished_phase(file.relative_to(root), root)
    }


def _is_of_a_finished_phase(file: Path, root: Path) -> bool:
    """Not what a phase has said that is to be trained anew."""
    return file.parts[0] != "events" or (root / "models" / file.parts[1]).is_dir()


def reused_run(config: Config) -> Config | None:
    """The config of the run that `run.reuse` names, with its place as it is named there; None where it names none, or this one is
    begun and needs it no more.

    Raises:
        UserError: it is no run, or one of the two is on an object store.
    """
    if config.run.reuse is None or RunDir.of(config).storage.read(RUN_FILE) is not None:
        return None
    for url in (config.run.dir, config.run.reuse):
        if RunDir.at(url).storage.local_root is None:
            raise UserError(f"run.reuse: {url}: is an object store; files are linked, which takes a file system")
    try:
        found = parse_config(load_run(config.run.reuse)["config"], f"{config.run.reuse}/{RUN_FILE}")
    except UserError as error:
        raise UserError(f"run.reuse: {error}") from None
    # It was begun in another working directory, perhaps, or has been moved since.
    return found.model_copy(update={"run": found.run.model_copy(update={"dir": config.run.reuse})})


def _made_alike(config: Config, other: Config) -> list[str]:
    """The parts that two configs make alike."""
    here, there = map(_deciding_keys, (config, other))
    differing = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
    # How models are trained decides nothing of those that come as they are.
    trained = {name: getattr(config.training, name) or getattr(other.training, name) for name in ("teacher", "warmup")}
    decided = {
        part
        for key in differing
        for part in _decided_by(key)
        if not key.startswith("training.") or trained.get(part, True)
    }
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
    return {
        key: value
        for key, value in flatten(raw)
        if not is_operational(key) or _section(key) in _OPERATIONAL_THAT_DECIDE
    }


def _section(key: str) -> str | None:
    """The section of a key, or the key, of which it is told what it decides."""
    parts = key.split(".")
    sections = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((section for section in sections if section in _DECIDES), None)


def _decided_by(key: str) -> tuple[str, ...]:
    return _DECIDES.get(_section(key) or first_reader(key), ())


def _link(file: Path, to: Path, *, copied: bool) -> bool:
    """Whether it was still there: the run may be at work."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        if copied:
            shutil.copy2(file, to)
        else:
            _link_or_copy(file, to)
    except FileNotFoundError:
        return False
    return True


def _link_or_copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(file, to)
