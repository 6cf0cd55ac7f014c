"""The token of a local Ray is readable by its user alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from plad_dist.cluster import protect_token


def test_the_token_of_a_local_ray_is_readable_by_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    protect_token()
    folder = tmp_path / ".ray"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "auth_token").write_text("secret")
    protect_token()
    assert stat.S_IMODE((folder / "auth_token").stat().st_mode) == 0o600


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    protect_token()
