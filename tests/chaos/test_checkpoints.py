"""Every named point of a checkpoint's commit, and every kind of optimizer state at another size."""

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
    left_out_when,
    lose,
    resized_in_the_middle,
    resized_with,
    undisturbed_run,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_at_any_point_of_a_commit_costs_no_more_than_the_interval(
    tmp_path: Path, undisturbed: RunDir, point: str
) -> None:
    killed_at(point, tmp_path, undisturbed)


def test_killed_while_it_loads_at_another_size(tmp_path: Path, undisturbed: RunDir) -> None:
    resized_in_the_middle(tmp_path, undisturbed)


@pytest.mark.parametrize("case", CASES)
def test_other_optimizer_states_change_their_size_too(tmp_path: Path, case: str) -> None:
    resized_with(case, tmp_path)


@pytest.mark.parametrize("harm", [cut, lose])
def test_a_damaged_newest_checkpoint_is_left_out_and_the_one_before_is_used(
    tmp_path: Path, undisturbed: RunDir, harm: Callable[[Path], None]
) -> None:
    left_out_when(harm, tmp_path, undisturbed)
