"""Attention of a model: the layout of rows in which its log-likelihoods are exact, and its masks.

Shape suffixes: R rows, T tokens of a row. Masks are ``[R, 1, T, T]``, with queries before keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plad_dist.errors import UserError
from plad_dist.training.batches.micro_batch import EncoderRows, Layout, MicroBatch, RowSupport
from plad_dist.training.model.tree_attention import FLEX_ATTENTION, TREE_ATTENTION, TreeMask

# Families whose changes of the scores FlexAttention makes as exactly, which a test on a GPU shows.
# transformers' FlexAttention rounds the sinks of gpt-oss to the data type of the model.
_SCORES_IN_FLEX = ("gemma2",)
_FLEX_ROW_TOKENS = 2048  # long rows cost no attention, because a block mask skips masked blocks
_FLEX_MASK_BLOCK = 128  # side of the blocks of a block mask; rows of whole blocks need fewer compiled kernels
_MIN_PIECE_TOKENS = 96  # average length from which attention calls for single pieces are faster than a dense mask


@dataclass(frozen=True)
class Attention:
    """Requirements of a model's attention.

    Attributes:
        layout: layout in which the log-likelihoods equal those of separate sequences.
        implementation: name of the implementation in transformers, None for its default.
        window: tokens that a layer with a sliding window sees, None if no layer has one.
        has_mask_per_layer_type: the model takes a dict with one mask for each type of layer.
        takes_mask: the model takes a complete mask. Otherwise it builds its own mask, which is
            right only for rows of one sequence.
        no_sharing_reason: reason for which responses do not share their prompt; None if they do.
    """

    layout: Layout
    implementation: str | None
    window: int | None = None
    has_mask_per_layer_type: bool = False
    takes_mask: bool = True
    no_sharing_reason: str | None = None


def attention_of(
    config: Any,
    support: RowSupport,
    max_group_tokens: int | None,
    implementation: Literal["auto", "sdpa", "flex"] = "auto",
) -> Attention:
    """Return the attention requirements of a model with a transformers config.

    Args:
        support: rows in which the model is exact, from
            :func:`~plad_dist.training.model.families.row_support`.
        max_group_tokens: most tokens that the model may compute for a group, None for no limit.
        implementation: `auto` is FlexAttention on a CUDA device, otherwise SDPA piece by piece.
    """
    if config.is_encoder_decoder:
        return _encoder_decoder_attention(config, support)
    if support == "sequences":
        layout = Layout(shares_prompts=False, packs_rows=False)
        reason = f"{config.model_type} models are exact only with one sequence in each row"
        return Attention(layout, None, takes_mask=False, no_sharing_reason=reason)
    if config.model_type == "gpt_neo":
        return _gpt_neo_attention(config, max_group_tokens)
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    if layer_types and "sliding_attention" not in layer_types:
        window = None
    wants_flex = implementation == "flex" or (implementation == "auto" and torch.cuda.is_available())
    if wants_flex and (support == "tree" or config.model_type in _SCORES_IN_FLEX):
        name, layout = FLEX_ATTENTION, Layout(row_tokens=_FLEX_ROW_TOKENS, row_multiple=_FLEX_MASK_BLOCK)
    elif support == "scores":
        name, layout = "eager", Layout()
    elif implementation == "auto":
        name, layout = TREE_ATTENTION, Layout(min_piece_tokens=_MIN_PIECE_TOKENS)
    else:
        name, layout = "sdpa", Layout()
    return Attention(layout, name, window=window, has_mask_per_layer_type=bool(layer_types))


def _encoder_decoder_attention(config: Any, support: RowSupport) -> Attention:
    """Return the attention of an encoder-decoder, whose responses always share their prompt."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise UserError(
            f"{config.model_type}: the config of the model has no decoder_start_token_id, the token with which its "
            "decoder begins a response; add it to its config.json"
        )
    packs_rows = support != "sequences"
    layout = Layout(packs_rows=packs_rows, decoder_start=int(start))
    return Attention(layout, "sdpa" if packs_rows else None, takes_mask=packs_rows)


def _gpt_neo_attention(config: Any, max_group_tokens: int | None) -> Attention:
    """Return the attention of GPT-Neo.

    Its local layers count their window in indices of the row, not in positions. In a row longer
    than the window, a response would lose a part of its prompt.
    """
    has_local_layers = "local" in config.attention_layers
    if has_local_layers and (max_group_tokens is None or max_group_tokens > config.window_size):
        layout = Layout(shares_prompts=False, max_row_tokens=config.max_position_embeddings)
        reason = (
            f"local layers see {config.window_size} tokens of a row, but training.max_group_tokens allows longer groups"
        )
        return Attention(layout, "eager", no_sharing_reason=reason)
    row_limit = config.window_size if has_local_layers else config.max_position_embeddings
    return Attention(Layout(max_row_tokens=row_limit), "eager")


def check_rope(config: Any, context: int, key: str) -> None:
    """Raise :class:`UserError` if the rotary embedding of a sequence would depend on its batch.

    Args:
        context: most tokens of a sequence.
        key: config section of the model, for the message.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    ropes = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # or one for each type of layer
    for rope in ropes:
        kind = rope.get("rope_type") or rope.get("type")
        named = (rope.get("original_max_position_embeddings"), getattr(text, "original_max_position_embeddings", None))
        original = next((length for length in named if length), getattr(text, "max_position_embeddings", context))
        if kind not in ("dynamic", "longrope") or context <= original:
            continue
        raise UserError(
            f"{key}: the rotary embedding ({kind}) changes with the longest sequence of a batch, so the likelihood of "
            f"a sequence would depend on the rest of its batch; set {key}.max_length to at most {original}"
        )


def attention_masks(batch: MicroBatch, attention: Attention, dtype: torch.dtype) -> Any:
    """Return the `attention_mask` of a base model: a mask, a dict of masks by layer type, or None.

    Args:
        dtype: dtype of the hidden states.
    """
    if not attention.takes_mask:
        return None
    build: Callable[[MicroBatch, int | None], Any]
    if attention.implementation == FLEX_ATTENTION:
        build = _block_mask
    elif batch.pieces:
        build = TreeMask
    else:
        build = _additive_mask_builder(dtype) if attention.implementation == "eager" else _dense_mask
    if not attention.has_mask_per_layer_type:
        return build(batch, attention.window)
    masks = {"full_attention": build(batch, None)}
    if attention.window is not None:
        masks["sliding_attention"] = build(batch, attention.window)
    return masks


@dataclass(frozen=True)
class EncoderDecoderMasks:
    """Masks of an encoder-decoder, True where a query sees a key.

    For packed rows they are complete: ``[R, 1, T, T]``, with queries before keys. Otherwise those
    of `encoder` and `cross` are ``[R, T]``, True for keys that are no padding, and the decoder
    builds its own.
    """

    encoder: Tensor
    decoder: Tensor | None
    cross: Tensor


def encoder_decoder_masks(batch: MicroBatch, encoder: EncoderRows, attention: Attention) -> EncoderDecoderMasks:
    """Return the masks of a micro-batch with an encoder."""
    if not attention.takes_mask:
        is_token_RE = ~encoder.is_padding_RE
        return EncoderDecoderMasks(is_token_RE.long(), None, is_token_RE[encoder.rows_D].long())
    tokens, keys = batch.input_ids_RT.shape[1], encoder.input_ids_RE.shape[1]
    index_T, index_E = (torch.arange(count, device=batch.input_ids_RT.device) for count in (tokens, keys))
    return EncoderDecoderMasks(
        _between(index_E, encoder.starts_RE, encoder.ends_RE)[:, None],
        _between(index_T, batch.branch_starts_RT, index_T.expand_as(batch.branch_starts_RT) + 1)[:, None],
        _between(index_E, batch.prompt_starts_RT, batch.prompt_ends_RT)[:, None],
    )


def _between(keys: Tensor, starts_RT: Tensor, ends_RT: Tensor) -> Tensor:
    """Return True ``[R, T, keys]`` where a key lies in the range of the query."""
    return (keys >= starts_RT[..., None]) & (keys < ends_RT[..., None])


def _dense_mask(batch: MicroBatch, window: int | None) -> Tensor:
    """Return the boolean mask ``[R, 1, T, T]``, True where a query sees a key."""
    rows, tokens = batch.input_ids_RT.shape
    row = torch.arange(rows, device=batch.input_ids_RT.device)[:, None, None]
    index = torch.arange(tokens, device=batch.input_ids_RT.device)
    return _tree_rule(batch, window)(row, 0, index[None, :, None], index[None, None, :])[:, None]


def _additive_mask_builder(dtype: torch.dtype) -> Callable[[MicroBatch, int | None], Tensor]:
    """Return a builder of masks that eager implementations add to their scores."""

    def additive_mask(batch: MicroBatch, window: int | None) -> Tensor:
        is_visible = _dense_mask(batch, window)
        return torch.zeros_like(is_visible, dtype=dtype).masked_fill_(~is_visible, torch.finfo(dtype).min)

    return additive_mask


def _block_mask(batch: MicroBatch, window: int | None) -> Any:
    """Return the block mask for FlexAttention.

    The mask has blocks of 128 queries by 128 keys. The kernel skips a block in which no query sees
    a key. It computes the other blocks in tiles of 64 by 64, which
    :mod:`~plad_dist.training.model.tree_attention` sets.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    rows, tokens = batch.input_ids_RT.shape
    return create_block_mask(
        _tree_rule(batch, window), B=rows, H=None, Q_LEN=tokens, KV_LEN=tokens, device=batch.input_ids_RT.device.type
    )


def _tree_rule(batch: MicroBatch, window: int | None) -> Any:
    """Return the rule of the tree mask as a function of row, head, query and key.

    The function returns True if the query sees the key. FlexAttention takes it in this form. It
    reads only what depends on the query, so a kernel reads that once for a block of keys.
    """
    prompt_starts, prompt_ends, branch_starts = batch.prompt_starts_RT, batch.prompt_ends_RT, batch.branch_starts_RT

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        prompt_start, prompt_end = prompt_starts[row, query], prompt_ends[row, query]
        branch_start = branch_starts[row, query]
        in_branch = (key >= branch_start) & (key <= query)
        in_prompt = (key >= prompt_start) & (key < prompt_end)
        if window is not None:
            # In positions, a branch starts where the prompt ends.
            in_branch = in_branch & (query - key < window)
            in_prompt = in_prompt & (query - branch_start + prompt_end - key < window)
        return in_branch | in_prompt

    return sees
