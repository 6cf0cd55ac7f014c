"""Storage that cannot be written, overwrites, or is not shared is found; no probe stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from plad_dist.data.storage import Storage
from plad_dist.doctor import reach_checks
from plad_dist.doctor.examine import probes
from plad_dist.doctor.findings import run_check
from plad_dist.doctor.node import Node, StorageSite
from plad_dist.doctor.reach_checks import check_storage
from tests.conftest import write_config
from tests.unit.doctor.findings import contents, failures, only, site_at, states


def test_storage_that_cannot_be_written_fails_and_nothing_stays_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the user")
    before = contents(tmp_path)
    for folder in (tmp_path / "file" / "run", Path("/proc/plad-run")):
        with probes([site_at(folder)]) as writable:
            assert writable == ()
            finding = only(check_storage(Node("n", sites=(site_at(folder),))), "fail")
        assert str(folder) in finding.text
        assert ".doctor" not in finding.text
    assert contents(tmp_path) == before


def test_a_read_only_run_directory_exits_with_1(
    run: tuple[Path, dict[str, Any]], doctor: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = run
    code, printed = doctor(str(write_config(folder, raw)), "run.dir=/proc/plad-run", "--json")
    assert code == 1
    assert "storage" in {finding["check"] for finding in failures(printed)}


def test_storage_that_overwrites_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "create", lambda self, key, data: True)
    finding = only(check_storage(Node("n", sites=(site_at(tmp_path),))), "fail")
    assert "overwrites existing objects although a conditional put forbids it" in finding.text


def test_a_run_directory_on_a_nodes_own_disk_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_checks, "_VISIBLE_WITHIN_S", 0.1)

    def check(node: Node) -> Any:
        return run_check("storage", node.name, partial(check_storage, node))

    with probes([site_at(tmp_path / "here")]) as shared:
        assert states(check(Node("a", "member", shared))) == ["ok"]
        finding = only(check(Node("b", "member", (site_at(tmp_path / "there"),))), "fail")
    assert finding.node == "b"
    assert "another folder" in finding.text
    assert "file system that all nodes share" in finding.remedy
    assert not list(tmp_path.iterdir()), "no probe stays in either folder"


def test_the_files_of_a_run_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "run.yaml").write_text("config: {}")
    before = contents(tmp_path / "run")
    with probes([site_at(tmp_path / "run"), site_at(tmp_path / "run" / "checkpoints")]) as writable:
        assert len(writable) == 2
        assert states(check_storage(Node("n", "member", writable))) == ["ok", "ok"]
    assert contents(tmp_path / "run") == before


def test_object_stores_are_probed_like_file_systems(bucket: str) -> None:
    site = StorageSite("run.dir", bucket, ".doctor-test")
    with probes([site]) as writable:
        assert states(check_storage(Node("n", "member", writable))) == ["ok"]
    assert site.storage.sizes("") == {}
    with probes([StorageSite("run.dir", "s3://no-such-bucket/run", ".doctor-test")]) as writable:
        assert writable == ()
