"""One run, one owner: `run.yaml`, claims of commands, and what superseded ones must not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plad_dist import rundir
from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data.claims import SupersededError, check_owned, take_claim
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.pipeline import run_pipeline
from plad_dist.rundir import RunDir, check_binding, load_run, open_run
from plad_dist.status import status_table
from tests.conftest import tiny_config, write_prompts


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    write_prompts(tmp_path)
    return tiny_config(tmp_path)


def config_of(raw: dict[str, Any], seed: int = 5) -> Config:
    return parse_config({**raw, "run": {**raw["run"], "seed": seed}}, "test")


def seed_of(run: RunDir) -> int:
    return load_run(run.storage.url).config.run.seed


def test_of_two_commands_only_the_later_one_continues(raw: dict[str, Any]) -> None:
    first = open_run(config_of(raw), "plad run")
    second = open_run(config_of(raw), "plad sample")
    with pytest.raises(SupersededError, match=r"`plad sample` on .* has taken over the run"):
        prepare(config_of(raw), first.storage)
    assert train_prompts(first.storage).committed() == {}
    prepare(config_of(raw), second.storage)


def test_a_command_that_was_let_in_before_the_first_commit_cannot_mix_its_data(raw: dict[str, Any]) -> None:
    run = open_run(config_of(raw))
    other = open_run(config_of(raw, seed=6))  # nothing has begun, so the config may still change
    with pytest.raises(SupersededError):
        prepare(config_of(raw), run.storage)
    prepare(config_of(raw, seed=6), other.storage)
    assert seed_of(run) == 6
    with pytest.raises(UserError, match=r"run\.seed: 6 before, 5 now"):
        open_run(config_of(raw))


def test_committed_parts_count_as_begun(raw: dict[str, Any]) -> None:
    run = open_run(config_of(raw))
    prepare(config_of(raw), run.storage)
    for dataset in ("prompts", "eval/prompts"):
        run.storage.delete(f"{dataset}/manifest.json")
    with pytest.raises(UserError, match=r"run\.seed: 5 before, 6 now"):
        open_run(config_of(raw, seed=6))
    run.storage.delete_folder("eval/prompts")
    with pytest.raises(UserError, match=r"run\.seed: 5 before, 6 now"):
        open_run(config_of(raw, seed=6))
    run.storage.delete_folder("prompts")
    assert open_run(config_of(raw, seed=6)).storage.claim is not None


def raced(monkeypatch: pytest.MonkeyPatch, name: str, before: Any) -> None:
    """Call `before` once, before the next call of a method of :class:`Storage`."""
    method = getattr(Storage, name)

    def late(self: Storage, *args: Any) -> Any:
        if args[0] != "run.yaml":
            return method(self, *args)
        monkeypatch.setattr(Storage, name, method)
        before()
        return method(self, *args)

    monkeypatch.setattr(Storage, name, late)


def test_the_first_run_yaml_is_never_overwritten_by_a_superseded_command(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raced(monkeypatch, "create", lambda: open_run(config_of(raw, seed=6)))
    with pytest.raises(SupersededError):
        open_run(config_of(raw))
    assert seed_of(RunDir.of(config_of(raw))) == 6


def test_a_config_is_compared_again_after_the_claim(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that owned the run until then may have begun in the meantime."""
    first = open_run(config_of(raw))
    check = rundir.check_same_run

    def late(config: Config, run: RunDir) -> None:
        check(config, run)
        monkeypatch.setattr(rundir, "check_same_run", check)
        prepare(config_of(raw), first.storage)

    monkeypatch.setattr(rundir, "check_same_run", late)
    with pytest.raises(UserError, match=r"run\.seed: 5 before, 6 now"):
        open_run(config_of(raw, seed=6))
    assert seed_of(first) == 5


def test_an_owner_that_finds_the_config_of_another_run_stops(raw: dict[str, Any]) -> None:
    config = config_of(raw)
    run = open_run(config)
    check_binding(config, run)
    run.storage.replace("run.yaml", rundir.run_document(config_of(raw, seed=6)))
    with pytest.raises(RunFailed, match=r"run\.yaml: has the fingerprint \w+ of another config"):
        check_binding(config, run)
    run.storage.delete("run.yaml")
    with pytest.raises(RunFailed, match=r"run\.yaml: is gone"):
        check_binding(config, run)


def test_a_command_without_work_claims_nothing(raw: dict[str, Any]) -> None:
    config = config_of(raw)
    run_pipeline(config, "prepare")
    owner = open_run(config, "plad sample")
    run_pipeline(config, "prepare")
    check_owned(owner.storage)


def test_a_directory_with_claims_only_is_a_new_run(raw: dict[str, Any]) -> None:
    """A command can be killed right after its claim."""
    run = RunDir.of(config_of(raw)).claimed("plad run")
    with pytest.raises(UserError, match=r"not a run directory: it has no run\.yaml"):
        load_run(run.storage.url)
    assert open_run(config_of(raw)).storage.claim != run.storage.claim


def test_status_shows_the_owner_of_a_run_without_markup_or_control_characters(raw: dict[str, Any]) -> None:
    run = open_run(config_of(raw))
    caption = status_table(run.storage.url).caption
    assert str(caption).startswith("owner: `plad run` on ")
    assert str(caption).endswith(" UTC")
    take_claim(run.storage, "claims", "x", command="\x1b[2J[red]mine[/]", host="\n", pid={}, user=[])
    assert "[red]mine[/]" in str(status_table(run.storage.url).caption), "no markup"
    assert str(status_table(run.storage.url).caption).isprintable()
    run.storage.replace("claims/00003.json", b'{"time": 1e300, "command": 1}')
    assert "since an unknown time" in str(status_table(run.storage.url).caption)
