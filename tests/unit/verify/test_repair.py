"""`plad verify --repair` sets bad parts aside, and the next run redoes them and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from plad_dist.data.parts import part_name
from plad_dist.data.prompts import train_prompts
from plad_dist.rundir import RunDir
from plad_dist.verify.repair import repair
from plad_dist.verify.run import verify
from tests.damaged_runs import (
    add,
    alter,
    damage_manifest,
    part_path,
    problems_of,
    remove,
    sample_twice,
    samples_of,
    too_few_blocks,
    truncate,
)


@pytest.mark.parametrize("damage", [remove, truncate, alter, add, damage_manifest, too_few_blocks, sample_twice])
def test_repair_sets_bad_parts_aside_and_nothing_else(run: RunDir, damage: Callable[[RunDir], None]) -> None:
    dataset = run.samples("teacher")
    before = {item.name: item for item in dataset.require("sample").parts}
    damage(run)
    results, _ = verify(run.storage.url)
    bad = {name for item in results for name in item.bad if name.startswith("part")}
    actions = repair(run.storage.url, results)
    assert actions
    assert all(action.startswith("samples/teacher/round-0/") for action in actions)
    aside = run.root / dataset.path / "damaged"
    assert damage is remove or any(aside.iterdir()), "bad parts are kept aside"
    assert dataset.manifest() is None
    committed = dataset.committed()
    assert not {part_name(block) for block in committed} & bad
    if damage not in (damage_manifest, sample_twice):
        assert all(item == before[item.name] for item in committed.values() if item), "sound parts keep their checksums"
        assert all(item is not None for item in committed.values())
    prompts = train_prompts(run.storage)
    blocks = range(len(prompts.require("prepare").parts))
    for block in blocks:
        if block not in committed:
            dataset.commit(block, samples_of(prompts, block, 2), fingerprint="f", attempt="again")
    dataset.finish(len(blocks), fingerprint="f", facts={}, known_parts=[item for item in committed.values() if item])
    assert problems_of(run) == []


def test_repair_of_one_part_does_not_hide_the_damage_of_another(run: RunDir) -> None:
    results, _ = verify(run.storage.url)
    alter(run)
    results, _ = verify(run.storage.url)
    path = part_path(run, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)  # after the check
    repair(run.storage.url, results)
    dataset, prompts = run.samples("teacher"), train_prompts(run.storage)
    dataset.commit(1, samples_of(prompts, 1, 2), fingerprint="f", attempt="again")
    known = [item for item in dataset.committed().values() if item]
    dataset.finish(5, fingerprint="f", facts={}, known_parts=known)
    assert any("part-00002.arrow: damaged: its checksum" in problem for problem in problems_of(run))


def test_a_part_that_is_committed_between_check_and_repair_is_not_moved(run: RunDir) -> None:
    data = part_path(run).read_bytes()
    part_path(run).unlink()
    results, _ = verify(run.storage.url)
    part_path(run).write_bytes(data)
    assert repair(run.storage.url, results) == []
    assert part_path(run).read_bytes() == data
    assert run.samples("teacher").manifest() is not None


def test_a_dataset_without_its_only_part_is_incomplete_and_its_figures_are_deleted(run: RunDir) -> None:
    dataset = run.heldout_samples("teacher")
    for key in ("eval/round-0/metrics.json", "eval/round-0/report.html"):
        run.storage.replace(key, b"{}")
    (path,) = (run.root / dataset.path).glob("part-*.arrow")
    path.write_bytes(path.read_bytes()[:-9])
    repair(run.storage.url, verify(run.storage.url)[0])
    states = {item.path: item.state for item in verify(run.storage.url)[0]}
    assert states[dataset.path] == "incomplete"
    assert not run.storage.exists("eval/round-0/metrics.json")
    assert not run.storage.exists("eval/round-0/report.html")


def test_a_part_that_is_damaged_twice_is_kept_twice(run: RunDir) -> None:
    dataset, prompts = run.samples("teacher"), train_prompts(run.storage)
    for attempt in ("a", "b"):
        truncate(run)
        repair(run.storage.url, verify(run.storage.url)[0])
        dataset.commit(1, samples_of(prompts, 1, 2), fingerprint="f", attempt=attempt)
        dataset.finish(
            5, fingerprint="f", facts={}, known_parts=[item for item in dataset.committed().values() if item]
        )
    assert len(list((run.root / dataset.path / "damaged").glob("part-00001.arrow.*"))) == 2
