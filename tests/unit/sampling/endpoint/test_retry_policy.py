"""The retry policy: every kind of failure leads to its decision and its pause."""

from __future__ import annotations

import pytest

from plad_dist.sampling.endpoint.reply import Failure
from plad_dist.sampling.endpoint.retry import (
    AskUser,
    Decision,
    FailureHistory,
    GiveUpIfOthersSucceeded,
    Refuse,
    RefuseIfOthersSucceed,
    Retry,
    RetryPolicy,
    backoff_s,
    retry_after_s,
)

POLICY = RetryPolicy(max_retries=1, give_up_after_s=100.0)


def decisions(failure: Failure, times: list[float], successes: int = 0) -> list[Decision]:
    """Return the decisions on one prompt that fails in the same way at these times."""
    history, decided = FailureHistory(), []
    for now in times:
        history.add(failure, successes, now)
        decided.append(POLICY.decide(failure, history, successes, now, jitter=1.0))
    return decided


def test_backoff_grows_to_a_minute_with_full_jitter() -> None:
    assert [backoff_s(failures, 1.0) for failures in (1, 2, 3, 8, 100)] == [0.5, 1.0, 2.0, 60.0, 60.0]
    assert backoff_s(8, 0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.5", 2.5), ("-3", 0.0), ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0), ("soon", None), ("nan", None), ("", None)],
)
def test_retry_after_is_seconds_or_a_date(text: str, expected: float | None) -> None:
    assert retry_after_s({"Retry-After": text}, wall=40.0) == expected


def test_a_wrong_local_clock_does_not_change_the_servers_pause() -> None:
    headers = {"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT", "Date": "Thu, 01 Jan 1970 00:01:30 GMT"}
    assert retry_after_s(headers, wall=-1e6) == 10.0


def test_a_transient_failure_is_retried_with_backoff_until_its_retries_are_used_up() -> None:
    failure = Failure("transient", "overloaded", 503, retry_after_s=7.0)
    first, second = decisions(failure, [10.0, 20.0], successes=3)
    assert first == Retry(wait_s=0.5, pause_until=17.0, stops_with_outage=True)
    retry = Retry(wait_s=1.0, pause_until=27.0, stops_with_outage=True)
    assert second == GiveUpIfOthersSucceeded(3, otherwise=retry, pause_until=27.0)


def test_a_throttled_request_pauses_all_requests_and_is_given_up_only_after_give_up_after_s() -> None:
    failure = Failure("throttled", "slow down", 429)
    *early, late = decisions(failure, [0.0, 50.0, 100.0, 101.0])
    assert early == [Retry(pause_until=0.5), Retry(pause_until=51.0), Retry(pause_until=102.0)]
    assert late == GiveUpIfOthersSucceeded(0, otherwise=Retry(pause_until=105.0))


def test_the_servers_pause_replaces_the_backoff_of_a_throttled_request() -> None:
    assert decisions(Failure("throttled", "slow down", 429, retry_after_s=30.0), [5.0]) == [Retry(pause_until=35.0)]


def test_a_refusal_is_final_if_the_server_has_processed_the_prompt() -> None:
    assert decisions(Failure("refused", "content filter", 200), [0.0]) == [Refuse()]
    assert decisions(Failure("refused", "too long", 400), [0.0]) == [RefuseIfOthersSucceed(0, Retry(wait_s=0.5))]


@pytest.mark.parametrize("status", [403, 404, 405, 410])
def test_a_blocked_request_may_be_a_firewalls_doing_once_others_have_succeeded(status: int) -> None:
    failure = Failure("blocked", "no", status)
    assert decisions(failure, [0.0]) == [AskUser()]
    assert decisions(failure, [0.0], successes=4) == [RefuseIfOthersSucceed(4, Retry(wait_s=0.5))]


@pytest.mark.parametrize("status", [200, 302, 401, 402, 429])
def test_a_wrong_key_or_an_exhausted_account_is_never_a_firewalls_doing(status: int) -> None:
    assert decisions(Failure("blocked", "no", status), [0.0], successes=4) == [AskUser()]
