"""Checksums of parts, manifests and journal pages: every altered bit is found."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from plad_dist.data.dataset import Dataset
from plad_dist.data.journal import damaged_pages
from plad_dist.data.manifest import DamagedManifest, Manifest
from plad_dist.data.parts import DamagedPart, encode_part, read_header
from plad_dist.data.sealed import seal_problem, sealed_json, sealed_yaml, unsealed_json
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.verify.parts import check_dataset

SCHEMA = pa.schema([("x", pa.string())])


def rows(text: str = "the answer is 42", count: int = 50) -> pa.Table:
    return pa.table({"x": [text] * count}, schema=SCHEMA)


def dataset(folder: Path) -> Dataset:
    return Dataset(Storage(str(folder)), "d", SCHEMA)


def flips(data: bytes, seed: int = 0, samples: int = 400) -> Iterator[bytes]:
    """Yield copies with one flipped bit: in every byte of both ends, and sampled in between."""
    ends = {*range(min(600, len(data))), *range(max(0, len(data) - 600), len(data))}
    rng = random.Random(seed)
    for place in sorted(ends | {rng.randrange(len(data)) for _ in range(samples)}):
        altered = bytearray(data)
        altered[place] ^= 1 << rng.randrange(8)
        yield bytes(altered)


def test_a_bit_that_flips_in_a_part_before_a_journal_lists_it_is_found(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    data.commit(0, rows(), fingerprint="f", attempt="a")
    path = tmp_path / "d/part-00000.arrow"
    altered = bytearray(path.read_bytes())
    altered[altered.rfind(b"42")] ^= 1
    path.write_bytes(altered)
    assert check_dataset(data).problems == [
        "part-00000.arrow: damaged: its checksum differs from the one that it states"
    ]
    for use in (
        lambda: data.finish(1, fingerprint="f", facts={}),
        lambda: data.resume("f"),
        lambda: data.commit(0, rows(), fingerprint="f", attempt="b"),
        lambda: data.committed_parts(),
        lambda: data.origin(0),
    ):
        with pytest.raises(RunFailed, match=r"part-00000\.arrow: damaged: its checksum .*--repair"):
            use()
    assert path.read_bytes() == altered
    assert data.manifest() is None


def test_every_flipped_bit_of_a_part_is_found_by_its_own_checksum() -> None:
    data = encode_part(rows(), fingerprint="0" * 64, attempt="0" * 32, counts={"errors": 0})
    assert read_header(data).rows == 50
    for altered in flips(data):
        with pytest.raises(DamagedPart):
            read_header(altered)


def test_every_cut_of_a_part_is_found() -> None:
    data = encode_part(rows(), fingerprint="f", attempt="a", counts={})
    for end in (*range(0, len(data), 37), len(data) - 1):
        with pytest.raises(DamagedPart):
            read_header(data[:end])


def test_a_part_without_a_checksum_is_refused() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(rows())
    with pytest.raises(DamagedPart, match=r"does not state its checksum \(plad\.xxh3_128\)"):
        read_header(sink.getvalue())


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    data.commit(0, rows(), fingerprint="f", attempt="a", counts={"errors": 1})
    data.finish(1, fingerprint="f", facts={"k": {"n": 1}})
    path = tmp_path / "d/manifest.json"
    for altered in flips(path.read_bytes()):
        with pytest.raises(RunFailed, match=r"manifest\.json: (damaged|has version)"):
            Manifest.from_json(altered, "manifest.json")
        path.write_bytes(altered)
        result = check_dataset(data)
        assert result.problems or result.unchecked


def test_every_flipped_bit_of_a_journal_page_is_found_and_harmless(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    part, _ = data.commit(0, rows(), fingerprint="f", attempt="a", counts={"errors": 1})
    data.rewrite_journal("f", [part])
    (page,) = (tmp_path / "d/journal").iterdir()
    for altered in flips(page.read_bytes()):
        page.write_bytes(altered)
        assert [name for name, _ in damaged_pages(data.storage, "d/journal")] == [page.name]
        assert data.committed("f") == {0: None}, "the part is read instead"
    result = check_dataset(data)
    assert (result.problems, len(result.harmless)) == ([], 1)


@pytest.mark.parametrize("version", [2, 99])
def test_a_manifest_of_another_version_is_refused_by_its_number(tmp_path: Path, version: int) -> None:
    data = dataset(tmp_path)
    data.commit(0, rows(), fingerprint="f", attempt="a")
    data.finish(1, fingerprint="f", facts={})
    path = tmp_path / "d/manifest.json"
    document = json.loads(path.read_bytes()) | {"version": version}
    path.write_text(json.dumps(document))
    with pytest.raises(RunFailed, match=rf"has version {version}, this plad-dist reads version \d") as raised:
        data.manifest()
    assert not isinstance(raised.value, DamagedManifest), "a repair must not set it aside"


def test_a_manifest_with_an_unknown_or_repeated_field_is_damaged(tmp_path: Path) -> None:
    text = Manifest("f", [], {}).to_json().decode()
    body = text[: text.index(', "xxh3_128"')]
    for addition, problem in ((', "color": 1}', "unknown field 'color'"), (', "rows": 7}', "a key is given twice")):
        with pytest.raises(DamagedManifest, match=problem):
            Manifest.from_json(sealed_json(body + addition), "manifest.json")


def test_a_sealed_text_is_read_back_and_any_other_text_is_not_sealed() -> None:
    assert unsealed_json(sealed_json('{"a": {"b": {}}}\n')) == {"a": {"b": {}}}
    data = sealed_yaml("config:\n  seed: 5\n")
    assert yaml.safe_load(data) == {"config": {"seed": 5}}
    assert seal_problem(data) is None
    for altered in flips(data):
        assert seal_problem(altered) is not None
    for text in (b"", b"{}", b'{"xxh3_128": "12"}', b"\xff" * 200):
        assert seal_problem(text) is not None


def test_a_part_that_vanishes_or_changes_before_the_manifest_is_written_is_named(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    parts = [data.commit(block, rows(), fingerprint="f", attempt="a")[0] for block in range(2)]
    path = tmp_path / "d/part-00001.arrow"
    original = path.read_bytes()

    def finish() -> None:
        data.finish(2, fingerprint="f", facts={}, known_parts=parts)

    path.unlink()
    with pytest.raises(RunFailed, match=r"part-00001\.arrow: missing, although it was committed"):
        finish()
    data.commit(1, rows("other text of another length"), fingerprint="f", attempt="b")
    with pytest.raises(RunFailed, match=r"part-00001\.arrow: has changed since it was committed"):
        finish()
    assert data.manifest() is None
    path.write_bytes(original)
    finish()
    assert [part.name for part in data.require("x").parts] == ["part-00000.arrow", "part-00001.arrow"]


def test_a_surplus_part_of_another_config_is_refused_before_the_manifest(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    part, _ = data.commit(0, rows(), fingerprint="f", attempt="a")
    data.commit(7, rows(), fingerprint="other", attempt="a")
    with pytest.raises(UserError, match=r"part-00007\.arrow: made by another config"):
        data.finish(1, fingerprint="f", facts={}, known_parts=[part])
    assert data.manifest() is None


def test_a_manifest_of_another_config_is_not_replaced(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    part, _ = data.commit(0, rows(), fingerprint="f", attempt="a")
    data.finish(1, fingerprint="f", facts={})
    with pytest.raises(UserError, match=r"manifest\.json: made by another config"):
        data.finish(1, fingerprint="g", facts={}, known_parts=[part])


def test_a_superseded_command_writes_no_manifest(tmp_path: Path) -> None:
    from dataclasses import replace

    from plad_dist.data.claims import SupersededError, claim_run

    storage = Storage(str(tmp_path))
    data = Dataset(replace(storage, claim=claim_run(storage, "run")), "d", SCHEMA)
    part, _ = data.commit(0, rows(), fingerprint="f", attempt="a")
    claim_run(storage, "run")
    for write in (
        lambda: data.finish(1, fingerprint="f", facts={}, known_parts=[part]),
        lambda: data.reopen(None, [part.name]),
    ):
        with pytest.raises(SupersededError, match="has taken over the run"):
            write()
    assert data.manifest() is None
    assert data.committed().keys() == {0}
