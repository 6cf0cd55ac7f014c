"""The cut model as a folder in Hugging Face format: config, weights, tokenizer and card."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plad_dist.config import Pretrained
from plad_dist.data.local_files import failure_explained
from plad_dist.data.models import (
    CARD,
    commit_model,
    hub_name,
    load_model_config,
    model_fingerprint,
    model_identity,
    resolve_model,
    unfinished_model,
)
from plad_dist.errors import RunFailed, first_line
from plad_dist.fingerprint import fingerprint
from plad_dist.training.cut.config import built_exactly, chosen_layers, depth_of
from plad_dist.training.cut.weights import copy_weights

logger = logging.getLogger("plad")

# Files that belong to a model besides its config and its weights.
_COPIED = (
    "tokenizer*", "tekken.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json", "processor_config.json", "preprocessor_config.json", "*.model",
    "*.tiktoken", "*.py",
)  # fmt: skip
_FETCHED = ("config.json", "model*.safetensors", "model.safetensors.index.json", *_COPIED)


def make_cut_model(source: Pretrained, folder: Path) -> None:
    """Write some layers of a model as a model with a card, unless the folder already holds it.

    Args:
        source: the model to cut, and the layers to keep.

    Raises:
        UserError: the model cannot be cut exactly.
        RunFailed: the model cannot be read or written.
    """
    assert source.layers is not None
    path = resolve_model(source.settings)
    config = load_model_config(path, source.settings)
    layers = chosen_layers(source.layers, depth := depth_of(config))
    identity = fingerprint("cut model", source=model_identity(path, source.settings), layers=layers)
    card = _card(source, layers, depth)
    if model_fingerprint(folder) == identity:
        _restore_card(folder, card)
        return
    logger.info("%s: cutting %d of %d layers out of %s", folder, len(layers), depth, path)
    cut_config, original, cut = built_exactly(config, layers, remote=source.settings.trust_remote_code)
    files = _local_folder(path, source)
    with unfinished_model(folder) as temporary:
        temporary.mkdir()
        cut_config.save_pretrained(temporary)
        for file in sorted({file for pattern in _COPIED for file in files.glob(pattern) if file.is_file()}):
            shutil.copyfile(file, temporary / file.name)
        copy_weights(files, original, cut, layers, temporary)
        (temporary / CARD).write_text(card, encoding="utf-8")
        facts: dict[str, Any] = {"from": source.path, "revision": source.settings.revision, "layers": layers}
        commit_model(temporary, folder, identity, facts)


def _local_folder(path: str, source: Pretrained) -> Path:
    """Return the folder of a model's files, fetched from the hub if it is not local."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=source.settings.revision, allow_patterns=list(_FETCHED)))
    except Exception as error:  # noqa: BLE001 - the transport raises errors of many packages
        raise RunFailed(f"{path}: cannot be fetched from the hub: {first_line(error)}; run again when it can") from None


def _restore_card(folder: Path, card: str) -> None:
    """Write the card of a model that was taken over from another run, which left it out."""
    with failure_explained(str(folder / CARD), "written"):
        if not (folder / CARD).exists():
            (folder / CARD).write_text(card, encoding="utf-8")


def _card(source: Pretrained, layers: Sequence[int], depth: int) -> str:
    """Return the card of a cut model as Markdown, headed by the metadata of a hub."""
    name = f"{source.path}{'@' + source.settings.revision if source.settings.revision else ''}"
    base = f"base_model: {source.path}\n" if hub_name(source.path) else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- pruned
- plad
---

# {len(layers)} of {depth} layers of {source.path}

Cut by plad-dist from {name}, as the start of a student. Embeddings, head and tokenizer are unchanged, and so are the
weights of the layers that were kept. They are, numbered from 0:

{", ".join(map(str, layers))}

The model has not been trained since, so its text is of little use until a warm-up has healed it.
"""
