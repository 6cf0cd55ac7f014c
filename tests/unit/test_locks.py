"""The locks: each package comes from one index, and its files are checked by their hashes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
TORCH = ROOT / "requirements/cpu-torch.txt"


def pins(lock: Path) -> list[str]:
    """Return the requirements of a lock, each with its hashes on one line."""
    lines = lock.read_text().replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock != TORCH], ids=lambda lock: lock.name)
def test_every_package_of_a_lock_is_pinned_with_hashes(lock: Path) -> None:
    assert pins(lock)
    for pin in pins(lock):
        assert re.fullmatch(r"[\w.-]+==[^\s;]+( ;.*?)?( +--hash=sha256:[0-9a-f]{64})+ *", pin), pin


def test_only_torch_comes_from_another_index() -> None:
    assert [pin.partition("==")[0] for pin in pins(TORCH)] == ["torch"]
    assert not any(pin.startswith("torch==") for lock in ("cpu.txt", "dev.txt") for pin in pins(TORCH.with_name(lock)))
    for name in ("Makefile", "Dockerfile", "requirements/lock"):
        text = (ROOT / name).read_text()
        assert not re.search(r"extra-index-url|unsafe-", text), name
