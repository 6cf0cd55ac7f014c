"""Rate limits and the estimate of tokens, as plain objects with a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.sampling.endpoint.rates import Bucket, Pace, TokenEstimate
from tests.fake_endpoint import assert_rate


@given(
    per_minute=st.floats(1, 20_000),
    gaps=st.lists(st.floats(0, 90), min_size=1, max_size=60),
)
def test_no_minute_exceeds_the_rate(per_minute: float, gaps: list[float]) -> None:
    bucket, now, times = Bucket(per_minute, 0.0), 0.0, []
    for gap in gaps:
        now += gap
        while (wait_s := bucket.wait_s(1, now)) > 0:
            now += wait_s
        bucket.take(1)
        times.append(now)
    assert_rate(times, [1.0] * len(times), per_minute)


@pytest.mark.parametrize("per_minute", [1, 59, 60, 90, 600])
def test_a_flood_of_requests_uses_the_rate_and_no_minute_exceeds_it(per_minute: int) -> None:
    bucket, now, times = Bucket(per_minute, 0.0), 0.0, []
    while now < 180:
        now += bucket.wait_s(1, now)
        bucket.take(1)
        times.append(now)
    assert_rate(times, [1.0] * len(times), per_minute)
    assert len(times) >= 2.9 * per_minute


def test_a_shorter_pause_does_not_end_a_longer_one() -> None:
    pace = Pace(None, None, 0.0)
    pace.pause(30.0)
    pace.pause(10.0)
    assert [pace.wait_s(1, now) for now in (0.0, 20.0, 31.0)] == [30.0, 10.0, 0.0]


def test_the_tokens_of_a_request_are_learnt_from_responses() -> None:
    estimate = TokenEstimate()
    assert estimate.tokens(400, 1000) == 1100
    for _ in range(100):
        estimate.learn(400, 1000, 200, 50)
    assert 230 < estimate.tokens(400, 1000) < 300
