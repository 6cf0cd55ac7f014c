"""Reuse: a new run takes over the products of another run that both would produce identically."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plad_dist.catalog import DatasetEntry, ModelEntry, products_of
from plad_dist.config import Config, flatten
from plad_dist.data.claims import OwnerCheck
from plad_dist.data.local_files import failure_explained
from plad_dist.data.storage import Storage
from plad_dist.drafts import (
    complete,
    complete_draft,
    failures_explained,
    has_content,
    new_draft,
    remove_draft,
    settle_drafts,
)
from plad_dist.errors import RunFailed, UserError
from plad_dist.recipes import ROUND, is_decisive, recipes_decided_by
from plad_dist.rundir import RunDir, is_bound, load_run, run_document, with_date

logger = logging.getLogger("plad")

Reusable = DatasetEntry | ModelEntry

_GROWING_FOLDERS = {"events", "journal", "spool"}
# The file system of the source is another one, or has no hard links.
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK}


def take_over(config: Config, earlier: list[Config], command: str = "plad run") -> None:
    """Take over products of an earlier run, unless the run of this config has already started.

    The source is the earlier run that shares the most products with this one. A product is shared
    if no key that differs between the configs decides it or any of its inputs. Prompts and models
    are those that the earlier run read, even if their sources have changed since.

    The command claims the run, and assembles it in a draft (:mod:`plad_dist.drafts`). Files are
    hard links to the source, because no file is rewritten in place. Files that grow (logs,
    journals, paid responses) are copied. Model cards are left out: they show the figures of another
    run.

    Raises:
        RunFailed: the file system failed, or a later command has claimed the run.
    """
    run = RunDir.of(config)
    if not earlier or run.storage.local_root is None or _is_begun(run):
        return
    # A date that the config does not set is no difference: the new run takes that of the source.
    earlier = [with_date(other, RunDir.of(other)) for other in earlier]
    candidates = [
        (_shared_products(config.with_date(config.run.date or other.run.date), other), other) for other in earlier
    ]
    shared, source = max(candidates, key=lambda candidate: len({product.recipe for product in candidate[0]}))
    origin, document = RunDir.of(source).root, run_document(config.with_date(config.run.date or source.run.date))
    run = run.claimed(command)
    settle_drafts(run.storage)
    if _is_begun(run):  # by another command, since the first look
        return
    count = _draft(run.storage, origin, shared, document)
    settle_drafts(run.storage)
    names = dict.fromkeys(product.recipe.name for product in shared)
    outcome = f"{count} files taken over: {', '.join(names)}"
    if not count:
        outcome = "nothing taken over: it has no product that this run would produce identically"
    logger.info("%s: from %s: %s", run.root, origin, outcome)


def _draft(storage: Storage, origin: Path, shared: list[Reusable], document: bytes) -> int:
    """Assemble a complete draft, and return the number of its files. None are no draft."""
    draft = new_draft(storage)
    try:
        with failures_explained(draft.parent, storage):
            count = _fill(draft, origin, shared, OwnerCheck(storage))
            if count:
                complete(draft, document, storage)
    except RunFailed:
        with contextlib.suppress(OSError):
            remove_draft(draft)
        raise
    return count


def _fill(draft: Path, origin: Path, shared: list[Reusable], check_owner: OwnerCheck) -> int:
    """Link or copy the files of products into a folder and return their number."""

    def place(files: Iterable[Path], put: Callable[[Path, Path], bool]) -> int:
        count = 0
        for file in files:
            check_owner()
            count += put(origin / file, draft / file)
        return count

    files = sorted(_files(origin, shared))
    growing = [file for file in files if not _GROWING_FOLDERS.isdisjoint(file.parts)]
    # Growing files first: a response that leaves the spool meanwhile is then found among the parts.
    count = place(growing, _copy)
    fixed = [file for file in sorted(_files(origin, shared)) if _GROWING_FOLDERS.isdisjoint(file.parts)]
    return count + place(fixed, _link)


def _is_begun(run: RunDir) -> bool:
    """Return True if a run directory has any content, or a complete draft of it."""
    with failure_explained(str(run.root), "read"):
        return run.root.is_file() or has_content(run.root) or complete_draft(run.storage) is not None


def _files(root: Path, products: Iterable[Reusable]) -> set[Path]:
    """Return the files of products, relative to the run directory.

    Cards and files that are being written are left out, and so is everything that an unfinished
    phase has written.
    """
    finished = (product for product in products if isinstance(product, DatasetEntry) or (root / product.path).is_dir())
    files = (file for product in finished for folder in product.folders for file in (root / folder).rglob("*"))
    return {
        file.relative_to(root)
        for file in files
        if file.is_file() and file.name != "README.md" and not file.name.startswith(".")
    }


def reused_run(config: Config) -> Config | None:
    """Return the config of the run that `run.reuse` names, or None if nothing is to be reused.

    A run that has started reuses nothing any more. The `run.dir` of the returned config is the path
    that `run.reuse` gives, because the run may have moved.

    Raises:
        UserError: `run.reuse` is not a run directory, or one of the two is on an object store.
    """
    if config.run.reuse is None or is_bound(RunDir.of(config)):
        return None
    for url in (config.run.dir, config.run.reuse):
        if RunDir.at(url).storage.local_root is None:
            raise UserError(f"run.reuse: {url}: is an object store; reuse links files, which needs a file system")
    try:
        reused = load_run(config.run.reuse).config
    except UserError as error:
        raise UserError(f"run.reuse: {error}") from None
    return reused.model_copy(update={"run": reused.run.model_copy(update={"dir": config.run.reuse})})


def _shared_products(config: Config, other: Config) -> list[Reusable]:
    """Return the products up to the first round's student that two configs produce identically."""
    ours, theirs = _products(config), _products(other)
    keys, other_keys = _decisive_keys(config), _decisive_keys(other)
    differing = [key for key in keys.keys() | other_keys.keys() if keys.get(key) != other_keys.get(key)]
    changed = {recipe for key in differing for recipe in recipes_decided_by(key)}

    def is_shared(path: str) -> bool:
        product, counterpart = ours[path], theirs.get(path)
        return (
            counterpart is not None
            and product.recipe not in changed
            and product.inputs == counterpart.inputs
            and all(is_shared(source) for source in product.inputs)
        )

    return [product for path, product in ours.items() if is_shared(path)]


def _products(config: Config) -> dict[str, Reusable]:
    products = products_of(config, RunDir.of(config), rounds=1)
    return {
        product.path: product
        for product in products
        if isinstance(product, Reusable) and product.recipe.order <= ROUND.order
    }


def _decisive_keys(config: Config) -> dict[str, Any]:
    """Return the values of the keys that decide products, with the decodings that are in effect."""
    raw = config.model_dump(mode="json")
    raw["evaluation"]["decodings"] = {
        name: decoding.model_dump(mode="json") for name, decoding in config.decodings().items()
    }
    return {key: value for key, value in flatten(raw) if is_decisive(key)}


def _copy(file: Path, target: Path) -> bool:
    """Copy a file. Return False if it is gone, as the source may be at work."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copy2(file, target)
    except FileNotFoundError:
        return False
    return True


def _link(file: Path, target: Path) -> bool:
    """Link a file, or copy it if the file system has no links. Return False if it is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _copy(file, target)
    return True
