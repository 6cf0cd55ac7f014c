"""Size of a model, computed from its config alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plad_dist.config import Lora, Model
from plad_dist.data.models import load_model_config, resolve_model, vocabulary_size
from plad_dist.errors import UserError, first_line
from plad_dist.planning.known_models import KNOWN_MODELS
from plad_dist.training.cut.config import chosen_layers, cut_config, depth_of
from plad_dist.training.model.meta import build_without_weights, count_parameters, decoder_layers

if TYPE_CHECKING:
    from plad_dist.training.model.attention import Attention

Device = Literal["gpu", "cpu"]

# Bytes per weight by `quant_method`, including scales and the weights that stay in two bytes.
_QUANTIZED_WIDTHS = {
    "awq": 0.6, "bitsandbytes": 0.6, "compressed-tensors": 0.6, "fp8": 1.1, "gptq": 0.6, "int8": 1.1, "mxfp4": 0.6,
}  # fmt: skip


@dataclass(frozen=True)
class ModelSize:
    """Counts of a model from which memory and time follow.

    Attributes:
        name: the model's name in the config.
        parameters: all parameters, tied ones counted once.
        layers: decoder layers. In an encoder-decoder, a token passes through one of two stacks, so
            the layers of the larger one count.
        layer_parameters: parameters of the largest decoder layer.
        output_parameters: parameters of the output layer.
        linear_shapes: (in, out) of every linear layer of the stacks, which adapters are added to.
        stacked_experts: shape of every parameter that stacks the experts of a layer, by name.
        active_parameters: parameters that a token is multiplied with, without the look-up in the
            embeddings; fewer than all in a mixture of experts, and in an encoder-decoder those of
            one stack.
        is_mixture: a token uses only some of the experts.
        hidden: hidden size.
        heads: attention heads.
        kv_heads: heads of keys and values; 1 if they are compressed.
        kv_width: elements that one layer caches per token, keys and values together.
        window: tokens that a layer with a sliding window attends to, None without a window.
        windowed_layers: layers with a sliding window.
        key_width: elements of the keys of a token, as the trainer computes them.
        mlp_width: elements of the hidden layer of the MLP, of all experts of a token.
        shares_prompts: the trainer computes the prompt of a group once for all its responses.
        scores_width: elements of a token's attention scores in one layer if the trainer's attention
            stores them, otherwise 0.
        stored_width: bytes per weight if the model is published quantized, otherwise None.
        vocabulary: rows of the embeddings.
        context: longest sequence, by the model and the config.
        positions: longest sequence that the model supports, None if its config names none.
    """

    name: str
    parameters: int
    layers: int
    layer_parameters: int
    output_parameters: int
    linear_shapes: tuple[tuple[int, int], ...]
    stacked_experts: dict[str, tuple[int, ...]]
    active_parameters: int
    is_mixture: bool
    hidden: int
    heads: int
    kv_heads: int
    kv_width: int
    window: int | None
    windowed_layers: int
    key_width: int
    mlp_width: int
    shares_prompts: bool
    scores_width: int
    stored_width: float | None
    vocabulary: int
    context: int
    positions: int | None

    def adapters(self, lora: Lora) -> int:
        """Return the number of LoRA parameters if all linear layers of the decoder have adapters.

        The output layer never has any. Fewer are trained if `target_modules` selects layers.
        """
        linear = sum(lora.r * (inputs + outputs) for inputs, outputs in self.linear_shapes)
        shapes = self.adapted_experts(lora)
        return linear + sum(lora.r * experts * (rows + columns) for experts, rows, columns in shapes)

    def adapted_experts(self, lora: Lora) -> list[tuple[int, ...]]:
        """Return the shapes of the stacked experts that get adapters."""
        from plad_dist.training.model.adapters import adapted_shapes  # not at the top: it imports torch

        return adapted_shapes(self.stacked_experts, lora)


def size_of(model: Model, device: Device = "gpu", folder: Path | None = None) -> ModelSize:
    """Return the size of a model that a config names.

    Args:
        device: where the model is trained, which decides its attention.
        folder: where the run stores the model if it creates it from scratch.

    Raises:
        UserError: the model's config cannot be read, or models of its kind cannot be sized.
    """
    if model.scratch is not None and (folder is None or not (folder / "config.json").is_file()):
        from plad_dist.training.model.scratch import check_architecture

        return _measured(check_architecture(model.scratch), "from scratch", model.max_length, device)
    name, revision, layers = str(folder), model.revision, None
    if (source := model.pretrained()) is not None:
        name, revision, layers = resolve_model(source.settings), source.settings.revision, source.layers
    return _pretrained_size(name, revision, layers, model.max_length, device, remote=model.trust_remote_code)


@cache
def _pretrained_size(
    name: str,
    revision: str | None,
    layers: int | tuple[int, ...] | None,
    max_length: int | None,
    device: Device,
    *,
    remote: bool,
) -> ModelSize:
    """Return the size of a pretrained model, or of some of its layers with embeddings and head."""
    published = KNOWN_MODELS.get(name)
    if published is not None and revision is None and not _is_local(name):
        from transformers import AutoConfig

        config = AutoConfig.for_model(**published)
    else:
        config = load_model_config(name, Model(path=name, revision=revision, trust_remote_code=remote))
    if layers is not None:
        depth = depth_of(config)
        kept = chosen_layers(layers, depth)
        name, config = f"{name}, {len(kept)} of {depth} layers", cut_config(config, kept)
    return _measured(config, name, max_length, device, remote=remote)


def _is_local(name: str) -> bool:
    """Return True if a model's config can be read without the hub."""
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def _measured(config: Any, name: str, max_length: int | None, device: Device, *, remote: bool = False) -> ModelSize:
    try:
        return _measure(config, name, max_length, device, remote=remote)
    except Exception as error:  # noqa: BLE001 - model families raise all kinds of errors
        raise UserError(
            f"{name}: cannot be sized, because it is not a language model of a known kind: {first_line(error):.200}"
        ) from None


def _measure(config: Any, name: str, max_length: int | None, device: Device, *, remote: bool) -> ModelSize:
    """Build a model on the meta device and count its parameters."""
    # Not at the top: it imports torch.
    from plad_dist.training.model.adapters import stacked_experts
    from plad_dist.training.model.experts import experts_per_token, is_routed, routed_share

    stored_width = _stored_width(config)
    model = build_without_weights(config, remote=remote)
    text = config.get_text_config()
    _, layers = decoder_layers(model)
    other_layers = _smaller_stack(model) if config.is_encoder_decoder else []
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = count_parameters(model)
    if getattr(config, "scale_decoder_outputs", None) is False:  # T5 1.1, which transformers ties until it is loaded
        output = output.clone()
        parameters += output.numel()
    routed = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if is_routed(name))
    lookup = 0 if output is embeddings else embeddings.numel()
    hidden = int(text.hidden_size)
    heads = int(_first_int(text, "num_attention_heads", "num_heads") or 1)
    kv_heads = _first_int(text, "num_key_value_heads") or heads
    key_width = kv_heads * (_first_int(text, "head_dim", "d_kv") or hidden // heads)
    compressed = _first_int(text, "kv_lora_rank")
    mlp_width = _first_int(text, "intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim") or 4 * hidden
    if routed:
        mlp_width = (_first_int(text, "moe_intermediate_size") or mlp_width) * experts_per_token(text)
    attention = _attention(config, device)
    stores_scores = attention.implementation == "eager"
    score_tokens = attention.layout.max_row_tokens
    if attention.layout.decoder_start is not None and attention.takes_mask:  # T5 adds its position bias to the scores
        stores_scores, score_tokens = True, attention.layout.row_tokens
    context = min(length for length in (max_length, _first_int(text, "max_position_embeddings"), 1 << 20) if length)
    idle = lookup + sum(map(count_parameters, other_layers)) + routed - round(routed * routed_share(text))
    return ModelSize(
        name=name,
        parameters=parameters,
        layers=len(layers),
        layer_parameters=max(map(count_parameters, layers)),
        output_parameters=output.numel(),
        linear_shapes=_linear_shapes([*layers, *other_layers]),
        active_parameters=parameters - idle,
        stacked_experts=stacked_experts(model),
        is_mixture=routed > 0,
        hidden=hidden,
        heads=heads,
        kv_heads=1 if compressed else kv_heads,
        kv_width=compressed + (_first_int(text, "qk_rope_head_dim") or 0) if compressed else 2 * key_width,
        window=_first_int(text, "sliding_window"),
        windowed_layers=sum("sliding" in str(kind) for kind in getattr(text, "layer_types", None) or ()),
        key_width=key_width,
        mlp_width=mlp_width,
        shares_prompts=attention.layout.shares_prompts,
        scores_width=heads * min(score_tokens or context, context) if stores_scores else 0,
        stored_width=stored_width,
        vocabulary=vocabulary_size(config),
        context=context,
        positions=_positions(text),
    )


def _attention(config: Any, device: Device) -> Attention:
    """Return the attention of a trained model, a cautious one for untested families."""
    from plad_dist.training.model.attention import attention_of  # not at the top: it imports torch
    from plad_dist.training.model.families import tested_support

    # A probe would take too long for a plan.
    support = tested_support(config) or "sequences"
    return attention_of(config, support, None, "flex" if device == "gpu" else "sdpa")


def _smaller_stack(model: Any) -> list[Any]:
    """Return the layers of the encoder or the decoder, of which those with fewer parameters."""
    stacks = (decoder_layers(stack)[1] for stack in (model.get_encoder(), model.get_decoder()))
    return min(stacks, key=lambda layers: sum(map(count_parameters, layers)))


def _linear_shapes(layers: list[Any]) -> tuple[tuple[int, int], ...]:
    from torch import nn

    return tuple(
        (int(module.in_features), int(module.out_features))
        for layer in layers
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    )


def _positions(text: Any) -> int | None:
    """Return the positions of a model as vLLM counts them.

    For some kinds of scaled rotary embeddings, the config gives the positions before scaling.
    """
    positions, rope = _first_int(text, "max_position_embeddings"), getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type")]
    scaled = [kind for kind in kinds if kind["rope_type"] not in ("su", "longrope", "llama3") and kind.get("factor")]
    if positions is None or not scaled or "gemma3" in text.model_type:
        return positions
    original = scaled[0].get("original_max_position_embeddings") if scaled[0]["rope_type"] == "yarn" else None
    return int((original or positions) * scaled[0]["factor"])


def _stored_width(config: Any) -> float | None:
    """Return the bytes per weight of a model that is published quantized, otherwise None."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    bits = settings.get("bits") or settings.get("w_bit")
    if isinstance(bits, int):
        return 1.15 * bits / 8
    return _QUANTIZED_WIDTHS.get(str(settings.get("quant_method")), 0.6)


def quantized_width(method: str) -> float:
    """Return the bytes per weight of a model that an engine quantizes by a method."""
    return next((width for name, width in _QUANTIZED_WIDTHS.items() if method.startswith(name)), 0.6)


def _first_int(config: Any, *names: str) -> int | None:
    """Return the first of several attributes that a config has as an integer."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
