"""Attention over the tree mask: with FlexAttention on a GPU, elsewhere piece by piece with SDPA.

FlexAttention skips blocks of 128 by 128 places that are masked throughout.

Piece by piece, nothing masked and no padding is computed. All groups lie in one row. Of each, the prompt attends causally to itself, and its responses to the prompt and themselves. A dense
mask over rows as wide as the longest group would cost a multiple of that.

Shapes: H heads, T tokens of the row, D of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from plad_dist.training.batches.packing import MicroBatch

TREE_ATTENTION, FLEX_ATTENTION = "plad_tree", "plad_flex"
# Half of what FlexAttention takes by itself: under a mask that is evaluated, larger ones spill registers (on an H200, a forward of
# 10 rows of 1,792 tokens, 32 heads of 64 and 4 key-value heads: 0.27 ms and 0.92 ms).
_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64}
_WIDEST_HEAD = 128  # with them; FlexAttention's own choice for wider heads is no larger


class TreeMask(BlockMask):
    """The pieces of a micro-batch's row, in the place of a mask. Models hand it on untouched, as they do FlexAttention's.

    Args:
        window: tokens that a token sees, itself included, None for all before it.

    Attributes:
        pieces: tokens of the prompt and of the whole piece, and the masks of the two calls; None where it is causal.
    """

    def __init__(self, batch: MicroBatch, window: int | None) -> None:
        self._width = batch.input_ids_RT.shape[1]
        self.pieces = [
            (prompt, prompt + sum(inner), _prompt_mask(prompt, window), _responses_mask(prompt, inner, window))
            for prompt, inner in batch.pieces
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1, self._width, self._width)


def _prompt_mask(prompt: int, window: int | None) -> Tensor | None:
    if window is None or prompt <= window:
        return None
    causal = torch.ones(prompt, prompt, dtype=torch.bool).tril_()
    return causal.triu_(1 - window)


def _responses_mask(prompt: int, inner: tuple[int, ...], window: int | None) -> Tensor:
    """Which tokens of the piece the responses' tokens see: the prompt, and what is before them in their own response."""
    mask = torch.zeros(sum(inner), prompt + sum(inner), dtype=torch.bool)
    at = 0
    for length in inner:
        sees = torch.ones(length, prompt + length, dtype=torch.bool).tril_(prompt)
        if window is not None:
            sees.triu_(prompt + 1 - window)
        mask[at : at + length, :prompt] = sees[:, :prompt]
        mask[at : at + length, prompt + at : prompt + at + length] = sees[:, prompt:]
        at += length
    return mask


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TreeMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of ``[1, H, T, D]`` as transformers calls it; an ordinary mask goes to its SDPA.

    Returns ``[1, T, H, D]``.
    """
    if not isinstance(attention_mask, TreeMask):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)
        return out, None
    copies = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, copies), repeat_kv(value, copies)
    # Split once: the gradients of slices of the whole would each be as large as the whole.
    pieces = attention_mask.pieces
    parts = iter(query.split([size for prompt, tokens, *_ in pieces for size in (prompt, tokens - prompt)], dim=2))
    sizes = [tokens for _, tokens, *_ in pieces]
    found = []
    for (prompt, tokens, first, second), keys, values in zip(
        pieces, key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True
    ):
        of_prompt, of_responses = next(parts), next(parts)
        found.append(
            scaled_dot_product_attention(
                of_prompt, keys[:, :, :prompt], values[:, :, :prompt], first, is_causal=first is None, scale=scaling
            )
        )
        if tokens > prompt:
            found.append(scaled_dot_product_attention(of_responses, keys, values, second, scale=scaling))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def flex_tree_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention under a block mask, as transformers calls it."""
    # Kernels differ with and without gradients, with windows, with one row: at the limit of 8 a call would go uncompiled from then on.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    blocks = _BLOCKS if query.shape[-1] <= _WIDEST_HEAD else None
    found: tuple[Tensor, Tensor | None] = flex_attention_forward(
        module, query, key, value, attention_mask, kernel_options=blocks, **options
    )
    return found


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionInterface.register(FLEX_ATTENTION, flex_tree_attention)
