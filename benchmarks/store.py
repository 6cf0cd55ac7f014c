"""Costs of the shard store: commits, a resume with 100,000 parts, and reads against pyarrow.

- `commit_parts_per_s`: one writer with four threads commits parts of 512 samples each: encoding,
  checksum and put-if-absent on the local file system, synced to disk.
- `resume_seconds_100k_parts`: a resume from a dataset of 100,000 committed parts without a
  manifest, as a killed driver leaves it. The journal lacks the last 500 parts. This is the number
  that 1,000 engines, at one part per minute each, commit in the 30 seconds between two writes of
  the journal. These parts hold 512 samples, because the resume reads them; the other parts are
  small, because it does not. The time covers a new process that finds the committed parts, reads
  those that the journal lacks, and writes the manifest.
- `read_gb_per_s`, `read_ratio_vs_pyarrow`: the same parts read through the store, with verified
  checksums, and memory-mapped by plain pyarrow, in alternation. Both readers touch every byte of
  every column once, as a consumer does (by a sum over all buffers), because an untouched memory map
  reads nothing. The ratio is the speed of the store over that of pyarrow, from median times.
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

from plad_dist.data.dataset import Dataset
from plad_dist.data.parts import part_name
from plad_dist.data.schemas import SAMPLES
from plad_dist.data.storage import Storage

FINGERPRINT = "benchmark"
UNKNOWN = 500  # parts missing from the journal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--parts", type=int, default=100_000, help="committed parts in the resume")
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
    """Return the rates of writing and reading parts of 512 samples."""
    data = Dataset(Storage(str(folder)), "samples", SAMPLES)
    tables = [samples(seed) for seed in range(8)]
    started = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        committed = list(
            threads.map(lambda k: data.commit(k, tables[k % 8], fingerprint=FINGERPRINT, attempt="a")[0], range(parts))
        )
    commit_rate = parts / (time.perf_counter() - started)
    data.finish(parts, fingerprint=FINGERPRINT, facts={}, known_parts=committed)
    size = sum(part.bytes for part in committed)
    files = [str(folder / "samples" / part.name) for part in committed]
    seconds: dict[str, list[float]] = {"store": [], "pyarrow": []}
    for _ in range(repeats + 1):
        for name, tables_read in (("pyarrow", plain(files)), ("store", stored(data, parts))):
            started = time.perf_counter()
            total = sum(map(consume, tables_read))
            seconds[name].append(time.perf_counter() - started)
            assert total > 0
    medians = {
        name: statistics.median(values[1:]) for name, values in seconds.items()
    }  # the first round warms the page cache
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
    """Sum every byte of every buffer."""
    total = 0
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    total += int(np.frombuffer(buffer, np.uint8).sum(dtype=np.uint64))
    return total


def samples(seed: int, rows: int = 512) -> pa.Table:
    """Return samples of about 200 tokens each."""
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
    """Leave parts as a killed driver does, resume in a new process and return its seconds."""
    data = Dataset(Storage(str(folder)), "many", SAMPLES)
    journal = data.journal(FINGERPRINT)
    tables = [samples(seed) for seed in range(4)]
    counts = {"errors": 0, "tokens": 3}
    small, _ = data.commit(0, tables[0].slice(0, 1), fingerprint=FINGERPRINT, attempt="a", counts=counts)
    journal.add(small)
    first = (folder / "many" / small.name).read_bytes()
    for block in range(1, parts - UNKNOWN):  # bypasses the store: syncs are not measured here
        (folder / "many" / part_name(block)).write_bytes(first)
        journal.add(replace(small, name=part_name(block)))
    journal.flush()
    for block in range(parts - UNKNOWN, parts):
        data.commit(block, tables[block % 4], fingerprint=FINGERPRINT, attempt="a", counts=counts)
    command = [sys.executable, "-m", "benchmarks.store", "--resume", str(folder), "--parts", str(parts)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resume(folder: Path, parts: int) -> float:
    """Return the seconds until a new driver has written the manifest."""
    data = Dataset(Storage(str(folder)), "many", SAMPLES)
    started = time.perf_counter()
    resumed = data.resume(FINGERPRINT)
    assert len(resumed) == parts
    data.finish(parts, fingerprint=FINGERPRINT, facts={}, known_parts=[part for part in resumed.values() if part])
    return round(time.perf_counter() - started, 3)


if __name__ == "__main__":
    main()
