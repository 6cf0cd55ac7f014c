"""Routers of a mixture of experts, by the declaration from which transformers records their logits.

Written for transformers 5.23. Relies on:

- `_can_record_outputs` of a model's class, whose entry `router_logits` is an `OutputRecorder`;
- `OutputRecorder` of `utils.output_capturing`, which names the class of the routers
  (`target_class`) and the index of the logits among their outputs (`index`).

Importing this module imports transformers, which takes seconds: import it where a model is built.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import output_capturing

from plad_dist.compat.assumptions import Assumptions

_assumptions = Assumptions("transformers", "5.23.0")
_Recorder = _assumptions.attribute(output_capturing, "OutputRecorder")
_assumptions.starts_with_parameters(_Recorder, "target_class", "index")


def routers_of(model: Any) -> tuple[list[Any], int]:
    """Return the routers of a model, first layer first, and the index of the logits in an output.

    The list is empty if the model declares none.
    """
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if isinstance(recorder, _Recorder):
            return [part for part in model.modules() if isinstance(part, recorder.target_class)], recorder.index
    return [], 0
