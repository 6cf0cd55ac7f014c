"""Stage `prepare` beside other commands, and parts that change under its hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plad_dist.data import prompts as stage
from plad_dist.data.dataset import Dataset
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import open_run
from tests.unit.data.prompt_stage import config_of, raw_config


def test_a_part_that_another_command_commits_late_is_refused_until_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_config(tmp_path, map(str, range(400)), block_size=16)
    config, commit = config_of(raw), Dataset.commit

    def late(self: Dataset, block: int, table: Any, **kwargs: Any) -> Any:
        if block == 1 and self.path == "prompts":
            commit(self, block, table, fingerprint="another", attempt="late")
        return commit(self, block, table, **kwargs)

    run = open_run(config)
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "commit", late)
        with pytest.raises(
            RunFailed, match=r"part-00001\.arrow: made by another config.*\. Another command.*run again"
        ):
            prepare(config, run.storage)
    assert prepare(config, open_run(config).storage)["train"] > 0
    assert list((run.root / "prompts" / "damaged").glob("part-00001.arrow.*"))


def test_a_part_that_was_damaged_meanwhile_does_not_hide_the_error_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_MAX_BYTES_READ_TWICE", 0)
    raw = raw_config(tmp_path, [*map(str, range(1200)), "7"], block_size=16, duplicates="fail")
    run, commit = open_run(config_of(raw)), Dataset.commit

    def damaged(self: Dataset, block: int, *args: Any, **kwargs: Any) -> Any:
        outcome = commit(self, block, *args, **kwargs)
        if block == 1 and self.path == "prompts":
            (run.root / "prompts" / "part-00001.arrow").write_bytes(b"damaged")
        return outcome

    monkeypatch.setattr(Dataset, "commit", damaged)
    with pytest.raises(UserError, match=r"prompts\.duplicates to keep or drop"):
        prepare(config_of(raw), run.storage)
    assert set(train_prompts(run.storage).committed()) == {1}
