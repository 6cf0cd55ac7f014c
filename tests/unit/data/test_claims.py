"""Claims: the latest writer of a run is known, and every earlier one ends."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from plad_dist.data import claims
from plad_dist.data.claims import RUN_CLAIMS, OwnerCheck, SupersededError, check_owned, claim_run, take_claim
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed


def test_a_later_claim_ends_every_earlier_one_and_says_who_took_over(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = replace(storage, claim=claim_run(storage, "plad run"))
    check_owned(first)
    second = replace(storage, claim=claim_run(storage, "plad sample"))
    third = replace(storage, claim=claim_run(storage, "plad pair"))
    check_owned(third)
    for superseded in (first, second):
        with pytest.raises(SupersededError, match=r"another command, `plad pair` on .* has taken over the run"):
            check_owned(superseded)


def test_a_stale_listing_gives_no_number_away_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    numbers = {take_claim(storage, RUN_CLAIMS, "a").number for _ in range(3)}
    monkeypatch.setattr(Storage, "sizes", lambda self, folder: {})
    assert take_claim(storage, RUN_CLAIMS, "b").number not in numbers


def test_a_storage_without_claim_is_never_superseded(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    claim_run(storage, "plad run")
    check_owned(storage)


def test_the_claim_travels_to_the_workers(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    owned = replace(storage, claim=claim_run(storage, "plad run"))
    assert pickle.loads(pickle.dumps(owned)) == owned


def test_what_a_neighbour_wrote_into_a_claim_is_shown_without_control_characters(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    owned = replace(storage, claim=claim_run(storage, "plad run"))
    take_claim(storage, RUN_CLAIMS, "x", command="\x1b]0;owned\x07" + "y" * 10_000, host="\n", pid={}, user=[])
    with pytest.raises(SupersededError) as caught:
        check_owned(owned)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_long_job_looks_at_its_claim_every_few_seconds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, reads, clock = Storage(str(tmp_path)), [], [100.0]
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, key: reads.append(key) or read(self, key))
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    check = OwnerCheck(replace(storage, claim=claim_run(storage, "plad run")), 3.0)
    for _ in range(100):
        check()
    assert len(reads) == 1
    claim_run(storage, "plad sample")
    clock[0] += 3.0
    with pytest.raises(SupersededError):
        check()


def test_a_storage_that_fails_ends_a_long_job_after_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, clock = Storage(str(tmp_path)), [100.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    check = OwnerCheck(replace(storage, claim=claim_run(storage, "plad run")), 3.0)

    def fails(self: Storage, key: str) -> None:
        raise RunFailed("Stale file handle")

    monkeypatch.setattr(Storage, "read", fails)
    check()
    clock[0] += 29
    check()
    clock[0] += 3
    with pytest.raises(RunFailed, match="Stale file handle"):
        check()


def test_time_without_a_look_is_no_outage_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, clock, real = Storage(str(tmp_path)), [100.0], Storage.read
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    check = OwnerCheck(replace(storage, claim=claim_run(storage, "plad run")), 3.0)

    def fails(self: Storage, key: str) -> None:
        raise RunFailed("Stale file handle")

    check()
    for _ in range(2):  # a failure, then one look that succeeds
        clock[0] += 600
        monkeypatch.setattr(Storage, "read", fails)
        check()
        clock[0] += 29
        monkeypatch.setattr(Storage, "read", real)
        check()
