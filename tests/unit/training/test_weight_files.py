"""Slices of safetensors files are the elements that the library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plad_dist.errors import RunFailed
from plad_dist.training.model import weight_files
from plad_dist.training.model.weight_files import StoredTensor, WeightFiles


def elements(tensor: StoredTensor, start: int, end: int) -> torch.Tensor:
    """Return a slice, put together from its pieces."""
    assert tensor.dtype is not None
    out = torch.zeros(end - start, dtype=tensor.dtype)
    for first, piece in tensor.pieces(start, end):
        out[first - start :][: len(piece)] = piece
    return out


def test_any_slice_of_any_data_type_is_read_by_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "CHUNK_BYTES", 16)
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
    saved = {str(dtype): torch.arange(35).to(dtype).view(5, 7) for dtype in [*types, torch.bool]}
    halves = [dict(list(saved.items())[:3]), dict(list(saved.items())[3:])]
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"{number}.safetensors")
    with WeightFiles([str(tmp_path / f"{number}.safetensors") for number in (0, 1)]) as files:
        assert list(files.tensors) == sorted(halves[0]) + sorted(halves[1])
        for name, tensor in saved.items():
            assert (files.tensors[name].shape, files.tensors[name].dtype) == ((5, 7), tensor.dtype)
            for start, end in ((0, 35), (3, 20), (34, 35), (7, 7)):
                assert torch.equal(elements(files.tensors[name], start, end), tensor.flatten()[start:end])


def test_a_file_that_ends_early_is_a_failure_and_not_a_signal(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(100)}, file)
    with WeightFiles([str(file)]) as files:
        file.write_bytes(file.read_bytes()[:-8])
        assert elements(files.tensors["weight"], 0, 98).sum() == 98
        with pytest.raises(RunFailed, match=r"model.safetensors: ends before its last tensor"):
            elements(files.tensors["weight"], 0, 100)


def test_copies_of_other_weights_have_another_digest(tmp_path: Path) -> None:
    digests = []
    for number, step in enumerate((1.0, 1.0, 1.01)):
        file = tmp_path / f"{number}.safetensors"
        save_file({"weight": torch.arange(1 << 16) * step}, file)
        with WeightFiles([str(file)]) as files:
            digests.append(files.digest)
    assert digests[0] == digests[1] != digests[2]
