"""Rows of an encoder-decoder: prompts for the encoder, and responses for the decoder.

The encoder reads each prompt once. The decoder reads each response after the token with which it
begins every response, and predicts all tokens of the response. A token of a response sees its own
response up to itself, and the prompt in a row of the encoder.

Example: one row with a group of the prompt ``p0 p1 p2`` and the responses ``a0 a1`` and ``b0``, in
which ``s`` is the token that begins a response::

    encoder row     p0   p1   p2
    decoder row     s    a0   s
    branch start    0    0    2
    predicts        a0   a1   b0

Models that count positions in indices of a row get a row for each prompt and each response instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plad_dist.training.batches.micro_batch import EncoderRows, Group, Layout
from plad_dist.training.batches.placement import RowPlacement
from plad_dist.training.batches.row_arrays import RowArrays


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of both stacks, as indices of the groups and of the responses of all groups.

    Attributes:
        encoder_rows: row of the encoder to which each row of the decoder attends.
    """

    groups: list[list[int]]
    responses: list[list[int]]
    encoder_rows: list[int]


def write_encoder_decoder(
    groups: Sequence[Group], placement: RowPlacement, layout: Layout, filler: int
) -> tuple[RowArrays, EncoderRows]:
    """Return the rows of the decoder and those of the encoder."""
    assert layout.decoder_start is not None
    rows = _rows(groups, placement, layout)
    encoder, bounds = _encoder(groups, rows, placement, filler)
    decoder = RowArrays.of(len(placement.rows), placement.width, filler, sum(len(group.responses) for group in groups))
    responses = [(number, response) for number, group in enumerate(groups) for response in group.responses]
    for row, indices in enumerate(rows.responses):
        start = 0
        for index in indices:
            number, response = responses[index]
            end = start + len(response)
            decoder.input_ids[row, start:end] = [layout.decoder_start, *response[:-1]]
            decoder.branch_starts[row, start:end] = start
            decoder.prompt_starts[row, start:end], decoder.prompt_ends[row, start:end] = bounds[number]
            decoder.predictors[index] = row * placement.width + np.arange(start, end)
            start = end
        # Padding sees padding, and the whole row of the encoder: without any key, a softmax is not
        # a number.
        decoder.branch_starts[row, start:] = start
        decoder.prompt_starts[row, start:], decoder.prompt_ends[row, start:] = 0, placement.encoder_width
    return decoder, encoder


def _rows(groups: Sequence[Group], placement: RowPlacement, layout: Layout) -> _Rows:
    numbers = [number for number, group in enumerate(groups) for _ in group.responses]
    if not layout.packs_rows:
        return _Rows([[number] for number in range(len(groups))], placement.rows, numbers)
    row_of = {number: row for row, members in enumerate(placement.rows) for number in members}
    responses: list[list[int]] = [[] for _ in placement.rows]
    for index, number in enumerate(numbers):
        responses[row_of[number]].append(index)
    return _Rows(placement.rows, responses, list(range(len(placement.rows))))


def _encoder(
    groups: Sequence[Group], rows: _Rows, placement: RowPlacement, filler: int
) -> tuple[EncoderRows, dict[int, tuple[int, int]]]:
    """Return the rows of the encoder, and where in its row the prompt of each group lies."""
    shape = len(rows.groups), placement.encoder_width
    input_ids = np.full(shape, filler, np.int64)
    starts, ends = np.zeros(shape, np.int32), np.full(shape, shape[1], np.int32)
    is_padding = np.ones(shape, bool)
    bounds = {}
    for row, members in enumerate(rows.groups):
        start = 0
        for number in members:
            prompt = groups[number].prompt
            end = start + len(prompt)
            input_ids[row, start:end] = prompt
            starts[row, start:end], ends[row, start:end] = start, end
            is_padding[row, start:end] = False
            bounds[number] = start, end
            start = end
        starts[row, start:] = start
    encoder = EncoderRows(
        input_ids_RE=torch.from_numpy(input_ids),
        starts_RE=torch.from_numpy(starts),
        ends_RE=torch.from_numpy(ends),
        is_padding_RE=torch.from_numpy(is_padding),
        rows_D=torch.tensor(rows.encoder_rows),
    )
    return encoder, bounds
