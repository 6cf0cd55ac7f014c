"""Model folders: pretrained models, and models that a run creates and marks with a fingerprint.

The marker `plad.json` lists the files of a model with sizes and checksums, and ends with a checksum
of itself. A marker that cannot be read is not a missing one: only "not found" means that there is
no model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from plad_dist.config import Model, RewardModel
from plad_dist.data.local_files import (
    failure_explained,
    file_checksum,
    fsync,
    fsync_tree,
    is_file,
    is_folder,
    make_folders,
    path_mode,
)
from plad_dist.data.sealed import parse_object, sealed_json, unsealed_json
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.fingerprint import fingerprint

logger = logging.getLogger("plad")

MARKER = "plad.json"
REPLACED = "replaced"  # folder beside the models, for those of another fingerprint
CARD = "README.md"  # that of a trained model is written when the figures are known
_ABANDONED = re.compile(r"[0-9a-f]{32}")
_ABANDONED_S = 3600.0
_COMMIT_TRIES = 5
_THREADS = 4
_IDENTIFYING_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
_SAMPLES, _SAMPLE_BYTES = 32, 1 << 20
_SAMPLING_PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


class DamagedModel(RunFailed):
    """The marker of a model cannot be parsed. A storage error is not damage."""


@contextmanager
def unfinished_model(final: Path, suffix: str | None = None) -> Iterator[Path]:
    """Yield the path of a new folder in which to write a model before it is committed.

    It is removed if the model cannot be written. So are the folders of processes that died while
    they made the model, an hour later.

    Args:
        final: final place of the model.
        suffix: end of the folder's name, unique to the process; None for a random one.

    Raises:
        RunFailed: the model cannot be written.
    """
    from safetensors import SafetensorError

    temporary = final.with_name(f".writing-{final.name}-{suffix or uuid.uuid4().hex}")
    try:
        with failure_explained(str(final), "written"):
            make_folders(final.parent)
            _remove_abandoned(final)
            try:
                yield temporary
            except Exception as error:
                # The tokenizers package raises the plain class if it cannot write.
                if isinstance(error, SafetensorError) or type(error) is Exception:
                    raise OSError(first_line(error)) from None
                raise
    finally:
        _remove(temporary)


def _remove_abandoned(final: Path) -> None:
    for folder in final.parent.glob(f".writing-{final.name}-*"):
        with contextlib.suppress(FileNotFoundError):
            is_old = time.time() - folder.stat().st_mtime > _ABANDONED_S
            if is_old and _ABANDONED.fullmatch(folder.name.rpartition("-")[2]):
                _remove(folder)


def commit_model(temporary: Path, final: Path, input_fingerprint: str, facts: dict[str, Any]) -> None:
    """Move a finished model folder to its final place, with a marker that states its fingerprint.

    A model with the same fingerprint that is already there stays. Another one is moved to
    `replaced/` beside it.

    Raises:
        RunFailed: the file system failed, or the marker of the model that is there is damaged.
            Nothing was moved.
    """
    with failure_explained(str(final), "written"):
        document = {"fingerprint": input_fingerprint, "facts": facts, "files": _listed_files(temporary)}
        (temporary / MARKER).write_bytes(sealed_json(json.dumps(document, indent=1)))
        fsync_tree(temporary)
        for _ in range(_COMMIT_TRIES):
            existing = model_marker(final)
            if existing is not None and existing["fingerprint"] == input_fingerprint:
                _remove(temporary)
                return
            if path_mode(final) is not None:
                _set_aside(final)
            try:
                temporary.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                continue  # another command has just committed a model
            fsync(final.parent)
            return
    raise RunFailed(f"{final}: other commands write this model too. What is committed is kept; let only one run")


def _listed_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return sizes and checksums of the files of a model, by their path in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (MARKER, CARD))
    with ThreadPoolExecutor(_THREADS) as threads:
        checksums = threads.map(file_checksum, files)
        return {
            file.relative_to(folder).as_posix(): (file.stat().st_size, checksum)
            for file, checksum in zip(files, checksums, strict=True)
        }


def _set_aside(final: Path) -> None:
    target = final.parent / REPLACED / f"{final.name}-{uuid.uuid4().hex[:8]}"
    make_folders(target.parent)
    try:
        final.rename(target)
    except FileNotFoundError:  # another command has set it aside
        return
    fsync(target.parent, final.parent)
    logger.warning("%s: held something else than the model of this config; moved to %s", final, target)


def _remove(folder: Path) -> None:
    """Remove a folder of this process or of a dead one. What remains of it harms nothing."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)


def model_marker(folder: Path) -> dict[str, Any] | None:
    """Return `fingerprint`, `facts` and `files` of a model that a run created.

    None if the model is missing or incomplete, or if no run created it.

    Raises:
        DamagedModel: the marker cannot be parsed, or does not have its checksum.
        RunFailed: the file system failed.
    """
    path = folder / MARKER
    data = _read_if_exists(path)
    if data is None:
        return None
    try:
        marker = parse_object(data)
        if marker.keys() != {"fingerprint", "facts"}:  # all that earlier versions wrote
            marker = unsealed_json(data)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in marker.get("files", {}).items()}
        return {"fingerprint": str(marker["fingerprint"]), "facts": dict(marker["facts"]), "files": files}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedModel(
            f"{path}: damaged: {first_line(error)}. Nothing was changed. Restore it from a copy, or delete {folder} "
            "and run again: the model is rebuilt, a trained one from its last checkpoint"
        ) from None


def _read_if_exists(path: Path) -> bytes | None:
    with failure_explained(str(path), "read"):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def model_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of a model that a run created; None as for :func:`model_marker`."""
    marker = model_marker(folder)
    return str(marker["fingerprint"]) if marker else None


def model_identity(path: str, settings: Model) -> str:
    """Return the fingerprint of any model.

    For a model that a run created, it is the marker's fingerprint. Another local model is known by
    the hash of its files, wherever it lies, and a model on a hub by name and revision. Large files
    are hashed by their size and samples of their bytes, which suffices for weights: training
    changes nearly all of them.
    """
    folder = Path(path)
    input_fingerprint = model_fingerprint(folder)
    if input_fingerprint is not None:
        return input_fingerprint
    with failure_explained(path, "read"):
        items = folder.iterdir() if is_folder(folder) else ()
        files = sorted(file for file in items if file.suffix in _IDENTIFYING_SUFFIXES)
        contents = {file.name: _file_hash(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    if contents:
        return fingerprint("pretrained model", files=contents)
    return fingerprint("pretrained model", path=path, revision=settings.revision)


@lru_cache(maxsize=4096)
def _file_hash(file: str, size: int, mtime_ns: int) -> str:
    """Return the hash of a small file, or of evenly spaced samples of a large one.

    The modification time only distinguishes versions of a file in the cache.
    """
    is_sampled = size > _SAMPLES * _SAMPLE_BYTES
    digest = hashlib.sha256(str(size).encode())
    with Path(file).open("rb") as data:
        for sample in range(_SAMPLES if is_sampled else 1):
            data.seek(sample * (size // _SAMPLES))
            digest.update(data.read(_SAMPLE_BYTES if is_sampled else -1))
    return digest.hexdigest()


def resolve_model(settings: Model) -> str:
    """Return the absolute path of a pretrained model, or its hub name if it is not local."""
    path = Path(str(settings.path))
    return str(path.absolute()) if is_folder(path) or is_file(path) else str(settings.path)


def hub_name(path: str) -> str | None:
    """Return the path if it is the name of a hub repository, which a card can link to."""
    return path if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists() else None


def check_local_model(model: str) -> None:
    """Raise :class:`UserError` if a path is not a model folder. Names on a hub are not checked."""
    path = Path(model)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not is_folder(path) and not is_file(path):
        if looks_like_path:
            raise UserError(f"{model}: no such model folder on this machine; a model on a hub is named OWNER/NAME")
        return
    if is_file(path):
        raise UserError(f"{model}: is a file; name the folder that holds it, {path.parent}")
    if not is_file(path / "config.json"):
        raise UserError(f"{model}: not a model folder: it has no config.json")


def check_weights(model: str) -> None:
    """Raise :class:`UserError` if a local model folder lacks complete safetensors weights."""
    path = Path(model)
    if is_folder(path) and (problems := weights_problems(path)):
        raise UserError(
            f"{model}: {'; '.join(problems)}. Copy the model again; convert weights in other formats to safetensors, "
            "because nothing else is loaded"
        )


def weights_problems(folder: Path) -> list[str]:
    """Return the problems of the weights in a model folder, by the headers and sizes of the files.

    Raises:
        DamagedModel: the marker of the model is damaged.
        RunFailed: the file system failed.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not is_file(folder / names[0]) and (data := _read_if_exists(index)) is not None:
        try:
            names = sorted(set(map(str, json.loads(data)["weight_map"].values())))
        except (ValueError, LookupError, TypeError, AttributeError):
            return [f"{index.name}: damaged"]
    problems = {name: problem for name in names if (problem := _safetensors_problem(folder / name)) is not None}
    if problems == {names[0]: "missing"}:
        with failure_explained(str(folder), "listed"):
            unlisted = [file.name for file in folder.iterdir() if file.suffix == ".safetensors"]
        if not unlisted:
            return ["has no *.safetensors weights"]
        return [f"has neither {names[0]} nor {index.name}, only {', '.join(sorted(unlisted)[:3])}"]
    return [f"{name}: {problem}" for name, problem in (_listing_problems(folder) | problems).items()]


def model_problems(folder: Path) -> list[str]:
    """Return the problems of a finished model: its weights, config and tokenizer, byte by byte.

    Raises:
        DamagedModel: the marker of the model is damaged.
        RunFailed: the file system failed.
    """
    problems = weights_problems(folder)
    for name in ("config.json", "tokenizer_config.json"):
        data = _read_if_exists(folder / name)
        try:
            problem = None if isinstance(json.loads(data or b""), dict) else "damaged"
        except ValueError:
            problem = "missing" if data is None else "damaged"
        problems += [] if problem is None else [f"{name}: {problem}"]
    with_problem = {problem.partition(":")[0] for problem in problems}
    files = (model_marker(folder) or {"files": {}})["files"]
    for name, (_, checksum) in files.items():
        if name not in with_problem:
            with failure_explained(str(folder / name), "read"):
                if file_checksum(folder / name) != checksum:
                    problems.append(f"{name}: damaged: its checksum differs from the one in {MARKER}")
    return problems


def _listing_problems(folder: Path) -> dict[str, str]:
    """Return the files that differ in size from the marker's list, if there is one."""
    problems = {}
    for name, (size, _) in (model_marker(folder) or {"files": {}})["files"].items():
        with failure_explained(str(folder / name), "read"):
            try:
                actual = (folder / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                problems[name] = "missing"
                continue
        if actual != size:
            problems[name] = f"damaged: has {actual:,} bytes, {size:,} according to {MARKER}"
    return problems


def _safetensors_problem(file: Path) -> str | None:
    """Return the problem of a safetensors file by its size and header, or None."""
    with failure_explained(str(file), "read"):
        try:
            size = file.stat().st_size
            with file.open("rb") as data:
                start = data.read(8)
                header_bytes = data.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
    try:
        header = json.loads(header_bytes)
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "not a safetensors file"
    if not ends:
        return "has no tensors"
    expected = 8 + int.from_bytes(start, "little") + max(ends)
    return None if size == expected else f"has {size:,} bytes, but {expected:,} according to its header"


def load_model_config(model: str, settings: Model | RewardModel) -> Any:
    """Return the transformers config of a model.

    Raises:
        UserError: the config cannot be loaded.
    """
    from transformers import AutoConfig

    check_local_model(model)
    try:
        return AutoConfig.from_pretrained(
            model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - config classes raise their own errors for bad values
        # transformers names the argument that allows it.
        if not settings.trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(
                f"{model}: has Python code of its own, which runs only with `trust_remote_code: true` (for "
                "sampling.rejected: declare the model with it under `teachers`, and set sampling.rejected.teacher)"
            ) from None
        problem = (
            "transformers cannot load this model"
            if Path(model).is_dir()
            else "neither a local folder nor a model on the hub that transformers can load"
        )
        raise UserError(f"{model}: {problem}: {first_line(error)}") from None


def model_class(config: Any) -> Any:
    """Return transformers' class for models of a config that generate text."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def positions(config: Any) -> int | None:
    """Return the context length by a transformers config, None if it states none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def context_length(model: str, settings: Model) -> int:
    """Return the largest sequence length in tokens, limited by the config and by the model."""
    limits = (settings.max_length, positions(load_model_config(model, settings)), 1 << 20)
    return int(min(length for length in limits if length))


def check_max_length(model: str, settings: Model | RewardModel, key: str) -> None:
    """Raise :class:`UserError` if a config sets a longer context than the model has.

    Models whose config names no context length are not checked.

    Args:
        key: config section of the model, for messages.
    """
    limit = positions(load_model_config(model, settings))
    if settings.max_length is not None and limit and settings.max_length > limit:
        raise UserError(
            f"{key}.max_length: {settings.max_length}: {model} has a context of {limit} tokens "
            "(max_position_embeddings of its config.json); set at most that, or leave it unset"
        )


def generation_defaults(model: str, settings: Model) -> dict[str, Any]:
    """Return the sampling parameters that a model's generation config sets; none without one."""
    from transformers import GenerationConfig

    if is_folder(Path(model)) and not is_file(Path(model) / "generation_config.json"):
        return {}
    try:
        config = GenerationConfig.from_pretrained(model, revision=settings.revision).to_diff_dict()
    except (OSError, ValueError):  # no generation config, or one that the check of the end tokens reports
        return {}
    return {name: config[name] for name in _SAMPLING_PARAMETERS if config.get(name) is not None}


def vocabulary_size(config: Any) -> int:
    """Return the number of tokens for which a model has embeddings, by its transformers config."""
    return int(config.get_text_config().vocab_size)


def head_size(config: Any) -> int | None:
    """Return the width of an attention head by a transformers config.

    None if the model has no attention heads, or heads of several widths.
    """
    text = config.get_text_config()
    try:
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    except (AttributeError, RuntimeError, TypeError, ZeroDivisionError):
        return None
