"""Choice of tokens: the distribution that a decoding asks for, whatever the other rows are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from plad_dist.config import Decoding
from plad_dist.sampling.generation.batch_request import BatchRow
from plad_dist.sampling.generation.token_choice import TokenChoice

LOGITS = [2.0, 1.2, 0.9, 0.0, -0.5, -1.0, -3.0]
DRAWS = 40_000


def row_of(seed: int = 0, prompt: Sequence[int] = (1,), min_tokens: int = 0) -> BatchRow:
    return BatchRow(prompt, seed, min_tokens, max_tokens=100)


def choose(choice: TokenChoice, logits: Sequence[Sequence[float]]) -> list[int]:
    """Return the token of each row, as a caller sees it that takes the largest score."""
    return choice(None, torch.tensor(logits)).argmax(-1).tolist()  # type: ignore[arg-type]


def expected_probabilities(decoding: Decoding) -> np.ndarray[Any, Any]:
    """Return the distribution of the first token, by vLLM's definitions in their order."""
    logits = np.array(LOGITS) / decoding.temperature
    probabilities = np.exp(logits) / np.exp(logits).sum()
    if decoding.min_p:
        probabilities[probabilities < decoding.min_p * probabilities.max()] = 0
    if decoding.top_k:
        probabilities[np.argsort(-probabilities)[decoding.top_k :]] = 0
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= decoding.top_p]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.9, "top_k": 4, "temperature": 1.3},
        {"min_p": 0.2},
        {"min_p": 0.1, "top_p": 0.8, "temperature": 2.0},
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_the_decoding(settings: dict[str, Any]) -> None:
    decoding = Decoding(**settings)
    choice = TokenChoice([row_of(seed) for seed in range(DRAWS)], decoding, ())
    counts = np.bincount(choose(choice, [LOGITS] * DRAWS), minlength=len(LOGITS))
    expected = DRAWS * expected_probabilities(decoding)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_successive_tokens_of_a_row_are_independent_draws() -> None:
    decoding = Decoding()
    choice = TokenChoice([row_of(seed) for seed in range(DRAWS)], decoding, ())
    first, second = (np.array(choose(choice, [LOGITS] * DRAWS)) for _ in range(2))
    probabilities = expected_probabilities(decoding)
    joint = np.histogram2d(first, second, bins=range(len(LOGITS) + 1))[0]
    expected = DRAWS * np.outer(probabilities, probabilities)
    freedom = expected.size - 1
    assert ((joint - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_the_tokens_of_a_row_do_not_depend_on_its_neighbours() -> None:
    decoding = Decoding(repetition_penalty=2.0, presence_penalty=2.0, frequency_penalty=2.0, top_p=0.95)
    logits = torch.randn(12, 1, 8, generator=torch.Generator().manual_seed(1)) * 2

    def tokens(rows: list[BatchRow], place: int, leaving: Sequence[int] = ()) -> list[int]:
        choice, kept = TokenChoice(rows, decoding, ()), rows[place]
        for step, scores in enumerate(logits):
            if step == 3 and leaving:
                choice.keep([index for index in range(len(choice.rows)) if index not in leaving])
            others = torch.randn(len(choice.rows), 8, generator=torch.Generator().manual_seed(step))
            others[choice.rows.index(kept)] = scores
            choice(None, others)  # type: ignore[arg-type]
        return kept.token_ids

    alone = tokens([row_of(7, prompt=(3, 4))], 0)
    neighbours = [row_of(seed, prompt=range(seed)) for seed in range(1, 5)]
    assert len(set(alone)) > 1
    assert tokens([*neighbours, row_of(7, prompt=(3, 4))], 4) == alone
    fresh = [row_of(seed, prompt=range(seed)) for seed in range(1, 5)]
    assert tokens([fresh[0], row_of(7, prompt=(3, 4)), *fresh[1:]], 1, leaving=(0, 2, 4)) == alone


def test_the_recorded_logprob_is_that_of_the_model_before_temperature_and_penalties() -> None:
    decoding = Decoding(temperature=0.3, presence_penalty=1.5, top_k=2)
    row = row_of(3)
    choice = TokenChoice([row], decoding, ())
    for _ in range(4):
        choose(choice, [LOGITS])
    logprobs = torch.tensor(LOGITS).log_softmax(-1)
    assert row.logprob == pytest.approx(float(logprobs[row.token_ids].sum()), abs=1e-5)


def test_penalties_are_those_of_vllm() -> None:
    decoding = Decoding(temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.6, presence_penalty=0.25)
    generator = torch.Generator().manual_seed(0)
    prompts, responses = [[1, 2, 2], [8]], [[3, 3, 3, 2], [9, 1, 9, 9]]
    logits = torch.randn(2, 12, generator=generator)
    rows = [row_of(prompt=prompt) for prompt in prompts]
    choice = TokenChoice(rows, decoding, ())
    for step in range(4):  # the tokens that the rows are to have
        forced = torch.full((2, 12), -1e4)
        for row, response in enumerate(responses):
            forced[row, response[step]] = 1e4
        choose(choice, forced.tolist())
    assert [row.token_ids for row in rows] == responses
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for token in range(12):
            score, count = float(logits[row, token]), response.count(token)
            if token in prompt or count:
                score = score / 1.7 if score > 0 else score * 1.7
            expected = score - 0.6 * count - 0.25 * (count > 0)
            assert float(choice._penalized(logits)[row, token]) == pytest.approx(expected, abs=1e-6)


def test_a_response_does_not_end_before_its_least_length() -> None:
    ends = (0, 2)
    rows = [row_of(1, min_tokens=3), row_of(2), row_of(3, min_tokens=1)]
    choice = TokenChoice(rows, Decoding(temperature=0.0), ends)
    tokens = [choose(choice, [LOGITS] * 3) for _ in range(4)]
    assert tokens == [[1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]], "token 0 is the likeliest, and an end"


def test_greedy_rows_take_the_likeliest_token_whatever_their_seed() -> None:
    choice = TokenChoice([row_of(seed) for seed in range(20)], Decoding(temperature=0.0, top_p=0.5), ())
    assert set(choose(choice, [LOGITS] * 20)) == {0}
