"""Safetensors files, read by offset: any elements of a tensor, without the rest of the file.

A file is 8 bytes with the length of a JSON header, the header, and the bytes of the tensors.
Source: https://github.com/huggingface/safetensors, "Format". The library itself maps whole files
into memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from plad_dist.data.local_files import CHUNK_BYTES, failure_explained
from plad_dist.errors import RunFailed

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor in a file.

    Attributes:
        kind: name of the data type in the file's header.
        offset: offset of its bytes in the file.
        size: number of its bytes.
    """

    file: BinaryIO
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Data type of the elements; None if no model is loaded from it."""
        return _TYPES.get(self.kind)

    def contents(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces, each of which is valid until the next one.

        Raises:
            RunFailed: the file cannot be read, or is too short.
        """
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.size)))
        for first in range(0, self.size, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, self.size - first)]
            self._read(piece, self.offset + first)
            yield piece

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the flat elements from `start` to `end` in pieces, each with its first index.

        A piece is valid until the next one.

        Raises:
            RunFailed: the file cannot be read, or is too short.
        """
        assert self.dtype is not None
        length = CHUNK_BYTES // self.dtype.itemsize
        buffer = torch.empty(min(length, end - start), dtype=self.dtype)
        for first in range(start, end, length):
            piece = buffer[: min(length, end - first)]
            self._read(memoryview(piece.view(torch.uint8).numpy()), self.offset + first * self.dtype.itemsize)
            yield first, piece

    def _read(self, view: memoryview, offset: int) -> None:
        done = 0
        with failure_explained(self.file.name, "read"):
            while done < len(view):
                count = os.preadv(self.file.fileno(), [view[done:]], offset + done)
                if count == 0:
                    raise RunFailed(f"{self.file.name}: ends before its last tensor; copy the model again")
                done += count


class WeightFiles:
    """Open files of a model.

    Attributes:
        tensors: places of the tensors by name, in the order of the files, sorted in each.
        digest: checksum of the headers and of a sample of the bytes of each file. Copies of other
            weights differ in it, since training changes nearly all bytes.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._open, digest = ExitStack(), xxhash.xxh3_128()
        for path in map(Path, paths):
            with failure_explained(str(path), "read"):
                file = self._open.enter_context(path.open("rb", buffering=0))
                start = 8 + int.from_bytes(file.read(8), "little")
                header_bytes = file.read(start - 8)
                digest.update(header_bytes)
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, (start + path.stat().st_size) // 2))
            header = json.loads(header_bytes)
            for name in sorted(header.keys() - {"__metadata__"}):
                kind, shape, (offset, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
                self.tensors[name] = StoredTensor(file, kind, tuple(shape), start + offset, end - offset)
        self.digest = digest.hexdigest()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._open.close()
