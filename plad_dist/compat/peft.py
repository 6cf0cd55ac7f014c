"""Names of layers that peft reads as those of experts.

Written for peft 0.21. Relies on `utils/transformers_weight_conversion.py`:

- when peft adds or loads adapters, `convert_peft_config_for_transformers` changes the targets of
  families whose experts were linear layers before transformers 5.

Importing this module imports peft, which takes seconds: import it where adapters are added.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.utils import transformers_weight_conversion

from plad_dist.compat.assumptions import Assumptions

_assumptions = Assumptions("peft", "0.21.2")
_convert = _assumptions.attribute(transformers_weight_conversion, "convert_peft_config_for_transformers")
_assumptions.parameters(_convert, "peft_config", "model", "conversions")


def targets_read_as_experts(targets: list[str], model: Any) -> list[str]:
    """Return the names of linear layers that peft reads as those of experts of the model."""
    config = LoraConfig(target_modules=targets)
    try:
        _convert(config, model, None)
    except ValueError:  # some of the layers that peft knows as parts of an expert are missing
        return targets
    return sorted(set(targets) - set(config.target_modules))
