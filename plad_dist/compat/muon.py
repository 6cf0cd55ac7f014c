"""Import of DeepSpeed's Muon, whose functions torch would compile.

Written for DeepSpeed 0.19.8 and PyTorch 2.13. Relies on:

- `DeepSpeedEngine._configure_basic_optimizer`, which imports
  `deepspeed.runtime.zero.muon.muon_optimizer` for every optimizer;
- its decorators `torch.compile`, which import the compiler of torch (eight seconds) unless
  the environment has `TORCHDYNAMO_DISABLE=1` at that moment.
"""

from __future__ import annotations

import importlib
import os

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
