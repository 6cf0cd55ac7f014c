"""Groups, row layouts and micro-batches: the data of one forward pass.

A group is a prompt with its responses. :func:`~plad_dist.training.batches.packing.collate` packs
groups into the rows of a micro-batch, in the layout that the attention of the model requires.

Shape suffixes: R rows, T tokens of a row, N predicted tokens, S responses of all groups, E tokens
of a row of an encoder, D rows of a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from plad_dist.training.losses import Pairs

# Rows in which the log-likelihoods of a model are exact.
#
# tree: the model takes a ready mask and places tokens by their position ids, with any attention
#     function, so responses share their prompt.
# scores: the same, but only with the attention function that adds the mask to the scores, because
#     the model changes its scores (soft caps, sinks) or builds no other mask.
# sequences: exact only with one sequence in each row.
#
# An encoder-decoder of the first kind takes several prompts in a row of its encoder, and the
# responses to them in a row of its decoder.
RowSupport = Literal["tree", "scores", "sequences"]


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its responses as token ids, and the comparisons between the responses.

    `scores`, `initial_logps` and `sampled_logps` have one value for each response, NaN if it is
    unknown. They are empty if it is unknown for all responses.

    Attributes:
        prompt: token ids of the prompt.
        responses: token ids of each response.
        scores: scores of the responses from the pairing step.
        pairs: the comparisons as (chosen, rejected, rank gap). Chosen and rejected are indices of
            responses. The rank gap is their distance in a ranked list, 1 for a plain pair.
        anchored: indices of the responses whose likelihood is raised, by the anchor (the term that
            `mle_weight` weighs) or by the loss `mle`.
        initial_logps: log-likelihoods under the starting student.
        sampled_logps: log-likelihoods that the sampling engine reported.
        name: identifies the group in messages.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    pairs: Sequence[tuple[int, int, int]] = ()
    anchored: Sequence[int] = (0,)
    scores: Sequence[float] = ()
    initial_logps: Sequence[float] = ()
    sampled_logps: Sequence[float] = ()
    name: str = ""
    prompt_id: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the model computes if the responses share the prompt."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)

    @property
    def tokens_unshared(self) -> int:
        """Tokens that the model computes if every response has its own copy of the prompt."""
        return sum(len(self.prompt) + len(response) - 1 for response in self.responses)

    @property
    def tokens_encoded(self) -> int:
        """Tokens that an encoder computes for the prompt, and its decoder for all responses."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def places_unshared(self) -> int:
        """Tokens of a row for each response with a copy of the prompt, padded to the longest."""
        return len(self.responses) * (len(self.prompt) + max(map(len, self.responses)) - 1)


def single_pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Group:
    """Return a group of one pair."""
    return Group(prompt, [chosen, rejected], pairs=[(0, 1, 1)])


@dataclass(frozen=True)
class Layout:
    """Rules for the placement of groups in rows.

    A piece is a unit that is placed as a whole: a group, or a single response with its own copy of
    the prompt.

    Attributes:
        shares_prompts: the responses of a group share one copy of their prompt.
        packs_rows: a row may hold several pieces.
        row_tokens: rows are filled up to this many tokens. Under a dense mask, the cost of
            attention is quadratic in the length of the row.
        row_multiple: rows are padded to a multiple of this many tokens.
        min_piece_tokens: if pieces have at least this many tokens on average, they all go into one
            row without padding, and attention is computed piece by piece. None: never.
        max_row_tokens: upper bound of `row_tokens`, None for no bound. A longer piece has a row of
            its own.
        decoder_start: token id with which the decoder of an encoder-decoder begins every response.
            None for a model without an encoder. An encoder reads each prompt once, and all
            responses of the group attend to it, so that they share it in any rows.
    """

    shares_prompts: bool = True
    packs_rows: bool = True
    row_tokens: int = 128
    row_multiple: int = 1
    min_piece_tokens: int | None = None
    max_row_tokens: int | None = None
    decoder_start: int | None = None

    @property
    def rules(self) -> Layout:
        """Layout that counts the same tokens, without the settings of one kind of device."""
        return Layout(self.shares_prompts, self.packs_rows, decoder_start=self.decoder_start)

    def tokens(self, group: Group) -> int:
        """Return the number of tokens that the model computes for a group, without padding."""
        if self.decoder_start is not None:
            return group.tokens_encoded
        return group.tokens if self.shares_prompts else group.tokens_unshared

    def tokens_unshared(self, group: Group) -> int:
        """Return the tokens of a group if every response had its own copy of the prompt."""
        if self.decoder_start is not None:
            return group.tokens_encoded + (len(group.responses) - 1) * len(group.prompt)
        return group.tokens_unshared

    def places(self, group: Group) -> int:
        """Return the most places that a group takes in a micro-batch of its own."""
        if self.decoder_start is not None and not self.packs_rows:
            return len(group.prompt) + len(group.responses) * max(map(len, group.responses))
        return self.tokens(group) if self.shares_prompts else group.places_unshared

    def size_text(self, group: Group) -> str:
        """Return the size of a group for messages."""
        if self.decoder_start is not None and not self.packs_rows:
            return f"the prompt and its responses, padded to the longest, have {self.places(group):,} tokens"
        if self.shares_prompts:
            return f"the prompt and its responses have {self.places(group):,} tokens"
        return (
            f"the {len(group.responses)} responses, each with a copy of the prompt and padded to the longest, have "
            f"{group.places_unshared:,} tokens"
        )


@dataclass(frozen=True, slots=True)
class EncoderRows:
    """Prompts as the encoder of an encoder-decoder reads them.

    A token sees the tokens of its prompt, which are those from `starts_RE` to `ends_RE` (exclusive)
    in its row; padding sees padding.

    Attributes:
        is_padding_RE: True for padding.
        rows_D: row of the encoder to which each row of the decoder attends.
    """

    input_ids_RE: Tensor
    starts_RE: Tensor
    ends_RE: Tensor
    is_padding_RE: Tensor
    rows_D: Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Input of one forward pass of one worker.

    With an encoder, the rows are those of the decoder. They hold only responses, the bounds of a
    token's prompt are indices in the row of the encoder, and there are no position ids.

    A token sees its branch up to itself, and the tokens of its row from `prompt_starts_RT` to
    `prompt_ends_RT` (exclusive). Its branch is the response that it belongs to, or the prompt for a
    token of the prompt.

    Attributes:
        prompt_starts_RT: index in the row at which the token's prompt starts; -1 for padding.
        prompt_ends_RT: index after the last token of the prompt, for a token of a response. For a
            token of the prompt it equals `prompt_starts_RT`: its branch is all that it sees.
        branch_starts_RT: index in the row at which the token's branch starts.
        predictors_N: flat indices into ``R * T`` of the tokens whose hidden states predict
            `targets_N`.
        targets_N: the predicted tokens, which are all tokens of all responses.
        responses_N: index of the response that a predicted token belongs to.
        offsets_N: index of a predicted token in its response.
        lengths_S: tokens of each response.
        initial_logps_S: log-likelihoods under the starting student, NaN if unknown.
        sampled_logps_S: log-likelihoods that the sampling engine reported, NaN if unknown.
        pieces: for a single row of all pieces, (prompt tokens, computed tokens of each response) of
            every piece; otherwise empty.
        longest_response: tokens of the longest response.
        groups: number of groups; 0 for a micro-batch that only keeps the ranks in step.
        tokens: computed tokens without padding.
        tokens_unshared: computed tokens if every response had its own copy of the prompt.
        encoder: rows of the prompts; None for a model without an encoder.
    """

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    prompt_starts_RT: Tensor
    prompt_ends_RT: Tensor
    branch_starts_RT: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    responses_N: Tensor
    offsets_N: Tensor
    lengths_S: Tensor
    initial_logps_S: Tensor
    sampled_logps_S: Tensor
    pairs: Pairs
    pieces: tuple[tuple[int, tuple[int, ...]], ...]
    longest_response: int
    groups: int
    tokens: int
    tokens_unshared: int
    encoder: EncoderRows | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy with all tensors on a device."""
        moved: MicroBatch = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value
