"""Packing of groups into rows: each prompt is computed once, and only the ends of rows are padded.

1. A group becomes a *piece*: its prompt, then each response without its last token, which predicts
   nothing. If the layout does not share prompts, every response becomes a piece with its own copy
   of the prompt.
2. The pieces are placed in rows (:mod:`~plad_dist.training.batches.placement`).
3. Every token gets its position id and the bounds of what it sees (the tree mask). A token of a
   response sees the prompt and its own response, no other response and no other group. The
   positions of a response continue from the end of the prompt. The log-likelihood of a response is
   therefore equal to that of its separate sequence.

Example: a row of 6 tokens with a piece of the prompt ``p0 p1`` and the responses ``a0 a1 a2`` and
``b0 b1``::

    index           0    1      2    3    4    5
    input id        p0   p1     a0   a1   b0   filler
    position id     0    1      2    3    2    0
    prompt start    0    0      0    0    0    -1
    prompt end      0    0      2    2    2    -1
    branch start    0    0      2    2    4    5
    predicts             a0 b0  a1   a2   b1

Encoder-decoders have other rows: see :mod:`~plad_dist.training.batches.encoder_rows`.

Shape suffixes: R rows, T tokens of a row, P pairs, A anchored responses.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plad_dist.training.batches.encoder_rows import write_encoder_decoder
from plad_dist.training.batches.micro_batch import Group, Layout, MicroBatch
from plad_dist.training.batches.placement import RowPlacement, place
from plad_dist.training.batches.row_arrays import RowArrays
from plad_dist.training.losses import Pairs

_DEFAULT_LAYOUT = Layout()


def collate(
    groups: Sequence[Group], filler: int, layout: Layout = _DEFAULT_LAYOUT, budget: int = sys.maxsize
) -> MicroBatch:
    """Pack groups into the rows of a micro-batch.

    Without groups, the micro-batch is a row of one `filler` token, which keeps the ranks in step.

    Args:
        filler: token id of the padding; it does not influence any log-likelihood.
        budget: most places of a micro-batch, which must be able to hold the groups.
    """
    is_empty = not groups
    groups = groups or [Group([filler], [[filler]])]
    placement = place(groups, layout, budget)
    encoder = None
    computed_pieces: list[tuple[int, tuple[int, ...]]] = []
    if layout.decoder_start is not None:
        arrays, encoder = write_encoder_decoder(groups, placement, layout, filler)
    else:
        arrays, computed_pieces = _write_pieces(groups, placement, layout, filler)
    responses = [response for group in groups for response in group.responses]
    lengths = [len(response) for response in responses]
    return MicroBatch(
        input_ids_RT=torch.from_numpy(arrays.input_ids),
        position_ids_RT=torch.from_numpy(arrays.position_ids),
        prompt_starts_RT=torch.from_numpy(arrays.prompt_starts),
        prompt_ends_RT=torch.from_numpy(arrays.prompt_ends),
        branch_starts_RT=torch.from_numpy(arrays.branch_starts),
        predictors_N=torch.from_numpy(np.concatenate(arrays.predictors)),
        targets_N=torch.from_numpy(np.concatenate([np.asarray(response, np.int64) for response in responses])),
        responses_N=torch.from_numpy(np.repeat(np.arange(len(responses)), lengths)),
        offsets_N=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        lengths_S=torch.tensor(lengths),
        initial_logps_S=_per_response(groups, [group.initial_logps for group in groups]),
        sampled_logps_S=_per_response(groups, [group.sampled_logps for group in groups]),
        pairs=_compared_pairs(groups),
        pieces=tuple(computed_pieces) if placement.is_piecewise else (),
        longest_response=max(lengths),
        groups=0 if is_empty else len(groups),
        tokens=0 if is_empty else sum(layout.tokens(group) for group in groups),
        tokens_unshared=0 if is_empty else sum(layout.tokens_unshared(group) for group in groups),
        encoder=encoder,
    )


# -- pieces


@dataclass(slots=True)
class _Piece:
    """A prompt and responses that share it, each response with its index in the micro-batch."""

    prompt: Sequence[int]
    responses: list[tuple[int, Sequence[int]]]

    @property
    def computed(self) -> tuple[int, ...]:
        """Computed tokens of each response: all but the last, which predicts nothing."""
        return tuple(len(response) - 1 for _, response in self.responses)

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(self.computed)


def _pieces(groups: Sequence[Group], layout: Layout) -> list[_Piece]:
    pieces: list[_Piece] = []
    first = 0  # index in the micro-batch of the group's first response
    for group in groups:
        responses = list(enumerate(group.responses, start=first))
        first += len(responses)
        if layout.shares_prompts:
            pieces.append(_Piece(group.prompt, responses))
        else:
            pieces += [_Piece(group.prompt, [response]) for response in responses]
    return pieces


# -- token arrays


def _write_pieces(
    groups: Sequence[Group], placement: RowPlacement, layout: Layout, filler: int
) -> tuple[RowArrays, list[tuple[int, tuple[int, ...]]]]:
    """Return the rows of all pieces, and the computed tokens of each piece's prompt and
    responses."""
    pieces = _pieces(groups, layout)
    arrays = RowArrays.of(len(placement.rows), placement.width, filler, sum(len(group.responses) for group in groups))
    for row, indices in enumerate(placement.rows):
        start = 0
        for index in indices:
            _write_piece(arrays, row, start, pieces[index])
            start += pieces[index].tokens
        arrays.branch_starts[row, start:] = start  # padding sees padding: without any key, a softmax is not a number
    return arrays, [(len(piece.prompt), piece.computed) for piece in pieces]


def _write_piece(arrays: RowArrays, row: int, start: int, piece: _Piece) -> None:
    prompt_tokens = len(piece.prompt)
    prompt_end, piece_end = start + prompt_tokens, start + piece.tokens
    arrays.input_ids[row, start:prompt_end] = piece.prompt
    arrays.position_ids[row, start:prompt_end] = np.arange(prompt_tokens)
    arrays.prompt_starts[row, start:piece_end] = start
    arrays.prompt_ends[row, start:prompt_end] = start
    arrays.prompt_ends[row, prompt_end:piece_end] = prompt_end
    arrays.branch_starts[row, start:prompt_end] = start
    branch = prompt_end
    for (index, response), computed in zip(piece.responses, piece.computed, strict=True):
        branch_end = branch + computed
        arrays.input_ids[row, branch:branch_end] = response[:-1]
        arrays.position_ids[row, branch:branch_end] = np.arange(prompt_tokens, prompt_tokens + computed)
        arrays.branch_starts[row, branch:branch_end] = branch
        # The prompt's last token predicts the first token of every response.
        in_row = np.concatenate([[prompt_end - 1], np.arange(branch, branch_end)])
        arrays.predictors[index] = row * arrays.input_ids.shape[1] + in_row
        branch = branch_end


# -- comparisons and figures


def _per_response(groups: Sequence[Group], values: Sequence[Sequence[float]]) -> Tensor:
    """Return one value for each response, NaN for groups without values."""
    rows = [row or [math.nan] * len(group.responses) for row, group in zip(values, groups, strict=True)]
    return torch.tensor([value for row in rows for value in row], dtype=torch.float32)


def _compared_pairs(groups: Sequence[Group]) -> Pairs:
    """Return the comparisons of all groups, with responses counted over the micro-batch."""
    indices: list[tuple[int, int, int, int]] = []
    score_gaps: list[float] = []
    anchored: list[tuple[int, int]] = []
    first = 0  # index in the micro-batch of the group's first response
    for number, group in enumerate(groups):
        for chosen, rejected, rank_gap in group.pairs:
            indices.append((first + chosen, first + rejected, number, rank_gap))
            score_gaps.append(group.scores[chosen] - group.scores[rejected] if group.scores else math.nan)
        anchored += [(first + response, number) for response in group.anchored]
        first += len(group.responses)
    indices_P4 = torch.tensor(indices, dtype=torch.int64).view(-1, 4)
    anchored_A2 = torch.tensor(anchored, dtype=torch.int64).view(-1, 2)
    return Pairs(
        chosen_P=indices_P4[:, 0],
        rejected_P=indices_P4[:, 1],
        group_P=indices_P4[:, 2],
        rank_gap_P=indices_P4[:, 3],
        score_gap_P=torch.tensor(score_gaps, dtype=torch.float32),
        anchored_A=anchored_A2[:, 0],
        group_A=anchored_A2[:, 1],
        groups=len(groups),
    )
