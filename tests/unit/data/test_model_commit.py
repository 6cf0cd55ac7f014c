"""Models that a run creates: committed as a whole, never replaced silently, checked to the bit."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from plad_dist.config import Model
from plad_dist.config_file import parse_config
from plad_dist.data.models import (
    DamagedModel,
    check_local_model,
    check_weights,
    commit_model,
    model_fingerprint,
    model_identity,
    model_marker,
    model_problems,
    resolve_model,
    unfinished_model,
    weights_problems,
)
from plad_dist.errors import RunFailed, UserError
from plad_dist.rundir import RunDir
from tests.conftest import tiny_config
from tests.unit.data.test_checksums import flips

FAILURES = [errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT]


def write_model(folder: Path, value: float = 1.0) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    save_file({"w": np.full(64, value, np.float32)}, folder / "model.safetensors")


def make(final: Path, fingerprint: str = "f", value: float = 1.0, write: Callable[[Path], None] | None = None) -> None:
    with unfinished_model(final) as temporary:
        write(temporary) if write else write_model(temporary, value)
        commit_model(temporary, final, fingerprint, {"step": 9})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def failing(monkeypatch: pytest.MonkeyPatch, code: int, name: str) -> Any:
    """Let reads of the files with a name fail."""
    read_bytes, stat, opened = Path.read_bytes, Path.stat, Path.open

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def fail(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.name == name and not self.parent.name.startswith("."):
                raise OSError(code, os.strerror(code), str(self))
            return real(self, *arguments, **options)

        return fail

    for attribute, real in (("read_bytes", read_bytes), ("stat", stat), ("open", opened)):
        monkeypatch.setattr(Path, attribute, wrapped(real))


def test_commands_that_make_one_model_at_once_commit_one_whole_model(tmp_path: Path) -> None:
    final, start = tmp_path / "models/student-init", threading.Barrier(4)

    def command() -> None:
        start.wait()
        for _ in range(5):
            make(final)

    threads = [threading.Thread(target=command) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model_problems(final) == []
    assert [path.name for path in final.parent.iterdir()] == ["student-init"]


def test_a_model_of_the_same_fingerprint_stays(tmp_path: Path) -> None:
    final = tmp_path / "models/a"
    make(final, value=1.0)
    before = contents(final)
    make(final, value=2.0)
    assert contents(tmp_path / "models") == {f"a/{name}": data for name, data in before.items()}


def test_a_model_of_another_fingerprint_is_set_aside_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    final = tmp_path / "models/a"
    make(final, "old")
    before = contents(final)
    with caplog.at_level(logging.WARNING):
        make(final, "new", 2.0)
    assert model_fingerprint(final) == "new"
    (replaced,) = (tmp_path / "models/replaced").iterdir()
    assert contents(replaced) == before
    assert str(replaced) in caplog.text


def test_a_folder_without_a_marker_is_set_aside_too(tmp_path: Path) -> None:
    final = tmp_path / "models/a"
    write_model(final)
    make(final)
    (replaced,) = (tmp_path / "models/replaced").iterdir()
    assert contents(replaced).keys() == {"config.json", "tokenizer_config.json", "model.safetensors"}


@pytest.mark.parametrize("code", FAILURES)
def test_faults_while_a_marker_is_read_never_count_as_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    from plad_dist.training.driver.stage import are_trained  # imports torch

    run = RunDir.at(str(tmp_path / "run"))
    final = run.model("round-0")
    make(final)
    before = contents(run.root)
    with monkeypatch.context() as patch:
        failing(patch, code, "plad.json")
        for use in (
            lambda: are_trained(["round-0"], parse_config(tiny_config(tmp_path), "test"), run),
            lambda: model_identity(str(final), Model(path="x")),
            lambda: make(final, "other"),
            lambda: make(final),
        ):
            with pytest.raises(RunFailed, match=r"plad\.json: cannot be read: .*is kept"):
                use()
    assert contents(run.root) == before, "nothing was moved, and no temporary is left"


@pytest.mark.parametrize("code", FAILURES)
def test_faults_while_a_model_folder_is_looked_at_are_no_verdict_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    final = tmp_path / "model"
    make(final)
    for name, uses in {
        "model": [
            lambda: resolve_model(Model(path=str(final))),
            lambda: check_local_model(str(final)),
            lambda: check_weights(str(final)),
        ],
        "model.safetensors": [lambda: weights_problems(final), lambda: model_problems(final)],
        "config.json": [lambda: check_local_model(str(final)), lambda: model_problems(final)],
    }.items():
        for use in uses:
            with monkeypatch.context() as patch:
                failing(patch, code, name)
                with pytest.raises(RunFailed, match="cannot be read"):
                    use()


def test_a_damaged_marker_is_named_and_the_model_neither_used_nor_replaced(tmp_path: Path) -> None:
    final = tmp_path / "models/a"
    make(final)
    marker = final / "plad.json"
    for altered in flips(marker.read_bytes(), samples=50):
        with pytest.raises(DamagedModel, match=r"plad\.json: damaged: .* Nothing was changed"):
            marker.write_bytes(altered) and model_marker(final)
    before = contents(final)
    with pytest.raises(DamagedModel):
        make(final, "other")
    assert contents(tmp_path / "models") == {f"a/{name}": data for name, data in before.items()}


def test_every_flipped_bit_of_every_file_of_a_model_is_found(tmp_path: Path) -> None:
    final = tmp_path / "model"
    make(final)
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        original = (final / name).read_bytes()
        for altered in flips(original, samples=50):
            (final / name).write_bytes(altered)
            assert [problem for problem in model_problems(final) if problem.startswith(f"{name}: ")], altered
        (final / name).write_bytes(original)
    assert model_problems(final) == []


def test_a_missing_or_cut_file_of_a_model_is_found_before_it_is_loaded(tmp_path: Path) -> None:
    final = tmp_path / "model"
    make(final)
    (final / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"config\.json: damaged: has 3 bytes, 2 according to plad\.json"):
        check_weights(str(final))
    (final / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing"):
        check_weights(str(final))


def test_the_card_of_a_model_may_change(tmp_path: Path) -> None:
    final = tmp_path / "model"
    make(final)
    (final / "README.md").write_text("# A model")
    assert model_problems(final) == []


def test_the_marker_of_an_earlier_version_still_identifies_a_pretrained_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "model/plad.json").write_text(json.dumps({"fingerprint": "f", "facts": {"step": 9}}))
    assert model_identity(str(tmp_path / "model"), Model(path="x")) == "f"
    assert model_problems(tmp_path / "model") == []


def test_a_model_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    final = tmp_path / "models/a"

    def full(folder: Path) -> None:
        write_model(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunFailed, match=r"models/a: cannot be written: .*No space left.*is kept"):
        make(final, write=full)
    assert contents(tmp_path) == {}
    make(final)
    assert model_problems(final) == []


def test_a_tokenizer_that_cannot_be_written_is_no_crash(tmp_path: Path) -> None:
    """Its package raises a plain Exception."""
    final = tmp_path / "models/a"

    def full(folder: Path) -> None:
        write_model(folder)
        (folder / "tokenizer.json").symlink_to("/dev/full")
        Tokenizer(BPE()).save(str(folder / "tokenizer.json"))

    with pytest.raises(RunFailed, match=r"models/a: cannot be written: No space left.*is kept"):
        make(final, write=full)
    assert contents(tmp_path) == {}


def test_folders_of_dead_processes_are_removed_after_an_hour(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name, age in (
        (f".writing-a-{'0' * 32}", 7200),
        (f".writing-a-{'1' * 32}", 60),
        (f".writing-b-{'0' * 32}", 7200),
    ):
        write_model(models / name)
        time = (models / name).stat().st_mtime - age
        os.utime(models / name, (time, time))
    make(models / "a")
    assert {path.name for path in models.iterdir()} == {"a", f".writing-a-{'1' * 32}", f".writing-b-{'0' * 32}"}
