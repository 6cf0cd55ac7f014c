"""Models as folders: those that a run makes, with a marker of what they were made of, and pretrained ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from plad_dist.config import Model
from plad_dist.data.storage import sync, sync_tree
from plad_dist.errors import UserError, first_line
from plad_dist.fingerprint import fingerprint

MARKER = "plad.json"
_IDENTIFYING = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
_PIECES, _PIECE_BYTES = 32, 1 << 20
_HEADER_BYTES = 100_000_000  # the format's own limit


def commit_model(temporary: Path, final: Path, input_fingerprint: str, facts: dict[str, Any]) -> None:
    """Put a finished model folder in its place; its marker says what it was made of. The same model, if there, stays."""
    (temporary / MARKER).write_text(json.dumps({"fingerprint": input_fingerprint, "facts": facts}, indent=1))
    sync_tree(temporary)
    if model_fingerprint(final) == input_fingerprint:
        shutil.rmtree(temporary)
        return
    if final.exists():
        stale = final.with_name(f".stale-{final.name}-{os.getpid()}")
        final.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
    temporary.rename(final)
    sync(final.parent)


def model_marker(folder: Path) -> dict[str, Any] | None:
    """`fingerprint` and `facts` of a model that a run made, None where there is no complete one."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        return {"fingerprint": str(marker["fingerprint"]), "facts": dict(marker["facts"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def model_fingerprint(folder: Path) -> str | None:
    """What a model that a run made was made of, None where there is no complete one."""
    marker = model_marker(folder)
    return str(marker["fingerprint"]) if marker else None


def model_identity(path: str, settings: Model) -> str:
    """Fingerprint of a model: what it was made of where a run made it, else its name, revision and files.

    Weights are told by their sizes and by samples of their bytes: a model that was trained on differs nearly everywhere.
    """
    folder = Path(path).expanduser()
    input_fingerprint = model_fingerprint(folder)
    if input_fingerprint is not None:
        return input_fingerprint
    files = sorted(file for file in folder.iterdir() if file.suffix in _IDENTIFYING) if folder.is_dir() else []
    contents = {file.name: _content(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    return fingerprint("pretrained model", path=path, revision=settings.revision, files=contents)


@lru_cache(maxsize=4096)
def _content(file: str, size: int, changed: int) -> str:
    """Hash of a file: of all of a small one, of pieces all over a large one."""
    digest = hashlib.sha256(str(size).encode())
    with Path(file).open("rb") as data:
        for piece in range(_PIECES if size > _PIECES * _PIECE_BYTES else 1):
            data.seek(piece * (size // _PIECES))
            digest.update(data.read(_PIECE_BYTES if size > _PIECES * _PIECE_BYTES else -1))
    return digest.hexdigest()


def resolve_model(settings: Model) -> str:
    """Absolute path of a pretrained model's folder where there is one, its hub name otherwise."""
    path = Path(str(settings.path)).expanduser()
    return str(path.absolute()) if path.exists() else str(settings.path)


def check_local_model(model: str) -> None:
    """Raise :class:`UserError` for a path that is not a model folder; hub names are left to the hub."""
    path = Path(model).expanduser()
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not path.exists():
        if looks_like_path:
            raise UserError(f"{model}: no such model folder on this machine; a name on a hub is OWNER/NAME")
        return
    if not (path / "config.json").is_file():
        raise UserError(f"{model}: not a model folder: it has no config.json")


def check_weights(model: str) -> None:
    """Raise :class:`UserError` for a local model folder without whole weights. Pickled weights are not loaded."""
    path = Path(model).expanduser()
    if path.is_dir() and (problems := weights_problems(path)):
        raise UserError(
            f"{model}: {'; '.join(problems)}. Copy the model anew; weights in other formats are not loaded, convert them first"
        )


def weights_problems(folder: Path) -> list[str]:
    """What is wrong with the weights that would be loaded from a model folder, by the headers of their files."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.is_file():
        try:
            names = sorted(set(map(str, json.loads(index.read_bytes())["weight_map"].values())))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return [f"{index.name}: damaged"]
    problems = [f"{name}: {problem}" for name in names if (problem := _harm(folder / name)) is not None]
    if problems == [f"{names[0]}: missing"]:
        others = [file.name for file in folder.glob("*.safetensors")]
        if not others:
            return ["has no *.safetensors weights"]
        return [f"has neither {names[0]} nor {index.name}, only {', '.join(sorted(others)[:3])}"]
    return problems


def model_problems(folder: Path) -> list[str]:
    """What is wrong with a finished model: its weights, by their headers, its config and its tokenizer."""
    problems = weights_problems(folder)
    for name in ("config.json", "tokenizer_config.json"):
        try:
            sound = isinstance(json.loads((folder / name).read_bytes()), dict)
        except FileNotFoundError:
            problems.append(f"{name}: missing")
            continue
        except (OSError, ValueError):
            sound = False
        problems += [] if sound else [f"{name}: damaged"]
    return problems


def _harm(file: Path) -> str | None:
    """What the size and the header of a safetensors file say against it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(min(length, _HEADER_BYTES)))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "not a safetensors file"
    if not ends:
        return "has no tensors in it"
    expected = 8 + length + max(ends)
    return None if size == expected else f"has {size:,} bytes, its header says {expected:,}"


def load_model_config(model: str, settings: Model) -> Any:
    """The transformers config of a model. Raises :class:`UserError` where there is none."""
    from transformers import AutoConfig

    check_local_model(model)
    try:
        return AutoConfig.from_pretrained(
            model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - config classes have errors of their own for bad values
        kind = (
            "not a model that"
            if Path(model).expanduser().is_dir()
            else "no folder here, and not a model of the hub that"
        )
        raise UserError(f"{model}: {kind} transformers can load: {first_line(error)}") from None


def context_length(model: str, settings: Model) -> int:
    """Tokens that a model may see: the config's limit, or the model's own."""
    own = getattr(load_model_config(model, settings).get_text_config(), "max_position_embeddings", None)
    return int(min(value for value in (settings.max_length, own, 1 << 20) if value))


def vocabulary_size(config: Any) -> int:
    """Tokens that a model with a transformers config has embeddings for."""
    return int(config.get_text_config().vocab_size)


def head_size(config: Any) -> int | None:
    """Width of an attention head of a model with a transformers config; None where it has none, or not one."""
    text = config.get_text_config()
    try:
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    except (AttributeError, RuntimeError, TypeError, ZeroDivisionError):  # layers without heads, or that differ
        return None
