"""What the shard store costs: commits, going on with 100,000 parts, and reading against plain pyarrow.

- `commit_parts_per_s`: parts of 512 samples each committed by one writer with four threads: encoding, checksum and
  put-if-absent on the local file system, synced to the disk.
- `resume_seconds_100k_parts`: a dataset of 100,000 committed parts without a manifest, as a killed driver leaves it: with its
  journal, but for the last 500 parts, which is what 1,000 engines at a part a minute each commit in the 30 seconds between
  two writes of the journal. Those are parts of 512 samples, since they are read; the others, which are not, are small. The time
  is that in which a new process knows what is committed, has read what the journal lacks and has written the manifest.
- `read_gb_per_s`, `read_ratio_vs_pyarrow`: the same parts read through the store, with checksums verified, and memory-mapped by
  plain pyarrow, alternated. Both readers touch every byte of every column once, as a consumer does (sums of the numbers and of
  the bytes of the texts): a memory map that nobody looks at reads nothing. The ratio is store over pyarrow, of medians.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from plad_dist.data.schemas import SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Journal, part_name

FINGERPRINT = "benchmark"
UNKNOWN = 500  # parts that the journal lacks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--parts", type=int, default=100_000, help="parts of the resume")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume:
        print(resume(Path(arguments.resume), arguments.parts))
        return
    folder = Path(tempfile.mkdtemp(prefix="plad-store-"))
    try:
        figures = {
            **commit_and_read(folder, arguments.repeats),
            "resume_seconds_100k_parts": resume_seconds(folder, arguments.parts),
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures))


def commit_and_read(folder: Path, repeats: int, parts: int = 400) -> dict[str, float]:
    """Rates of writing and of reading parts of 512 samples."""
    data = Dataset(Storage(str(folder)), "samples", SAMPLES)
    tables = [samples(seed) for seed in range(8)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        committed = list(
            threads.map(lambda k: data.commit(k, tables[k % 8], fingerprint=FINGERPRINT, attempt="a")[0], range(parts))
        )
    commit_rate = parts / (time.perf_counter() - begun)
    data.finish(parts, fingerprint=FINGERPRINT, facts={}, known=committed)
    size = sum(part.bytes for part in committed)
    files = [str(folder / "samples" / part.name) for part in committed]
    seconds: dict[str, list[float]] = {"store": [], "pyarrow": []}
    for _ in range(repeats + 1):
        for name, tables_read in (("pyarrow", plain(files)), ("store", stored(data, parts))):
            begun = time.perf_counter()
            total = sum(map(consume, tables_read))
            seconds[name].append(time.perf_counter() - begun)
            assert total > 0
    medians = {
        name: statistics.median(values[1:]) for name, values in seconds.items()
    }  # the first warms the page cache
    return {
        "commit_parts_per_s": round(commit_rate, 1),
        "read_gb_per_s": round(size / medians["store"] / 1e9, 3),
        "read_ratio_vs_pyarrow": round(medians["pyarrow"] / medians["store"], 3),
        "part_bytes": round(size / parts),
    }


def stored(data: Dataset, parts: int) -> Iterator[pa.Table]:
    for block in range(parts):
        yield data.read_block(block)


def plain(files: list[str]) -> Iterator[pa.Table]:
    for file in files:
        with pa.memory_map(file) as source:
            yield pa.ipc.open_file(source).read_all()


def consume(table: pa.Table) -> int:
    """Touch every byte of every buffer."""
    total = 0
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    total += int(np.frombuffer(buffer, np.uint8).sum(dtype=np.uint64))
    return total


def samples(seed: int, rows: int = 512) -> pa.Table:
    """Samples of about 200 tokens each."""
    rng = random.Random(seed)
    lengths = [rng.randint(20, 400) for _ in range(rows)]
    ids = [[rng.randrange(128_000) for _ in range(length)] for length in lengths]
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": f"{rng.getrandbits(96):024x}",
                "sample_index": 0,
                "role": "teacher",
                "text": " ".join(f"word{token % 1000}" for token in row),
                "token_ids": row,
                "logprob": -float(len(row)),
                "num_tokens": len(row),
                "finish_reason": "stop",
                "error": None,
                "model": "models/teacher",
                "round": 0,
            }
            for row in ids
        ],
        schema=SAMPLES,
    )


def resume_seconds(folder: Path, parts: int) -> float:
    """Leave many parts as a driver that is killed does, and go on in a new process."""
    data = Dataset(Storage(str(folder)), "many", SAMPLES)
    journal = Journal(data, FINGERPRINT)
    tables = [samples(seed) for seed in range(4)]
    counts = {"errors": 0, "tokens": 3}
    small, _ = data.commit(0, tables[0].slice(0, 1), fingerprint=FINGERPRINT, attempt="a", counts=counts)
    journal.add(small)
    first = (folder / "many" / small.name).read_bytes()
    for block in range(1, parts - UNKNOWN):  # not through the store: to sync each one is not what is measured
        (folder / "many" / part_name(block)).write_bytes(first)
        journal.add(replace(small, name=part_name(block)))
    journal.flush()
    for block in range(parts - UNKNOWN, parts):
        data.commit(block, tables[block % 4], fingerprint=FINGERPRINT, attempt="a", counts=counts)
    command = [sys.executable, "-m", "benchmarks.store", "--resume", str(folder), "--parts", str(parts)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resume(folder: Path, parts: int) -> float:
    """Seconds until a new driver has the manifest."""
    data = Dataset(Storage(str(folder)), "many", SAMPLES)
    begun = time.perf_counter()
    found = data.go_on(FINGERPRINT)
    assert len(found) == parts
    data.finish(parts, fingerprint=FINGERPRINT, facts={}, known=[part for part in found.values() if part])
    return round(time.perf_counter() - begun, 3)


if __name__ == "__main__":
    main()
