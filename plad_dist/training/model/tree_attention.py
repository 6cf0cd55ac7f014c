"""Attention under the tree mask: FlexAttention on a GPU, SDPA piece by piece elsewhere.

FlexAttention skips the masked blocks of a block mask.

Piece by piece, nothing masked and no padding is computed. All pieces are in one row. The prompt of
a piece attends causally to itself. Its responses attend to the prompt and to themselves. A dense
mask over rows as wide as the longest piece would cost a multiple of that.

Shapes: H heads, T tokens of the row, D head dimension.
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

from plad_dist.training.batches.micro_batch import MicroBatch

TREE_ATTENTION, FLEX_ATTENTION = "plad_tree", "plad_flex"
# Tiles of the kernel, which subdivide the blocks of 128 by 128 of a block mask. FlexAttention's own
# choice has twice the side and spills registers while it evaluates a mask. On an H200, a forward
# pass of 10 rows of 1,792 tokens, 32 heads of dimension 64 and 4 key-value heads takes 0.27 ms with
# these tiles, and 0.92 ms with FlexAttention's.
_KERNEL_TILES = {"BLOCK_M": 64, "BLOCK_N": 64}
_MAX_TILED_HEAD = 128  # head dimension; for wider heads, FlexAttention's own tiles are no larger than these


class TreeMask(BlockMask):
    """Pieces of a micro-batch's row, passed to the model in place of a mask.

    It is a BlockMask because models pass masks of that class to the attention unchanged.

    Args:
        window: tokens that a token sees, itself included; None for all before it.

    Attributes:
        pieces: for each piece, the tokens of the prompt, the tokens of the whole piece, the mask of
            the prompt (None if it is causal), and the mask of the responses.
    """

    def __init__(self, batch: MicroBatch, window: int | None) -> None:
        self._width = batch.input_ids_RT.shape[1]
        self.pieces = [
            (prompt, prompt + sum(responses), _prompt_mask(prompt, window), _responses_mask(prompt, responses, window))
            for prompt, responses in batch.pieces
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1, self._width, self._width)


def _prompt_mask(prompt: int, window: int | None) -> Tensor | None:
    if window is None or prompt <= window:
        return None
    causal = torch.ones(prompt, prompt, dtype=torch.bool).tril_()
    return causal.triu_(1 - window)


def _responses_mask(prompt: int, responses: tuple[int, ...], window: int | None) -> Tensor:
    """Return the mask from the tokens of all responses to the tokens of the piece.

    A token of a response sees the prompt and the tokens up to itself in its own response.
    """
    mask = torch.zeros(sum(responses), prompt + sum(responses), dtype=torch.bool)
    start = 0
    for length in responses:
        end = start + length
        is_visible = torch.ones(length, prompt + length, dtype=torch.bool).tril_(prompt)
        if window is not None:
            is_visible.triu_(prompt + 1 - window)
        mask[start:end, :prompt] = is_visible[:, :prompt]
        mask[start:end, prompt + start : prompt + end] = is_visible[:, prompt:]
        start = end
    return mask


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TreeMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention piece by piece, as transformers calls attention functions.

    A mask other than a :class:`TreeMask` goes to transformers' SDPA attention.

    Args:
        query: ``[1, H, T, D]``; `key` and `value` may have fewer heads.

    Returns:
        The output ``[1, T, H, D]``, and None for the attention weights.
    """
    if not isinstance(attention_mask, TreeMask):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
        return output, None
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    # Split once: the gradient of each slice of a whole tensor would be as large as the whole.
    pieces = attention_mask.pieces
    query_sizes = [size for prompt, tokens, *_ in pieces for size in (prompt, tokens - prompt)]
    queries = iter(query.split(query_sizes, dim=2))
    piece_sizes = [tokens for _, tokens, *_ in pieces]
    outputs = []
    for (prompt, tokens, prompt_mask, responses_mask), keys, values in zip(
        pieces, key.split(piece_sizes, dim=2), value.split(piece_sizes, dim=2), strict=True
    ):
        prompt_queries, response_queries = next(queries), next(queries)
        prompt_keys, prompt_values = keys[:, :, :prompt], values[:, :, :prompt]
        is_causal = prompt_mask is None
        outputs.append(
            scaled_dot_product_attention(
                prompt_queries, prompt_keys, prompt_values, prompt_mask, is_causal=is_causal, scale=scaling
            )
        )
        if tokens > prompt:
            outputs.append(scaled_dot_product_attention(response_queries, keys, values, responses_mask, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def flex_tree_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute FlexAttention under a block mask, as transformers calls attention functions."""
    # Kernels differ with and without gradients, with windows, and with one row. Beyond the default
    # limit of 8 kernels, all further calls would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    tiles = _KERNEL_TILES if query.shape[-1] <= _MAX_TILED_HEAD else None
    output: tuple[Tensor, Tensor | None] = flex_attention_forward(
        module, query, key, value, attention_mask, kernel_options=tiles, **options
    )
    return output


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionInterface.register(FLEX_ATTENTION, flex_tree_attention)
