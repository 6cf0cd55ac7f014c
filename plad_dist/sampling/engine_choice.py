"""Choice of the engine of a model: vLLM, or transformers for a model that vLLM lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from plad_dist.compat.vllm import generating_architectures
from plad_dist.config import Model, ScratchModel
from plad_dist.config.sampling import TRANSFORMERS
from plad_dist.data.models import load_model_config
from plad_dist.errors import UserError
from plad_dist.sampling.backend import Backend
from plad_dist.sampling.engine import Engine
from plad_dist.sampling.engine_arguments import check_engine_args, generates_by_transformers
from plad_dist.sampling.generation.engine import TransformersEngine
from plad_dist.sampling.vllm_models.plugin import MODELS


def start_engine(path: str, settings: Model, engine: dict[str, Any], seed: int) -> Backend:
    """Start the engine that the arguments name. Call it inside a running event loop.

    Args:
        path: folder or hub name of the model.
        settings: the model's section of the config.
        engine: arguments as :func:`chosen_engine` returns them.
        seed: vLLM's own seed; each response has its own.

    Raises:
        UserError, EngineStartError: as :class:`Engine` and :class:`TransformersEngine`.
    """
    start = TransformersEngine if generates_by_transformers(engine) else partial(Engine, seed=seed)
    return start(path, settings, engine)


def chosen_engine(model: Model, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine arguments of a model, with the name of an engine other than vLLM.

    Args:
        model: the model's section of the config.
        engine: `sampling.<role>.engine` of the config.
    """
    if generates_by_transformers(engine) or missing_architecture(model) is None:
        return dict(engine)
    return {"name": TRANSFORMERS, **engine}


def check_chosen_engine(model: Model, engine: Mapping[str, Any], key: str, model_key: str) -> None:
    """Raise :class:`UserError` if vLLM lacks a model, and its arguments are vLLM's.

    Args:
        key: config key that holds the arguments.
        model_key: config key of the model.
    """
    chosen = chosen_engine(model, engine)
    if chosen != engine:
        check_engine_args(engine, key)
        try:
            check_engine_args(chosen, key)
        except UserError as error:
            raise UserError(
                f"{error}. vLLM has no {missing_architecture(model)}, the architecture of {model_key}, so transformers "
                "generates"
            ) from None


def missing_architecture(model: Model) -> str | None:
    """Return the architecture of a model that vLLM cannot run.

    None if it can run it, or if the config of the model cannot be read, which other checks report.
    """
    if model.scratch is not None:
        return _missing_in_scratch(model.scratch)
    source = model.pretrained()
    if source is None or _vllm_has(_listed_architectures(source.path)):
        return None
    return _missing_in_pretrained(source.path, source.settings.revision, remote=source.settings.trust_remote_code)


@lru_cache
def _missing_in_pretrained(path: str, revision: str | None, *, remote: bool) -> str | None:
    try:
        return _missing(load_model_config(path, Model(path=path, revision=revision, trust_remote_code=remote)))
    except UserError:
        return None


def _missing_in_scratch(scratch: ScratchModel) -> str | None:
    from transformers import AutoConfig

    try:
        return _missing(AutoConfig.for_model(**scratch.architecture))
    except Exception:  # noqa: BLE001 - config classes raise their own errors, which other checks report
        return None


def _missing(config: Any) -> str | None:
    """Return the architecture of a transformers config that vLLM cannot run, or None.

    It runs decoders that it does not include by the code of transformers, if that lets it replace
    the attention. Only vLLM itself can tell if it runs the code of a model's own repository.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    names = list(config.architectures or [])
    if not names:
        kind = "SEQ_TO_SEQ_CAUSAL_LM" if config.is_encoder_decoder else "CAUSAL_LM"
        table = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        names = [table[config.model_type]] if config.model_type in table else []
    if not names or _vllm_has(names):
        return None
    if not config.is_encoder_decoder:
        classes = [getattr(transformers, name, None) for name in names]
        if hasattr(config, "auto_map") or any(kind is not None and kind.is_backend_compatible() for kind in classes):
            return None
    return str(names[0])


def _vllm_has(names: list[str]) -> bool:
    return not (generating_architectures() | MODELS.keys()).isdisjoint(names)


def _listed_architectures(path: str) -> list[str]:
    """Return the architectures that a model folder lists, read without importing transformers."""
    try:
        return list(json.loads((Path(path) / "config.json").read_bytes()).get("architectures") or [])
    except (OSError, ValueError, AttributeError, TypeError):
        return []
