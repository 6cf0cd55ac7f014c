"""What the plain objects behind the endpoint's client promise: rates, pauses and budgets to the last request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plad_dist.sampling.endpoint.rates import Bucket, Budget, Pace, TokenEstimate, backoff_s, retry_after_s
from tests.fake_endpoint import assert_rate


def test_backoff_grows_to_a_minute_with_full_jitter() -> None:
    assert [backoff_s(failures, 1.0) for failures in (1, 2, 3, 8, 100)] == [0.5, 1.0, 2.0, 60.0, 60.0]
    assert backoff_s(8, 0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.5", 2.5), ("-3", 0.0), ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0), ("soon", None), ("nan", None), ("", None)],
)
def test_retry_after_is_seconds_or_a_date(text: str, expected: float | None) -> None:
    assert retry_after_s({"Retry-After": text}, wall=40.0) == expected


def test_a_wrong_clock_of_ours_does_not_stretch_the_servers_pause() -> None:
    headers = {"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT", "Date": "Thu, 01 Jan 1970 00:01:30 GMT"}
    assert retry_after_s(headers, wall=-1e6) == 10.0


@given(
    per_minute=st.floats(1, 20_000),
    gaps=st.lists(st.floats(0, 90), min_size=1, max_size=60),
)
def test_no_minute_sees_more_than_the_rate(per_minute: float, gaps: list[float]) -> None:
    bucket, now, at = Bucket(per_minute, 0.0), 0.0, []
    for gap in gaps:
        now += gap
        while (wait := bucket.wait(1, now)) > 0:
            now += wait
        bucket.take(1)
        at.append(now)
    assert_rate(at, [1.0] * len(at), per_minute)


@pytest.mark.parametrize("per_minute", [1, 59, 60, 90, 600])
def test_no_minute_of_a_flood_sees_more_than_the_rate_and_hardly_less(per_minute: int) -> None:
    bucket, now, at = Bucket(per_minute, 0.0), 0.0, []
    while now < 180:
        now += bucket.wait(1, now)
        bucket.take(1)
        at.append(now)
    assert_rate(at, [1.0] * len(at), per_minute)
    assert len(at) >= 2.9 * per_minute


def test_a_shorter_pause_does_not_end_a_longer_one() -> None:
    pace = Pace(None, None, 0.0)
    pace.pause(30.0)
    pace.pause(10.0)
    assert [pace.wait(1, now) for now in (0.0, 20.0, 31.0)] == [30.0, 10.0, 0.0]


def test_what_a_request_will_take_is_learnt_from_answers() -> None:
    estimate = TokenEstimate()
    assert estimate.tokens(400, 1000) == 1100
    for _ in range(100):
        estimate.learn(400, 1000, 200, 50)
    assert 230 < estimate.tokens(400, 1000) < 300


def test_a_budget_with_nothing_under_way_holds_nothing_back() -> None:
    for count in range(1, 50):
        budget = Budget(sum([0.1] * count), 1.0, 1.0, 0.0)
        assert all(budget.reserve(0.1) for _ in range(count))
        assert not budget.reserve(0.1)
        for _ in range(count):
            budget.settle(0.1, 0.0)
        assert budget.reserve(budget.cap or 0.0)  # to the last bit
