"""Probe of a model family: in which rows a small random model of its kind is exact.

The small model has the config of the real one with few layers, narrow ones where the family allows
it, few experts and a vocabulary of 64. Windows and chunks are shorter than the sequences of the
probe. It computes packed rows under each attention, and separate sequences, in float64. The first
attention with equal log-likelihoods and gradients is taken.

Shape suffixes: S responses, T tokens of a response, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plad_dist.data.models import model_class
from plad_dist.errors import UserError, first_line
from plad_dist.training.batches.micro_batch import Group, Layout, RowSupport, single_pair
from plad_dist.training.batches.packing import collate
from plad_dist.training.model.attention import attention_of
from plad_dist.training.model.balance import KEY, ExpertBalance
from plad_dist.training.model.experts import is_mixture, route_in_float32
from plad_dist.training.model.meta import build_without_weights, count_parameters
from plad_dist.training.model.policy import Policy, disable_dropout
from plad_dist.training.model.tree_attention import TREE_ATTENTION

logger = logging.getLogger("plad")

_VOCABULARY = 64
# Of the longest row, so that padding, windows and chunks are all within it.
_GROUPS = (
    single_pair([5, 6, 7, 8], [9, 10, 2], [11, 2]),
    Group(list(range(3, 24)), [list(range(24, 38)), [40, 41, 2], [42]], pairs=[(0, 1, 1)]),
)
# Relative. The trainer's log-softmax is in float32, everything else in float64.
_LOGPS_TOLERANCE, _GRADIENTS_TOLERANCE = 5e-6, 2e-5
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_FURTHER_STACKS = ("num_decoder_layers", "encoder_layers", "decoder_layers")  # of encoder-decoders
_MOST_LAYERS = 8
_MOST_PARAMETERS = 1 << 28  # of a small model; two copies with gradients take 8 GiB
_SMALL_VALUES = {
    "sliding_window": 7, "attention_chunk_size": 7, "keep_window_size": 7, "local_attention": 7, "index_topk": 7,
    "floor_scale": 4, "vocab_size": _VOCABULARY, "vocab_size_per_layer_input": _VOCABULARY, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1,
}  # fmt: skip
_NARROW_MLP = {
    "intermediate_size": 48, "intermediate_size_mlp": 48, "moe_intermediate_size": 16, "ffn_dim": 48, "n_inner": 48,
    "d_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
_NARROW_MIXERS = {
    "word_embed_proj_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_d_ssm": 64,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_chunk_size": 16, "chunk_size": 16,
}  # fmt: skip
_HEADS = 4
_results: dict[str, RowSupport] = {}


def probe(config: Any, *, remote: bool) -> RowSupport:
    """Return in which rows a model of this config is exact.

    Args:
        config: transformers config of the model, which may be of any size.
        remote: the model may run code of its repository.

    Raises:
        UserError: no small model of the family can be run, or its log-likelihoods differ from the
            plain model's even for single sequences, so training would optimise another objective
            than the configured one.
    """
    key = json.dumps([type(config).__qualname__, config.to_dict()], sort_keys=True, default=str)
    if key not in _results:
        _results[key] = _probe(config, remote)
        logger.info("%s models are not among the tested ones: a probe found %s", config.model_type, _results[key])
    return _results[key]


def _probe(config: Any, remote: bool) -> RowSupport:
    exact = _first_that_runs(config, remote)
    supports: tuple[RowSupport, ...] = ("tree", "scores", "sequences")
    for support in supports:
        if exact.agrees(support):
            return support
    raise UserError(
        f"{config.model_type} models cannot be trained: the log-likelihoods of a small model differ from the "
        "trainer's even with one sequence in each row; its output layer is not a plain one, or its attention is not "
        "causal"
    )


def check_balance(config: Any, *, remote: bool) -> None:
    """Raise :class:`UserError` if no auxiliary loss can balance the experts of a model.

    A small model of the family shows if the loss reaches every router. Models that cannot be built
    are not checked here.
    """
    try:
        model = build_without_weights(copy.deepcopy(config), remote=remote)
    except Exception:  # noqa: BLE001 - model families raise all kinds of errors, which other checks report
        return
    if not is_mixture(model):
        raise UserError(f"{KEY}: {config.model_type} models of this config have no experts to choose from; set 0")
    route_in_float32(model)
    ExpertBalance(model, 1.0)
    small = _first_that_runs(config, remote).built(None)
    if is_mixture(small) and not _balance_reaches_routers(small):
        raise UserError(f"{KEY}: does not reach the routers of {config.model_type} models; set 0")


def _balance_reaches_routers(model: Any) -> bool:
    """Return True if every router gets a gradient from the auxiliary loss alone."""
    route_in_float32(model)
    balance = ExpertBalance(model, 1.0)
    attention = attention_of(model.config, "sequences", None, "sdpa")
    batch = collate(_GROUPS, filler=0, layout=attention.layout)
    balance.begin(batch, 1.0)
    _gradients(model, Policy(model, attention)(batch) * 0.0)
    return all(any(p.grad is not None and p.grad.any() for p in router.parameters()) for router in balance.routers)


def _first_that_runs(config: Any, remote: bool) -> _Exact:
    problem = ""
    try:
        for smaller in _smaller_configs(config):
            try:
                return _Exact(smaller, remote)
            except Exception as error:  # noqa: BLE001 - a width that the family does not allow raises any type
                problem = first_line(error)
    except Exception as error:  # noqa: BLE001 - config classes refuse values with errors of their own
        problem = problem or first_line(error)
    raise UserError(
        f"{config.model_type} models cannot be trained: a small model of the family cannot be run: {problem}"
    )


class _Exact:
    """A small model, with the log-likelihoods and gradients of separate sequences."""

    def __init__(self, config: Any, remote: bool) -> None:
        self._config, self._remote = config, remote
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _build(config, None, remote)
            with torch.no_grad():
                for parameter in model.parameters():  # none is zero, so that every part counts
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        self._state = model.state_dict()
        logps_S = _plain_logps(model, _GROUPS)
        self._logps_S, self._grads = logps_S.detach(), _gradients(model, logps_S)

    def built(self, implementation: str | None) -> Any:
        """Return a copy of the model with an implementation of attention."""
        model = _build(self._config, implementation, self._remote)
        model.load_state_dict(self._state)
        return model

    def agrees(self, support: RowSupport) -> bool:
        """Return True if rows of this kind have the same log-likelihoods and gradients.

        The attention does not depend on the devices of this machine. For "tree" it is computed
        piece by piece: a family that takes the pieces also takes FlexAttention's masks, which are
        of the same class.
        """
        attention = attention_of(self._config, support, None, "sdpa")
        if attention.implementation == "sdpa" and not self._config.is_encoder_decoder:
            attention = replace(attention, implementation=TREE_ATTENTION, layout=Layout(min_piece_tokens=1))
        try:
            model = self.built(attention.implementation)
            route_in_float32(model)
            logps_S = Policy(model, attention)(collate(_GROUPS, filler=0, layout=attention.layout))
            grads = _gradients(model, logps_S)
        except Exception as error:  # noqa: BLE001 - a mask that the family does not take raises anything
            logger.info("%s models, probed for %s: %s", self._config.model_type, support, first_line(error))
            return False
        largest = max(float(grad.abs().max()) for grad in self._grads.values())
        return bool(((logps_S - self._logps_S).abs() <= _LOGPS_TOLERANCE * self._logps_S.abs()).all()) and all(
            name in grads
            and (grads[name] - grad).abs().max() <= _GRADIENTS_TOLERANCE * max(grad.abs().max(), 1e-3 * largest)
            for name, grad in self._grads.items()
        )


def _build(config: Any, implementation: str | None, remote: bool) -> Any:
    parameters = count_parameters(build_without_weights(copy.deepcopy(config), remote=remote))
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"it cannot be made small: it has {parameters:,} parameters with {_VOCABULARY} tokens")
    return model_class(config).from_config(
        copy.deepcopy(config),
        dtype=torch.float64,
        attn_implementation=implementation,
        trust_remote_code=remote,
    )


def _gradients(model: Any, logps_S: Tensor) -> dict[str, Tensor]:
    weights_S = torch.linspace(-1, 1, len(logps_S), dtype=logps_S.dtype)
    (logps_S * weights_S).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _plain_logps(model: Any, groups: Sequence[Group]) -> Tensor:
    """Return the log-likelihood of each response, from a forward pass of its separate sequence."""
    logps = []
    for group in groups:
        for response in group.responses:
            logits_TV = _plain_logits(model, group.prompt, response)
            logps.append(logits_TV.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(logps)


def _plain_logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Return the logits ``[T, V]`` of the tokens of a response."""
    if model.config.is_encoder_decoder:
        decoder_ids = [model.config.decoder_start_token_id, *response[:-1]]
        output = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoder_ids]), use_cache=False)
        logits_TV: Tensor = output.logits[0]
        return logits_TV
    logits_TV = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
    return logits_TV[len(prompt) - 1 : -1]


# -- small configs


def _smaller_configs(config: Any) -> Iterator[Any]:
    """Yield small configs, each wider than the one before, for families that forbid its widths."""
    wide = copy.deepcopy(disable_dropout(copy.deepcopy(config)))
    if hasattr(wide, "quantization_config"):
        del wide.quantization_config
    text = wide.get_text_config()
    text._experts_implementation = "eager"  # the others have no float64
    _set_existing(text, _SMALL_VALUES)
    if hasattr(text, "initializer_range"):
        text.initializer_range = 0.2  # so that soft caps matter
    _keep_layers(text)
    _set_existing(text, dict.fromkeys(_FURTHER_STACKS, 2))
    for name in getattr(wide, "sub_configs", ()):  # towers for images and sounds
        if (tower := getattr(wide, name, None)) is not None and tower is not text:
            _keep_layers(tower)
    narrow_mlp = copy.deepcopy(wide)
    _set_existing(narrow_mlp.get_text_config(), _NARROW_MLP)
    narrow = copy.deepcopy(narrow_mlp)
    _narrow(narrow.get_text_config())
    yield from (narrow, narrow_mlp, wide)


def _set_existing(text: Any, values: dict[str, int]) -> None:
    for name, value in values.items():
        if vars(text).get(name) is not None:
            setattr(text, name, value)


def _narrow(text: Any) -> None:
    """Narrow the layers. Heads keep their dimension, which rotary embeddings depend on."""
    _set_existing(text, _NARROW_MIXERS)
    heads_name = _first_name(text, "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden_name = _first_name(text, "hidden_size", "n_embd", "d_model")
    if heads_name is None or hidden_name is None:
        return
    heads, hidden = getattr(text, heads_name), getattr(text, hidden_name)
    setattr(text, heads_name, _HEADS)
    if kv_heads := vars(text).get("num_key_value_heads"):
        text.num_key_value_heads = max(1, _HEADS * kv_heads // heads)
    setattr(text, hidden_name, 32 if vars(text).get("head_dim") else _HEADS * hidden // heads)


def _first_name(text: Any, *names: str) -> str | None:
    """Return the first name of an attribute that a config has with a value."""
    return next((name for name in names if vars(text).get(name)), None)


def _keep_layers(text: Any) -> None:
    """Keep a layer of every kind, by the lists of the config that have an entry for each layer."""
    name = _first_name(text, *_LAYER_COUNTS)
    if name is None:
        return
    count = getattr(text, name)
    lists = {
        key: value for key, value in vars(text).items() if isinstance(value, (list, tuple)) and len(value) == count > 1
    }
    kinds = [tuple(str(values[layer]) for values in lists.values()) for layer in range(count)]
    first_of_kind = sorted({kinds.index(kind) for kind in kinds})[:_MOST_LAYERS]
    kept = sorted({*first_of_kind, *range(min(2, count))})
    setattr(text, name, len(kept))
    for key, values in lists.items():
        setattr(text, key, [values[layer] for layer in kept])
