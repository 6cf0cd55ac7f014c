"""Studies: the runs of variants and seeds, and messages about studies that are invalid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist.errors import RunFailed, UserError
from plad_dist.evaluation import over_seeds
from plad_dist.study import load_study, write_figures_over_seeds
from tests.conftest import tiny_config


def write_study(folder: Path, **keys: Any) -> str:
    """Write a study and its base config, and return the path of the study."""
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "dir": str(folder / "runs")} | keys))
    return str(path)


def test_variants_and_seeds_do_not_leak_into_one_another(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        set={"training.round": {"epochs": 2}},
        variants={"dpo": {"training.round.loss": {"name": "dpo"}}, "plain": {}},
        seeds=[1, 2],
    )
    by_seed = load_study(path, [])
    assert [[(name, c.training.round.loss.name, c.run.seed) for name, c in runs] for runs in by_seed] == [
        [("dpo", "dpo", 1), ("plain", "rank", 1)],
        [("dpo", "dpo", 2), ("plain", "rank", 2)],
    ]
    assert {c.run.dir for runs in by_seed for _, c in runs} == {
        str(tmp_path / "runs" / f"seed-{seed}" / name) for seed in (1, 2) for name in ("dpo", "plain")
    }


@pytest.mark.parametrize(
    ("keys", "overrides", "message"),
    [
        ({}, [], "variants: missing"),
        ({"variants": {"a/b": {}}}, [], "name 'a/b'"),
        (
            {"variants": {"a": {"training.round.los": 1}}},
            [],
            r"study.yaml: variant a: .*\n.*training.round.los: unknown key",
        ),
        ({"variants": {"a": {}}}, ["run.seed=3"], "set by the study's `dir` and `seeds` for each run"),
        ({"variants": {"a": {}}, "base": "none.yaml"}, [], "none.yaml: no such config file"),
        ({"variants": {"a": {}}, "seeds": [1, 2, 1]}, [], "a seed is given twice"),
        ({"variants": {"a": {}}, "foo": 1}, [], "foo: unknown key; a study has base, dir, set, seeds, variants"),
        ({"variants": {"a": {"run.dir": "x"}}}, [], "variant a: run.dir: set by the study"),
        ({"variants": {"a": {"run.seed": 3}}, "seeds": [1, 2]}, [], "variant a: run.seed: set by the study"),
        (
            {"variants": {"a": {}, "b": {"sampling.student.temperature": 0.5}}},
            [],
            "variant b: its main decoding differs from that of a",
        ),
    ],
)
def test_an_invalid_study_is_named(tmp_path: Path, keys: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_study(write_study(tmp_path, **keys), overrides)


def test_the_config_of_a_run_is_distinguished_from_a_study(tmp_path: Path) -> None:
    path = write_study(tmp_path, variants={"a": {}})
    with pytest.raises(UserError, match=r"base.yaml: is the config of a run \(`plad run`\)"):
        load_study(str(Path(path).parent / "base.yaml"), [])


def test_figures_that_cannot_be_written_are_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_seeds, "study_over_seeds", lambda seeds: [])
    seeds = load_study(write_study(tmp_path, variants={"plain": {}}, seeds=[1, 2]), [])
    _, path = write_figures_over_seeds(seeds)
    assert path.read_text() == "[]"
    path.unlink()
    path.mkdir()
    with pytest.raises(RunFailed, match=r"study\.json: cannot be written: .*Is a directory.*is kept"):
        write_figures_over_seeds(seeds)
