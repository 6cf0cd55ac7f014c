"""Names of the compared systems in JSON, paths and tables."""

from __future__ import annotations

import pytest

from plad_dist.systems import PLAD, SEQKD, TEACHER, WARMUP, System


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("teacher", TEACHER),
        ("warmup", WARMUP),
        ("seqkd", SEQKD),
        ("plad", PLAD),
        ("round-0", System("plad", 0)),
        ("round-12", System("plad", 12)),
    ],
)
def test_a_name_is_read_and_written_unchanged(name: str, system: System) -> None:
    assert System.parse(name) == system
    assert str(system) == name


@pytest.mark.parametrize("name", ["", "student", "PLAD", "round", "round-", "round-1x", "warmup "])
def test_a_name_of_no_system_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected teacher, warmup, seqkd, plad or round-N"):
        System.parse(name)


def test_systems_are_ordered_from_the_teacher_to_the_round_s_student() -> None:
    shuffled = [PLAD, System("plad", 10), SEQKD, System("plad", 2), TEACHER, System("plad", 0), WARMUP]
    ordered = [str(system) for system in sorted(shuffled, key=lambda system: system.order)]
    assert ordered == ["teacher", "warmup", "seqkd", "round-0", "round-2", "round-10", "plad"]
