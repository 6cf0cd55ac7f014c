"""Weights of a model that transformers builds under ZeRO-3, loaded by a function of ours.

Written for transformers 5.23. Relies on `modeling_utils`:

- `PreTrainedModel._load_pretrained_model` fills a built model from its files, and returns which of
  the model's names the files lack. What follows, such as tying weights and computing buffers that
  no file has, depends on these names and on the marks `_is_hf_initialized`;
- `LoadStateDictInfo` and `LoadStateDictConfig` describe the outcome and the request;
- `core_model_loading.rename_source_key` gives the name in the model of a name in a file, and
  `WeightConverter` is a conversion that changes tensors, not only names;
- `conversion_mapping.get_model_conversion_mapping` returns the conversions of a model;
- `all_tied_weights_keys` of a model names the weights that are tied after they are loaded;
- under ZeRO-3, `integrations.deepspeed` keeps the conversions as `_weight_conversions`, for the
  names under which the model is saved.

Importing this module imports transformers, which takes seconds: import it where a model is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import conversion_mapping, core_model_loading, modeling_utils
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel

from plad_dist.compat.assumptions import Assumptions

_assumptions = Assumptions("transformers", "5.23.0")
_load_as_usual = _assumptions.attribute(PreTrainedModel, "_load_pretrained_model")
_assumptions.parameters(_load_as_usual, "model", "state_dict", "checkpoint_files", "load_config", "expected_keys")
_rename = _assumptions.attribute(core_model_loading, "rename_source_key")
_assumptions.starts_with_parameters(
    _rename, "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"
)
_Renaming = _assumptions.attribute(core_model_loading, "WeightRenaming")
_Converter = _assumptions.attribute(core_model_loading, "WeightConverter")
_conversions_of = _assumptions.attribute(conversion_mapping, "get_model_conversion_mapping")
_assumptions.starts_with_parameters(_conversions_of, "model")
_Outcome = _assumptions.attribute(modeling_utils, "LoadStateDictInfo")
_assumptions.parameters(
    _Outcome,
    "missing_keys",
    "unexpected_keys",
    "mismatched_keys",
    "error_msgs",
    "conversion_errors",
    "skipped_pp_keys",
)


@dataclass(frozen=True)
class BuiltModel:
    """Model without its weights, partitioned by ZeRO-3 or on the meta device.

    Attributes:
        files: safetensors files of its weights.
        conversions: conversions of names and tensors between the files and the model.
    """

    model: Any
    files: list[str]
    conversions: list[Any]

    @classmethod
    def of(cls, model: Any) -> BuiltModel:
        """Return a model on the meta device, without the places of its weights."""
        return cls(model, [], _conversions_of(model))

    def targets(self) -> dict[str, Any]:
        """Return the parameters and persistent buffers by name; tied ones are not tied yet."""
        return dict(self.model.state_dict(keep_vars=True))

    @property
    def ties(self) -> dict[str, str]:
        """Names of the weights that the config ties, each with the name of the other weight."""
        return dict(self.model.all_tied_weights_keys)

    def untie(self, names: Iterable[str]) -> None:
        """Leave out weights when transformers ties the model's weights."""
        for name in names:
            del self.model.all_tied_weights_keys[name]

    def names_in_model(self, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
        """Return the name in the model of each name in a file, and True if its tensor is converted.

        Names that the model does not have are left out.

        Args:
            names: names in the order of the files, sorted in each of them, since some conversions
                depend on the names before.
        """
        targets, prefix = self.targets(), self.model.base_model_prefix
        conversions = copy.deepcopy(self.conversions)
        renamings = [entry for entry in conversions if isinstance(entry, _Renaming)]
        converters = [entry for entry in conversions if isinstance(entry, _Converter)]
        renamed = {name: _rename(name, renamings, converters, prefix, targets) for name in names}
        return {name: (target, pattern is not None) for name, (target, pattern) in renamed.items() if target in targets}


@contextmanager
def weights_loaded_by(load: Callable[[BuiltModel], set[str] | None]) -> Iterator[None]:
    """Let a function load the weights of models that `from_pretrained` builds under ZeRO-3.

    Args:
        load: fills a model, and returns the names that it has filled or that will be filled later;
            None if transformers must load it.
    """

    def load_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, Any]:
        is_plain = state_dict is None and checkpoint_files and not load_config.is_quantized
        if is_plain and load_config.weight_mapping and is_deepspeed_zero3_enabled():
            built = BuiltModel(model, checkpoint_files, load_config.weight_mapping)
            if (loaded := load(built)) is not None:
                return _outcome(built, loaded), None
        outcome: tuple[Any, Any] = _load_as_usual(model, state_dict, checkpoint_files, load_config, expected_keys)
        return outcome

    PreTrainedModel._load_pretrained_model = staticmethod(load_model)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(_load_as_usual)


def _outcome(built: BuiltModel, loaded: set[str]) -> Any:
    """Mark the loaded weights as transformers does under ZeRO-3, and return what it returns."""
    built.model._weight_conversions = built.conversions
    targets = built.targets()
    for name in loaded:
        targets[name]._is_hf_initialized = True
    return _Outcome(
        missing_keys=targets.keys() - loaded,
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
