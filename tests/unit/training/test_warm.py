"""Nodes on which training processes start warm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from plad_dist.config_file import parse_config
from plad_dist.nursery.actor import NurseryPlan
from plad_dist.training.driver import warm
from tests.numerics.workers import config_with_pairs


@pytest.mark.parametrize(("num_workers", "nodes"), [(2, 6), ([1, 2], 6), ([2, 16], 34)])
def test_spare_nodes_have_nurseries_for_elastic_groups_and_for_groups_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int | list[int], nodes: int
) -> None:
    plans: list[NurseryPlan] = []

    @contextmanager
    def record(plan: NurseryPlan) -> Iterator[None]:
        plans.append(plan)
        yield

    monkeypatch.setattr(warm, "nurseries", record)
    monkeypatch.setattr(warm, "engines_use_gpus", lambda: True)
    raw = config_with_pairs(tmp_path)
    raw["training"] |= {"num_workers": num_workers, "cpus_per_worker": 4}
    with warm.warm_workers(parse_config(raw, "test")):
        pass
    (plan,) = plans
    assert plan.most_nodes == nodes
    assert plan.is_wanted({"CPU": 32.0, "GPU": 8.0})
    assert not plan.is_wanted({"CPU": 32.0}), "a head without a GPU"
    assert not plan.is_wanted({"CPU": 2.0, "GPU": 1.0})
