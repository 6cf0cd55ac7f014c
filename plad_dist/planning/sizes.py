"""How large a model is, read from its config alone: no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from plad_dist.config import Lora, Model
from plad_dist.data.models import load_model_config, resolve_model, vocabulary_size
from plad_dist.errors import UserError
from plad_dist.planning.known_models import KNOWN_MODELS
from plad_dist.training.attention import attention_of


@dataclass(frozen=True)
class ModelSize:
    """Counts that memory and time follow from.

    Attributes:
        name: what the config calls the model.
        parameters: all of them, tied ones once.
        layer: parameters of the largest decoder layer.
        output: parameters of the output layer.
        linear: (in, out) of every linear layer in the decoder layers, which adapters go beside.
        active: parameters that a token is multiplied with, without the look-up in the embeddings: fewer than all in a mixture of experts.
        kv_width: elements of keys, and of values, that one layer keeps of a token.
        mlp_width: elements of the hidden layer of the MLP, of all experts that a token meets.
        scores_width: elements of a token's attention scores in one layer, where the trainer's attention holds them; 0 where it does not.
        context: tokens that the model may see.
    """

    name: str
    parameters: int
    layers: int
    layer: int
    output: int
    linear: tuple[tuple[int, int], ...]
    active: int
    hidden: int
    heads: int
    kv_width: int
    mlp_width: int
    scores_width: int
    vocabulary: int
    context: int

    def adapters(self, lora: Lora) -> int:
        """Parameters of adapters of all linear layers; a choice of them has fewer."""
        return sum(lora.r * (inputs + outputs) for inputs, outputs in self.linear)


def size_of(settings: Model, folder: Path | None = None) -> ModelSize:
    """The size of a model.

    Args:
        folder: where a run has made it, if it has.

    Raises:
        UserError: no config of it can be had, or transformers has no such model.
    """
    if settings.scratch is not None and (folder is None or not (folder / "config.json").is_file()):
        from plad_dist.training.scratch import check_architecture

        return _measure(check_architecture(settings.scratch), "from scratch", settings.max_length)
    name = str(folder) if settings.scratch is not None else resolve_model(settings)
    return _pretrained(name, settings.revision, settings.max_length, trust_remote_code=settings.trust_remote_code)


@cache
def _pretrained(name: str, revision: str | None, longest: int | None, *, trust_remote_code: bool) -> ModelSize:
    known = KNOWN_MODELS.get(name)
    if known is not None and revision is None and not _is_at_hand(name):
        from transformers import AutoConfig

        config = AutoConfig.for_model(**known)
    else:
        config = load_model_config(name, Model(path=name, revision=revision, trust_remote_code=trust_remote_code))
    return _measure(config, name, longest)


def _is_at_hand(name: str) -> bool:
    """Whether a model's config can be read without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def _measure(config: Any, name: str, longest: int | None) -> ModelSize:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise UserError(f"{name}: no causal language model of transformers: {str(error).splitlines()[0]}") from None
    text = config.get_text_config()
    layers = _decoder_layers(model)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    output = model.get_output_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    context = int(min(value for value in (longest, _first(text, "max_position_embeddings"), 1 << 20) if value))
    attention = attention_of(text, None)
    longest_row = min(attention.layout.longest_row or context, context)
    experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts") or 1
    met = _first(text, "num_experts_per_tok") or 1
    routed = sum(p.numel() for layer in layers for key, p in layer.named_parameters() if ".experts." in key)
    hidden = int(text.hidden_size)
    heads = int(_first(text, "num_attention_heads", "num_heads") or 1)
    head_width = int(_first(text, "head_dim") or hidden // heads)
    inner = int(_first(text, "intermediate_size", "ffn_dim") or 4 * hidden)
    if experts > 1:
        inner = int(_first(text, "moe_intermediate_size") or inner) * met
    return ModelSize(
        name=name,
        parameters=parameters,
        layers=len(layers),
        layer=max(sizes),
        output=output,
        linear=tuple(
            (int(part.in_features), int(part.out_features))
            for layer in layers
            for part in layer.modules()
            if isinstance(part, torch.nn.Linear)
        ),
        active=parameters - (0 if tied else embeddings) - routed + routed * met // experts,
        hidden=hidden,
        heads=heads,
        kv_width=int(_first(text, "num_key_value_heads") or heads) * head_width,
        mlp_width=inner,
        scores_width=heads * longest_row if attention.implementation == "eager" else 0,
        vocabulary=vocabulary_size(config),
        context=context,
    )


def _decoder_layers(model: Any) -> list[Any]:
    """The layers that the model is a list of: its longest list of modules of one kind."""
    from torch import nn

    def parameters(modules: Any) -> int:
        return sum(parameter.numel() for parameter in modules.parameters())

    return list(max((one for one in model.modules() if isinstance(one, nn.ModuleList)), key=parameters))


def _first(config: Any, *names: str) -> int | None:
    """The first of some attributes that a config has."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
