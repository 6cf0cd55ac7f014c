"""Logs of jobs are shown once, whatever the connection does."""

from __future__ import annotations

from types import SimpleNamespace

from plad_dist.jobs import _Log, job_table


def test_a_log_that_is_sent_again_from_its_beginning_is_shown_once() -> None:
    shown: list[str] = []
    log = _Log(shown.append)
    for pieces in (["one\ntwo\n"], ["one\n", "two\nth"], [], ["one\ntwo\nthree\n", "four\n"]):
        log.begin()
        for piece in pieces:
            log.add(piece)
    assert "".join(shown) == "one\ntwo\nthree\nfour\n"


def test_jobs_that_others_submitted_are_shown_too() -> None:
    jobs = [SimpleNamespace(submission_id="raysubmit_1", status="RUNNING", metadata=None, start_time=None)]
    assert job_table(jobs, "http://there:8265").row_count == 1
