"""Model folders: pretrained models, and models that a run creates and marks with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from plad_dist.config import Model, RewardModel
from plad_dist.data.local_files import fsync, fsync_tree
from plad_dist.errors import UserError, first_line
from plad_dist.fingerprint import fingerprint

MARKER = "plad.json"
_IDENTIFYING_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
_SAMPLES, _SAMPLE_BYTES = 32, 1 << 20
_SAMPLING_PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def commit_model(temporary: Path, final: Path, input_fingerprint: str, facts: dict[str, Any]) -> None:
    """Move a finished model folder to its final place, with a marker that states its fingerprint.

    A model with the same fingerprint that is already there stays; another one is replaced.
    """
    (temporary / MARKER).write_text(json.dumps({"fingerprint": input_fingerprint, "facts": facts}, indent=1))
    fsync_tree(temporary)
    if model_fingerprint(final) == input_fingerprint:
        shutil.rmtree(temporary)
        return
    if final.exists():
        stale = final.with_name(f".stale-{final.name}-{os.getpid()}")
        final.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
    temporary.rename(final)
    fsync(final.parent)


def model_marker(folder: Path) -> dict[str, Any] | None:
    """Return `fingerprint` and `facts` of a model that a run created.

    None if the model is missing or incomplete, or if no run created it.
    """
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        return {"fingerprint": str(marker["fingerprint"]), "facts": dict(marker["facts"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def model_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of a model that a run created; None as for :func:`model_marker`."""
    marker = model_marker(folder)
    return str(marker["fingerprint"]) if marker else None


def model_identity(path: str, settings: Model) -> str:
    """Return the fingerprint of any model.

    For a model that a run created, it is the marker's fingerprint, otherwise a hash of path,
    revision and files. Large files are hashed by their size and samples of their bytes, which
    suffices for weights: training changes nearly all of them.
    """
    folder = Path(path)
    input_fingerprint = model_fingerprint(folder)
    if input_fingerprint is not None:
        return input_fingerprint
    files = sorted(file for file in folder.iterdir() if file.suffix in _IDENTIFYING_SUFFIXES) if folder.is_dir() else []
    contents = {file.name: _file_hash(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    return fingerprint("pretrained model", path=path, revision=settings.revision, files=contents)


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
    return str(path.absolute()) if path.exists() else str(settings.path)


def check_local_model(model: str) -> None:
    """Raise :class:`UserError` if a path is not a model folder. Names on a hub are not checked."""
    path = Path(model)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not path.exists():
        if looks_like_path:
            raise UserError(f"{model}: no such model folder on this machine; a model on a hub is named OWNER/NAME")
        return
    if path.is_file():
        raise UserError(f"{model}: is a file; name the folder that holds it, {path.parent}")
    if not (path / "config.json").is_file():
        raise UserError(f"{model}: not a model folder: it has no config.json")


def check_weights(model: str) -> None:
    """Raise :class:`UserError` if a local model folder lacks complete safetensors weights."""
    path = Path(model)
    if path.is_dir() and (problems := weights_problems(path)):
        raise UserError(
            f"{model}: {'; '.join(problems)}. Copy the model again; convert weights in other formats to safetensors, "
            "because nothing else is loaded"
        )


def weights_problems(folder: Path) -> list[str]:
    """Return the problems of the weights in a model folder, found from the headers of the files."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.is_file():
        try:
            names = sorted(set(map(str, json.loads(index.read_bytes())["weight_map"].values())))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return [f"{index.name}: damaged"]
    problems = [f"{name}: {problem}" for name in names if (problem := _safetensors_problem(folder / name)) is not None]
    if problems == [f"{names[0]}: missing"]:
        unlisted = [file.name for file in folder.glob("*.safetensors")]
        if not unlisted:
            return ["has no *.safetensors weights"]
        return [f"has neither {names[0]} nor {index.name}, only {', '.join(sorted(unlisted)[:3])}"]
    return problems


def model_problems(folder: Path) -> list[str]:
    """Return the problems of a finished model: its weight headers, config and tokenizer."""
    problems = weights_problems(folder)
    for name in ("config.json", "tokenizer_config.json"):
        try:
            is_sound = isinstance(json.loads((folder / name).read_bytes()), dict)
        except FileNotFoundError:
            problems.append(f"{name}: missing")
            continue
        except (OSError, ValueError):
            is_sound = False
        problems += [] if is_sound else [f"{name}: damaged"]
    return problems


def _safetensors_problem(file: Path) -> str | None:
    """Return the problem of a safetensors file by its size and header, or None."""
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(min(length, _MAX_HEADER_BYTES)))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "not a safetensors file"
    if not ends:
        return "has no tensors"
    expected = 8 + length + max(ends)
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
        problem = (
            "transformers cannot load this model"
            if Path(model).is_dir()
            else "neither a local folder nor a model on the hub that transformers can load"
        )
        raise UserError(f"{model}: {problem}: {first_line(error)}") from None


def _positions(config: Any) -> int | None:
    """Return the context length by a transformers config, None if it states none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def context_length(model: str, settings: Model) -> int:
    """Return the largest sequence length in tokens, limited by the config and by the model."""
    positions = _positions(load_model_config(model, settings))
    return int(min(length for length in (settings.max_length, positions, 1 << 20) if length))


def check_max_length(model: str, settings: Model | RewardModel, key: str) -> None:
    """Raise :class:`UserError` if a config sets a longer context than the model has.

    Models whose config names no context length are not checked.

    Args:
        key: config section of the model, for messages.
    """
    limit = _positions(load_model_config(model, settings))
    if settings.max_length is not None and limit and settings.max_length > limit:
        raise UserError(
            f"{key}.max_length: {settings.max_length}: {model} has a context of {limit} tokens "
            "(max_position_embeddings of its config.json); set at most that, or leave it unset"
        )


def generation_defaults(model: str, settings: Model) -> dict[str, Any]:
    """Return the sampling parameters that a model's generation config sets; none without one."""
    from transformers import GenerationConfig

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
