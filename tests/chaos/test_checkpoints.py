"""Deaths at every point of a checkpoint's commit, and resizes of every optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from plad_dist.rundir import RunDir
from tests.numerics.crash import (
    CASES,
    POINTS,
    cut,
    killed_at,
    lose,
    resized_in_the_middle,
    resized_with,
    skipped_when_damaged,
    undisturbed_run,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_at_any_point_of_a_commit_costs_at_most_one_interval(
    tmp_path: Path, undisturbed: RunDir, point: str
) -> None:
    killed_at(point, tmp_path, undisturbed)


def test_a_death_while_a_checkpoint_is_resized_costs_nothing(tmp_path: Path, undisturbed: RunDir) -> None:
    resized_in_the_middle(tmp_path, undisturbed)


@pytest.mark.parametrize("case", CASES)
def test_other_optimizer_states_are_resized_too(tmp_path: Path, case: str) -> None:
    resized_with(case, tmp_path)


@pytest.mark.parametrize("damage", [cut, lose])
def test_a_damaged_newest_checkpoint_is_skipped_and_the_one_before_it_is_used(
    tmp_path: Path, undisturbed: RunDir, damage: Callable[[Path], None]
) -> None:
    skipped_when_damaged(damage, tmp_path, undisturbed)
