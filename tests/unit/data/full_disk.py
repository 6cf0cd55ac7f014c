"""Work of a run on a file system of a few MB that is full at each stage, and then given room.

Run as `python -m tests.unit.data.full_disk SMALL LARGE` in a mount namespace of its own, where
SMALL becomes the mount point.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from plad_dist.data.dataset import Dataset
from plad_dist.data.models import commit_model, model_problems, unfinished_model
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.verify.parts import check_dataset
from tests.file_faults import temporaries

SCHEMA = pa.schema([("x", pa.string())])
BLOCKS = 40  # of 60 KB


def mount(folder: Path, size: str, *options: str) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(folder)], check=True
    )


def rows(block: int) -> pa.Table:
    rng = random.Random(block)
    return pa.table({"x": [rng.randbytes(10_000).hex() for _ in range(3)]}, schema=SCHEMA)


def commit(root: Path) -> None:
    data = Dataset(Storage(str(root)), "d", SCHEMA)
    for block in set(range(BLOCKS)) - data.resume("f").keys():
        data.commit(block, rows(block), fingerprint="f", attempt=f"attempt of {block}")


def run(root: Path) -> None:
    """Commit all blocks and the manifest."""
    commit(root)
    data = Dataset(Storage(str(root)), "d", SCHEMA)
    parts = data.resume("f")
    data.finish(BLOCKS, fingerprint="f", facts={}, known_parts=[part for part in parts.values() if part])


def repair(root: Path) -> None:
    data = Dataset(Storage(str(root)), "d", SCHEMA)
    if bad := check_dataset(data).bad:
        data.reopen(data.manifest(), bad)


def upload(root: Path) -> None:
    source = root.parents[1] / "source"
    source.write_bytes(b"x" * (1 << 20))
    Storage(str(root)).upload("checkpoints/p/step-1/z.pt", source)


def model(root: Path) -> None:
    final = root / "models/a"
    with unfinished_model(final) as temporary:
        temporary.mkdir()
        for name in ("config.json", "tokenizer_config.json"):
            (temporary / name).write_text("{}")
        save_file({"w": np.zeros(1 << 18, np.float32)}, temporary / "model.safetensors")
        commit_model(temporary, final, "f", {})


def fails_for_want_of_space(command: Callable[[Path], None], root: Path) -> None:
    before = contents(root)
    with pytest.raises(RunFailed, match=r"No space left.*is kept"):
        command(root)
    after = contents(root)
    assert temporaries(root) == [], command
    assert before.items() <= after.items(), "nothing is changed or moved"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def fill(folder: Path) -> Path:
    """Take all remaining space."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096):
                pass
        except OSError:
            return ballast


def main(small: Path, large: Path) -> None:
    mount(small, "2m")
    root, other = small / "run", large / "run"
    fails_for_want_of_space(run, root)
    assert check_dataset(Dataset(Storage(str(root)), "d", SCHEMA)).problems == []
    mount(small, "8m", "remount")
    commit(root)
    ballast = fill(small)
    fails_for_want_of_space(run, root)
    ballast.unlink()
    run(root)
    run(other)
    assert contents(root) == contents(other), "the same bytes as if the disk had never been full"
    for folder in (root, other):
        path = folder / "d/part-00007.arrow"
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    ballast = fill(small)
    for command in (repair, upload, model):
        fails_for_want_of_space(command, root)
    ballast.unlink()
    for folder in (root, other):
        for command in (repair, run, upload, model):
            command(folder)
    undisturbed = contents(other)
    assert {name: data for name, data in contents(root).items() if "damaged" not in name} == {
        name: data for name, data in undisturbed.items() if "damaged" not in name
    }
    assert model_problems(root / "models/a") == []
    assert check_dataset(Dataset(Storage(str(root)), "d", SCHEMA)).problems == []
    print("the disk was full at each stage")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
