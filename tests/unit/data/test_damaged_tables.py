"""Damaged, crafted and truncated tables end in a message, never in a signal."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset as LibraryDataset
from datasets import DatasetDict

from plad_dist.config import DatasetSource
from plad_dist.data import datasets_library
from plad_dist.data import storage as storage_module
from plad_dist.data.dataset import Dataset
from plad_dist.data.datasets_library import dataset_records
from plad_dist.data.files import records
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError

TABLE = pa.table({"prompt": ["aaaa", "bbbb", "cccc"], "n": pa.array([[1], [2, 3], []], pa.list_(pa.int32()))})

READ_ALL = """
import sys
from pathlib import Path
from plad_dist.data.files import records
from plad_dist.errors import UserError
outcomes = {"rows": 0, "refused": 0}
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        list(records(str(file), None))
        outcomes["rows"] += 1
    except UserError as error:
        assert str(file) in str(error), error
        outcomes["refused"] += 1
print(outcomes)
"""


def write(path: Path, table: pa.Table = TABLE) -> bytes:
    """Write a table in the format of the name."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        kind = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with kind(str(path), table.schema) as writer:
            writer.write_table(table)
    return path.read_bytes()


@pytest.mark.parametrize("offsets", [(0, 4, 8, 4096), (0, 4, 8, 0x7FFF0000), (0, 8, 4, 12), (-4, 4, 8, 12)])
@pytest.mark.parametrize("name", ["evil.arrow", "stream.arrow"])
def test_offsets_out_of_bounds_are_refused(tmp_path: Path, name: str, offsets: tuple[int, ...]) -> None:
    path = tmp_path / name
    data = bytearray(write(path))
    place = data.find(struct.pack("<4i", 0, 4, 8, 12))
    data[place : place + 16] = struct.pack("<4i", *offsets)
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: not a readable arrow file: .*check that it is complete"):
        list(records(str(path), ["prompt"]))


def test_no_damage_of_a_table_kills_the_process(tmp_path: Path) -> None:
    folder, rng = tmp_path / "files", random.Random(5)
    folder.mkdir()
    for name in ("a.arrow", "stream.arrow", "a.parquet"):
        original = write(tmp_path / name)
        for number in range(150):
            data = bytearray(original)
            if number % 3:
                for _ in range(1 + number % 4):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                del data[rng.randrange(len(data)) :]
            (folder / f"{number:03d}-{name}").write_bytes(data)
    child = subprocess.run([sys.executable, "-c", READ_ALL, str(folder)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert "refused" in child.stdout


def test_only_the_needed_columns_of_an_arrow_file_are_read_in_any_order(tmp_path: Path) -> None:
    for name in ("a.arrow", "stream.arrow"):
        write(tmp_path / name)
        rows = [record for _, _, record in records(str(tmp_path / name), ["n", "prompt"])]
        assert rows[1] == {"n": [2, 3], "prompt": "bbbb"}
        assert list(rows[1]) == ["n", "prompt"]


def test_a_date_that_python_does_not_have_is_a_message_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path, pa.table({"prompt": ["a"], "t": pa.array([2**62], pa.timestamp("s"))}))
    with pytest.raises(UserError, match=r"a\.arrow: row 0 \(counted from 0\), or one after it: cannot be read"):
        list(records(str(path), None))


def test_a_crafted_table_that_save_to_disk_wrote_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    LibraryDataset.from_dict({"prompt": ["aaaa", "bbbb", "cccc"]}).save_to_disk(str(tmp_path / "d"))
    (path,) = (tmp_path / "d").glob("*.arrow")
    data = bytearray(path.read_bytes())
    place = data.find(struct.pack("<4i", 0, 4, 8, 12))
    data[place : place + 16] = struct.pack("<4i", 0, 4, 8, 0x7FFF0000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"\.arrow: not a readable arrow file"):
        list(dataset_records(DatasetSource(type="dataset", name=str(tmp_path / "d")), "prompts", ["prompt"]))


def test_a_part_that_is_cut_short_while_it_is_checked_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = pa.schema([("x", pa.string())])
    data = Dataset(Storage(str(tmp_path)), "d", schema)
    data.commit(0, pa.table({"x": ["y" * 1000] * 2000}, schema=schema), fingerprint="f", attempt="a")
    data.finish(1, fingerprint="f", facts={})
    real = storage_module.read_hashed

    def cut(file: object) -> object:
        os.truncate(tmp_path / "d/part-00000.arrow", 4096)  # as another node, or a bad disk, does
        return real(file)

    monkeypatch.setattr(storage_module, "read_hashed", cut)
    with pytest.raises(RunFailed, match=r"part-00000\.arrow: damaged: it has 4,096 bytes"):
        data.read_block(0)


def test_only_the_files_of_the_wanted_split_are_checked_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = LibraryDataset.from_dict({"prompt": ["aaaa"]})
    DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "d"))
    (tmp_path / "d" / "train" / "cache-0.arrow").write_bytes(b"half")
    for file in (tmp_path / "d" / "test").glob("*.arrow"):
        file.write_bytes(b"damaged")
    checked: list[str] = []
    monkeypatch.setattr(datasets_library, "check_arrow_file", checked.append)
    source = DatasetSource(type="dataset", name=str(tmp_path / "d"), split="train")
    for _ in range(2):
        assert len(list(dataset_records(source, "prompts", ["prompt"]))) == 1
    assert [Path(file).name for file in checked] == ["data-00000-of-00001.arrow"]
    other = source.model_copy(update={"split": "validation"})
    with pytest.raises(UserError, match=r"prompts\.split: .* has no split 'validation'; it has test, train"):
        list(dataset_records(other, "prompts", ["prompt"]))
