"""Other weights in a running engine: when they can be exchanged, and the check of the result."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plad_dist.config import Model
from plad_dist.data.models import MARKER

CHECK_TEXTS = 10
CHECK_TOKENS = 64  # of each text
# Relative; vLLM and transformers differ by 1e-7 to 3e-7 with small models in float32.
CHECK_TOLERANCE = 1e-5
# The actor computes the expected log-likelihoods on its CPUs. That would take a large model longer
# than the start of an engine, in memory that nobody planned for.
_LARGEST_WEIGHTS = 1 << 30
_DESCRIPTION_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")
_LISTINGS = {MARKER, "model.safetensors.index.json"}  # differ with the weights


def can_be_exchanged(present: str, other: str) -> bool:
    """Return True if two models are small folders that differ in nothing but their weights.

    Raises:
        OSError: a folder cannot be read.
    """
    folders = Path(present), Path(other)
    if not all(folder.is_dir() for folder in folders):
        return False  # a name on a hub
    names, other_names = map(_description, folders)
    same, _, _ = filecmp.cmpfiles(*folders, names, shallow=False)
    weights = sum(file.stat().st_size for file in folders[1].glob("*.safetensors"))
    return len(same) == len(names | other_names) and weights <= _LARGEST_WEIGHTS


def _description(folder: Path) -> set[str]:
    """Return the names of the files with architecture, tokenizer and generation defaults."""
    return {file.name for file in folder.iterdir() if file.suffix in _DESCRIPTION_SUFFIXES} - _LISTINGS


def logprobs_by_transformers(path: str, settings: Model, texts: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-likelihood of each text after its first token, by a plain forward pass.

    Args:
        path: folder of the model.
        settings: the model's section of the config.
        texts: token ids.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=True,  # other formats are pickles, which run programs
        dtype=torch.float32,
    )

    def logprob(ids: Any) -> float:
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(1, ids[0, 1:, None]).sum())

    with torch.inference_mode():
        return [logprob(torch.tensor([text])) for text in texts]


def largest_difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference, NaN if any of the numbers is NaN."""
    return float(np.max(np.abs(np.subtract(actual, expected) / expected)))
