"""DeepSpeed's Muon: its import, and the matrices that it updates.

Written for DeepSpeed 0.19.8 and PyTorch 2.13. Relies on:

- `DeepSpeedEngine._configure_basic_optimizer`, which imports
  `deepspeed.runtime.zero.muon.muon_optimizer` for every optimizer;
- its decorators `torch.compile`, which import the compiler of torch (eight seconds) unless
  the environment has `TORCHDYNAMO_DISABLE=1` at that moment;
- `deepspeed.set_optimizer_flags`, which `deepspeed.initialize` looks up in the package. It sets
  `use_muon` of every parameter: True for matrices without `embed` or `lm_head` in their names.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plad_dist.compat.assumptions import Assumptions

_MODULE = "deepspeed.runtime.zero.muon.muon_optimizer"
_SWITCH = "TORCHDYNAMO_DISABLE"


def import_muon(*, compiled: bool) -> None:
    """Import Muon, unless it is imported already.

    Args:
        compiled: let torch compile it at its first step. On CPUs that needs a C++ compiler and half
            a minute, and nothing is faster afterwards.
    """
    before = os.environ.get(_SWITCH)
    if not compiled:
        os.environ[_SWITCH] = "1"
    try:
        importlib.import_module(_MODULE)
    finally:
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before


def unnamed_embeddings(model: Any) -> dict[str, Any]:
    """Return the weights of embeddings, by name, whose names do not show what they are."""
    from torch import nn

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: weight
        for name, weight in model.named_parameters()
        if id(weight) in embeddings and not any(part in name.lower() for part in ("embed", "lm_head"))
    }


@contextmanager
def embeddings_left_to_adam() -> Iterator[None]:
    """Let `deepspeed.initialize` give Muon no embeddings, whatever their names.

    Muon is for matrices of hidden layers. DeepSpeed tells them by names, so that it also takes
    embeddings such as `wte` (GPT-Neo) and `shared` (T5).
    """
    import deepspeed

    set_by_names = Assumptions("deepspeed", "0.19.8").attribute(deepspeed, "set_optimizer_flags")

    def set_flags(config: Any, model: Any) -> None:
        set_by_names(config, model)
        for weight in unnamed_embeddings(model).values():
            if hasattr(weight, "use_muon"):
                weight.use_muon = False

    deepspeed.set_optimizer_flags = set_flags
    try:
        yield
    finally:
        deepspeed.set_optimizer_flags = set_by_names
