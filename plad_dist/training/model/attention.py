"""How a model attends: in which layouts of a row its log-likelihoods are exact, and the masks that it takes.

Shapes: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plad_dist.errors import UserError
from plad_dist.training.batches.packing import Layout, MicroBatch
from plad_dist.training.model.tree_attention import FLEX_ATTENTION, TREE_ATTENTION, TreeMask

# Models whose layers take a ready mask and place tokens by their position ids alone: a tree mask is exact.
_BY_POSITION = (
    "cohere", "gemma", "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "opt", "qwen2", "qwen3",
)  # fmt: skip
_FLEX_ROW_TOKENS = 2048  # a block mask skips what is masked, so long rows cost no attention
_PIECE_TOKENS = 96  # for which a piece is worth calls of its own
_FLEX_BLOCK = 128  # it masks blocks of so many places; rows of whole blocks need fewer compiled kernels


@dataclass(frozen=True)
class Attention:
    """What a model's attention needs.

    Attributes:
        layout: in which its log-likelihoods are those of the sequences standing alone.
        implementation: as transformers names it, None for its own choice.
        window: tokens that layers with a sliding window see, None where no layer has one.
        by_layer: the model takes one mask for each kind of layer.
        ready: it takes a ready mask; otherwise it makes its own, of rows that hold one sequence each.
        why: why responses do not share their prompt; None where they do.
    """

    layout: Layout
    implementation: str | None
    window: int | None = None
    by_layer: bool = False
    ready: bool = True
    why: str | None = None


def attention_of(config: Any, longest: int | None, wanted: Literal["auto", "sdpa", "flex"] = "auto") -> Attention:
    """How a model with a transformers config attends.

    Args:
        longest: most tokens of a group, None for any.
        wanted: implementation; auto is flex on a CUDA device and SDPA piece by piece elsewhere.
    """
    family = config.model_type
    if family == "gpt_neo":
        return _gpt_neo(config, longest)
    if family not in _BY_POSITION:
        layout = Layout(shares=False, packs=False)
        return Attention(layout, None, ready=False, why=f"the masks of {family} models are their own")
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        layout = Layout(shares=False, packs=False)
        return Attention(
            layout, None, ready=False, why=f"its layers attend in their own ways: {', '.join(sorted(kinds))}"
        )
    window = getattr(config, "sliding_window", None)
    if kinds and "sliding_attention" not in kinds:
        window = None
    flex = wanted == "flex" or (wanted == "auto" and torch.cuda.is_available())
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    piecewise = not flex and not softcap and wanted == "auto"
    implementation = FLEX_ATTENTION if flex else "eager" if softcap else TREE_ATTENTION if piecewise else "sdpa"
    layout = (
        Layout(row_tokens=_FLEX_ROW_TOKENS, multiple=_FLEX_BLOCK)
        if flex
        else Layout(piecewise=_PIECE_TOKENS if piecewise else None)
    )
    return Attention(layout, implementation, window=window, by_layer=bool(kinds))


def _gpt_neo(config: Any, longest: int | None) -> Attention:
    """Its local layers count the window in places of the row, not in positions: a branch would lose its prompt."""
    local = "local" in config.attention_layers
    if local and (longest is None or longest > config.window_size):
        layout = Layout(shares=False, longest_row=config.max_position_embeddings)
        why = (
            f"its local layers see {config.window_size} places of a row; training.max_group_tokens allows longer groups"
        )
        return Attention(layout, "eager", why=why)
    return Attention(Layout(longest_row=config.window_size if local else config.max_position_embeddings), "eager")


def check_rope(config: Any, context: int, key: str) -> None:
    """Raise :class:`UserError` where a sequence's positions would depend on what else is in the batch."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in ("dynamic", "longrope"):
        return
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    original = original or text.max_position_embeddings
    if context > original:
        raise UserError(
            f"{key}: its rotary embedding ({kind}) changes with the longest sequence of a batch, so that a sequence's "
            f"likelihood would depend on its neighbours. Set {key}.max_length to at most {original}."
        )


def masks_of(batch: MicroBatch, attention: Attention, dtype: torch.dtype) -> Any:
    """The `attention_mask` for a model's base: a mask, one for each kind of layer, or None.

    Args:
        dtype: of the hidden states.
    """
    if not attention.ready:
        return None
    make: Callable[[MicroBatch, int | None], Any]
    if attention.implementation == FLEX_ATTENTION:
        make = _block_mask
    elif batch.pieces:
        make = TreeMask
    else:
        make = _additive(dtype) if attention.implementation == "eager" else _dense_mask
    if not attention.by_layer:
        return make(batch, attention.window)
    masks = {"full_attention": make(batch, None)}
    if attention.window is not None:
        masks["sliding_attention"] = make(batch, attention.window)
    return masks


def _dense_mask(batch: MicroBatch, window: int | None) -> Tensor:
    """Which place sees which: boolean ``[R, 1, T, T]``, True where attention is allowed."""
    places = torch.arange(batch.input_ids_RT.shape[1], device=batch.input_ids_RT.device)
    rows = torch.arange(batch.input_ids_RT.shape[0], device=batch.input_ids_RT.device)
    return _sees(batch, window)(rows[:, None, None], 0, places[None, :, None], places[None, None, :])[:, None]


def _additive(dtype: torch.dtype) -> Any:
    """The mask as eager implementations add it to their scores."""

    def make(batch: MicroBatch, window: int | None) -> Tensor:
        allowed = _dense_mask(batch, window)
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)

    return make


def _block_mask(batch: MicroBatch, window: int | None) -> Any:
    """The mask for FlexAttention, which skips blocks of 128 by 128 places that are masked throughout."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, places = batch.input_ids_RT.shape
    return create_block_mask(
        _sees(batch, window), B=rows, H=None, Q_LEN=places, KV_LEN=places, device=batch.input_ids_RT.device.type
    )


def _sees(batch: MicroBatch, window: int | None) -> Any:
    """The rule of the tree mask, in the form that FlexAttention takes: (row, head, query, key) to allowed or not.

    What it reads depends on the query alone, so that a kernel reads it once for a block of keys.
    """
    begins, ends, branches = batch.begins_RT, batch.ends_RT, batch.branches_RT

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        begin, end, branch = begins[row, query], ends[row, query], branches[row, query]
        own = (key >= branch) & (key <= query)
        prompt = (key >= begin) & (key < end)
        if window is not None:  # in a branch, positions go on where the prompt ended
            own = own & (query - key < window)
            prompt = prompt & (query - branch + end - key < window)
        return own | prompt

    return sees
