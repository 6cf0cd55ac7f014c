"""How large a model is, read from its config alone: no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from plad_dist.config import Lora, Model
from plad_dist.data.models import load_model_config, resolve_model, vocabulary_size
from plad_dist.errors import UserError, first_line
from plad_dist.planning.known_models import KNOWN_MODELS
from plad_dist.training.model.attention import attention_of

Device = Literal["gpu", "cpu"]

# Bytes of a weight by `quant_method`, scales and what stays in two bytes included.
_QUANTIZED = {
    "awq": 0.6, "bitsandbytes": 0.6, "compressed-tensors": 0.6, "fp8": 1.1, "gptq": 0.6, "int8": 1.1, "mxfp4": 0.6,
}  # fmt: skip
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class ModelSize:
    """Counts that memory and time follow from.

    Attributes:
        name: what the config calls the model.
        parameters: all of them, tied ones once.
        layer: parameters of the largest decoder layer.
        output: parameters of the output layer.
        linear: (in, out) of every linear layer in the decoder layers, which adapters go beside.
        active: parameters that a token is multiplied with, without the look-up in the embeddings: fewer than all in a mixture of
            experts.
        kv_heads: heads of keys and values; 1 where they are compressed.
        kv_width: elements that one layer keeps of a token, keys and values together.
        window, windowed: tokens that layers with a sliding window see, and how many such layers there are.
        key_width: elements of the keys of a token, as the trainer computes them.
        mlp_width: elements of the hidden layer of the MLP, of all experts that a token meets.
        scores_width: elements of a token's attention scores in one layer, where the trainer's attention holds them; 0 where it does
            not.
        quantized: bytes of a stored weight where the model comes quantized, else None.
        context: longest sequence, by the model and by the config.
        positions: longest sequence that the model itself takes, None where it names none.
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
    kv_heads: int
    kv_width: int
    window: int | None
    windowed: int
    key_width: int
    mlp_width: int
    scores_width: int
    quantized: float | None
    vocabulary: int
    context: int
    positions: int | None

    def adapters(self, lora: Lora) -> int:
        """Parameters of adapters of all linear layers; a choice of them has fewer."""
        return sum(lora.r * (inputs + outputs) for inputs, outputs in self.linear)


def size_of(settings: Model, device: Device = "gpu", folder: Path | None = None) -> ModelSize:
    """The size of a model.

    Args:
        device: where it is trained, which decides how it attends.
        folder: where a run has made it, if it has.

    Raises:
        UserError: no config of it can be had, or it is not of a kind that can be sized.
    """
    if settings.scratch is not None and (folder is None or not (folder / "config.json").is_file()):
        from plad_dist.training.model.scratch import check_architecture

        return _measured(check_architecture(settings.scratch), "from scratch", settings.max_length, device)
    name = str(folder) if settings.scratch is not None else resolve_model(settings)
    return _pretrained(name, settings.revision, settings.max_length, device, remote=settings.trust_remote_code)


@cache
def _pretrained(name: str, revision: str | None, longest: int | None, device: Device, *, remote: bool) -> ModelSize:
    known = KNOWN_MODELS.get(name)
    if known is not None and revision is None and not _is_at_hand(name):
        from transformers import AutoConfig

        config = AutoConfig.for_model(**known)
    else:
        config = load_model_config(name, Model(path=name, revision=revision, trust_remote_code=remote))
    return _measured(config, name, longest, device, remote=remote)


def _is_at_hand(name: str) -> bool:
    """Whether a model's config can be read without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def _measured(config: Any, name: str, longest: int | None, device: Device, *, remote: bool = False) -> ModelSize:
    try:
        return _measure(config, name, longest, device, remote=remote)
    except Exception as error:  # noqa: BLE001 - whatever a family has against being built or asked
        raise UserError(
            f"{name}: cannot be sized, it is no causal language model of a kind that is known: {first_line(error):.200}"
        ) from None


def _measure(config: Any, name: str, longest: int | None, device: Device, *, remote: bool) -> ModelSize:
    import torch
    from transformers import AutoModelForCausalLM

    deep = _first(config.get_text_config(), "num_hidden_layers", "num_layers", "n_layer") or 0
    if deep > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers: {deep:,}, expected at most {_MOST_LAYERS:,}")
    quantized = _stored_width(config)
    if quantized is not None:  # counted as it would be without
        config.quantization_config = None
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=remote)
    text = config.get_text_config()
    layers = _decoder_layers(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts") or 1
    met = _first(text, "num_experts_per_tok") or 1
    routed = sum(p.numel() for layer in layers for key, p in layer.named_parameters() if ".experts." in key)
    hidden = int(text.hidden_size)
    heads = int(_first(text, "num_attention_heads", "num_heads") or 1)
    kv_heads = _first(text, "num_key_value_heads") or heads
    key_width = kv_heads * (_first(text, "head_dim") or hidden // heads)
    compressed = _first(text, "kv_lora_rank")
    inner = _first(text, "intermediate_size", "ffn_dim") or 4 * hidden
    if experts > 1:
        inner = (_first(text, "moe_intermediate_size") or inner) * met
    context = min(value for value in (longest, _first(text, "max_position_embeddings"), 1 << 20) if value)
    attention = attention_of(text, None, "flex" if device == "gpu" else "sdpa")
    longest_row = min(attention.layout.max_row_tokens or context, context)
    kinds = list(getattr(text, "layer_types", None) or ())
    return ModelSize(
        name=name,
        parameters=parameters,
        layers=len(layers),
        layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        output=output.numel(),
        linear=tuple(
            (int(part.in_features), int(part.out_features))
            for layer in layers
            for part in layer.modules()
            if isinstance(part, torch.nn.Linear)
        ),
        active=parameters - (0 if output is embeddings else embeddings.numel()) - routed + routed * met // experts,
        hidden=hidden,
        heads=heads,
        kv_heads=1 if compressed else kv_heads,
        kv_width=compressed + (_first(text, "qk_rope_head_dim") or 0) if compressed else 2 * key_width,
        window=_first(text, "sliding_window"),
        windowed=sum("sliding" in str(kind) for kind in kinds),
        key_width=key_width,
        mlp_width=inner,
        scores_width=heads * longest_row if attention.implementation == "eager" else 0,
        quantized=quantized,
        vocabulary=vocabulary_size(config),
        context=context,
        positions=_positions(text),
    )


def _positions(text: Any) -> int | None:
    """Positions of a model, as vLLM counts them: some kinds of stretched rotary embeddings name those before they are stretched."""
    found, rope = _first(text, "max_position_embeddings"), getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type")]
    stretched = [kind for kind in kinds if kind["rope_type"] not in ("su", "longrope", "llama3") and kind.get("factor")]
    if found is None or not stretched or "gemma3" in text.model_type:
        return found
    before = stretched[0].get("original_max_position_embeddings") if stretched[0]["rope_type"] == "yarn" else None
    return int((before or found) * stretched[0]["factor"])


def _stored_width(config: Any) -> float | None:
    """Bytes of a weight of a model that comes quantized; None for others."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    told = found if isinstance(found, dict) else found.to_dict()
    bits = told.get("bits") or told.get("w_bit")
    if isinstance(bits, int):
        return 1.15 * bits / 8
    return _QUANTIZED.get(str(told.get("quant_method")), 0.6)


def quantized_width(method: str) -> float:
    """Bytes of a weight that an engine is told to quantize by a method."""
    return next((width for name, width in _QUANTIZED.items() if method.startswith(name)), 0.6)


def _decoder_layers(model: Any) -> list[Any]:
    """The layers that the model is a list of: its longest list of modules of one kind."""
    from torch import nn

    def parameters(modules: Any) -> int:
        return sum(parameter.numel() for parameter in modules.parameters())

    return list(max((one for one in model.modules() if isinstance(one, nn.ModuleList)), key=parameters))


def _first(config: Any, *names: str) -> int | None:
    """The first of some attributes that a config has."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
