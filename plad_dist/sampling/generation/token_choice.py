"""Choice of the next token of every row of a batch: penalties, temperature, cuts, seeded draws.

The definitions and their order are those of vLLM. A row is drawn by a generator of its own, which
its seed starts, and nothing of another row has a part in it. So a response does not depend on the
batch that it was in, up to floating-point effects.

Shape suffixes: `B` rows of the batch, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from plad_dist.config import Decoding
from plad_dist.sampling.generation.batch_request import BatchRow


class TokenChoice(LogitsProcessor):
    """Chooses a token for each row, and records it with its log-probability.

    The log-probability is that of the model, before temperature and penalties. The scores that it
    returns leave the caller, who takes the largest, no other choice.

    Args:
        rows: one for each row of the scores.
        end_ids: tokens that end a response, which no response has before `min_tokens`.

    Attributes:
        rows: as given, fewer after :meth:`keep`.
    """

    def __init__(self, rows: Sequence[BatchRow], decoding: Decoding, end_ids: Collection[int]) -> None:
        self.rows, self._decoding, self._end_ids = list(rows), decoding, sorted(end_ids)
        self._generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        self._warpers = _warpers(decoding)
        self._counts_BV: Tensor | None = None  # of tokens in the responses
        self._in_prompt_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores by which the chosen tokens are the largest.

        Args:
            scores: logits `[B, V]` of the model.
        """
        tokens_B = self._choose(scores)
        logprobs_B = scores.log_softmax(-1).gather(1, tokens_B[:, None])[:, 0]
        for row, token, logprob in zip(self.rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            if not row.is_done:
                row.token_ids.append(token)
                row.logprob += logprob
        return torch.full_like(scores, -math.inf).scatter_(1, tokens_B[:, None], 0.0)

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all rows but those at some places."""
        self.rows = [self.rows[index] for index in indices]
        self._generators = [self._generators[index] for index in indices]
        if self._counts_BV is not None and self._in_prompt_BV is not None:
            self._counts_BV = self._counts_BV[list(indices)]
            self._in_prompt_BV = self._in_prompt_BV[list(indices)]

    def _choose(self, scores_BV: Tensor) -> Tensor:
        scores_BV = self._without_early_ends(scores_BV)
        if self._is_penalized:
            scores_BV = self._penalized(scores_BV)
        tokens_B = scores_BV.argmax(-1) if self._decoding.temperature == 0 else self._drawn(scores_BV)
        if self._counts_BV is not None:
            self._counts_BV.scatter_add_(1, tokens_B[:, None], torch.ones_like(scores_BV[:, :1]))
        return tokens_B

    def _without_early_ends(self, scores_BV: Tensor) -> Tensor:
        early = [index for index, row in enumerate(self.rows) if len(row.token_ids) < row.min_tokens]
        ends = [token for token in self._end_ids if token < scores_BV.shape[1]]
        if not early or not ends:
            return scores_BV
        scores_BV = scores_BV.clone()
        scores_BV[torch.tensor(early)[:, None], torch.tensor(ends)] = -math.inf
        return scores_BV

    # -- penalties

    @property
    def _is_penalized(self) -> bool:
        decoding = self._decoding
        has_repetition = (decoding.repetition_penalty or 1.0) != 1.0
        return has_repetition or bool(decoding.presence_penalty or decoding.frequency_penalty)

    def _penalized(self, scores_BV: Tensor) -> Tensor:
        # Those of transformers count the padding of a prompt too.
        if self._counts_BV is None or self._in_prompt_BV is None:
            self._counts_BV = torch.zeros_like(scores_BV)
            self._in_prompt_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
            for index, row in enumerate(self.rows):
                self._in_prompt_BV[index, torch.tensor(list(row.prompt_ids), device=scores_BV.device)] = True
        in_response_BV = self._counts_BV > 0
        factor = self._decoding.repetition_penalty or 1.0
        repeated_BV = torch.where(scores_BV > 0, scores_BV / factor, scores_BV * factor)
        scores_BV = torch.where(self._in_prompt_BV | in_response_BV, repeated_BV, scores_BV)
        scores_BV = scores_BV - (self._decoding.frequency_penalty or 0.0) * self._counts_BV
        return scores_BV - (self._decoding.presence_penalty or 0.0) * in_response_BV

    # -- draws

    def _drawn(self, scores_BV: Tensor) -> Tensor:
        """Draw a token of each row by the inverse of its distribution function.

        One number for each token suffices, which CPUs and GPUs draw from the same generator.
        """
        for warp in self._warpers:
            scores_BV = warp(None, scores_BV)
        cumulative_BV = scores_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
        numbers = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self._generators]
        limits_B1 = torch.stack(numbers)[:, None].to(scores_BV.device) * cumulative_BV[:, -1:]
        tokens_B = torch.searchsorted(cumulative_BV, limits_B1, right=True)[:, 0]
        return tokens_B.clamp(max=scores_BV.shape[1] - 1)


def _warpers(decoding: Decoding) -> list[LogitsProcessor]:
    """Return what changes the distribution before a draw, in vLLM's order."""
    warpers: list[LogitsProcessor] = []
    if decoding.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.min_p:
        warpers.append(MinPLogitsWarper(decoding.min_p))
    if decoding.top_k:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    return warpers
