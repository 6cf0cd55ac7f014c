"""Usage in every form in which providers report it, and its price."""

from __future__ import annotations

from typing import Any

import pytest

from plad_dist.config import Endpoint
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.usage import Usage, read_usage


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, Usage(10, 5)),
        # Reasoning inside the completion, as at OpenAI, DeepSeek and vLLM.
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 50,
                "total_tokens": 60,
                "completion_tokens_details": {"reasoning_tokens": 40},
            },
            Usage(10, 50),
        ),
        # Reasoning beside the completion, in the total: as at xAI, and without details at Gemini.
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 315,
                "completion_tokens_details": {"reasoning_tokens": 300},
            },
            Usage(10, 305),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 315}, Usage(10, 305)),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 40}, Usage(10, 30)),
        ({"prompt_tokens": 10, "total_tokens": 40}, Usage(10, 30)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "reasoning_tokens": 300}, Usage(10, 305)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "completion_tokens_details": None}, Usage(10, 5)),
        # A total that leaves something out does not reduce the parts.
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 5}, Usage(10, 5)),
        ({"completion_tokens": 5, "total_tokens": 15}, Usage(10, 5)),
        # Cached tokens, by all their names.
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}}, Usage(10, 5, 8)),
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 2},
            Usage(10, 5, 8),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 5, "cache_read_input_tokens": 8}, Usage(10, 5, 8)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 80}, Usage(10, 5, 10)),
        ({"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 8}}, Usage(10, 5, 8)),
        (
            {"input_tokens": 2, "output_tokens": 5, "cache_read_input_tokens": 8, "cache_creation_input_tokens": 3},
            Usage(13, 5, 8),
        ),
        # Numbers of other types.
        ({"prompt_tokens": 10.0, "completion_tokens": "5"}, Usage(10, 5)),
        ({"prompt_tokens": "10", "completion_tokens": 4.5, "total_tokens": "14.5"}, Usage(10, 5)),
    ],
)
def test_every_billed_token_is_counted_once(report: dict[str, Any], expected: Usage) -> None:
    assert read_usage(report) == expected


@pytest.mark.parametrize(
    "report",
    [
        None,
        [],
        {},
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": 10},
        {"total_tokens": 10},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": float("nan"), "completion_tokens": 5},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    ],
)
def test_a_report_that_does_not_tell_the_tokens_is_none(report: Any) -> None:
    assert read_usage(report) is None


def test_cached_tokens_have_their_own_price() -> None:
    endpoint = Endpoint(url="http://x", model="m", input_price=10.0, output_price=100.0, cached_input_price=1.0)
    assert Budget(endpoint, 0.0).cost(Usage(10, 5, 8)) == pytest.approx((2 * 10 + 8 * 1 + 5 * 100) / 1e6)
    plain = endpoint.model_copy(update={"cached_input_price": None})
    assert Budget(plain, 0.0).cost(Usage(10, 5, 8)) == pytest.approx((10 * 10 + 5 * 100) / 1e6)


def test_a_cache_that_is_dearer_than_the_prompt_is_part_of_the_worst_cost() -> None:
    endpoint = Endpoint(url="http://x", model="m", input_price=1.0, output_price=0.0, cached_input_price=2.0)
    assert Budget(endpoint, 0.0).worst_cost(Usage(10, 5)) == pytest.approx(20e-6)
