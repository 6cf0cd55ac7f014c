"""Shared by the tests: a tiny run config, its prompts, and ways to run `plad`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

from tests.s3 import bucket, server  # noqa: F401 - fixtures

settings.register_profile("plad", deadline=None, derandomize=True)
settings.load_profile("plad")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,  # of width 32, the smallest that vLLM's CPU attention takes
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Run `plad` in this process. Return its exit code, stdout and stderr."""
    from plad_dist.cli import main

    monkeypatch.setattr(sys, "argv", ["plad", *arguments])
    try:
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def tiny_config(folder: Path) -> dict[str, Any]:
    """Return the config of a small complete run: 600 prompts, scratch models, two workers."""
    role = {"temperature": 1.0, "max_tokens": 8, "engine": {"max_num_seqs": 128, "kv_cache_memory_bytes": 1 << 27}}
    phase = {"batch_groups": 32, "checkpoint_every": 10, "optimizer": {"lr": 3e-3}}
    return {
        "run": {"dir": str(folder / "run"), "seed": 5},
        "prompts": {
            "source": {"type": "files", "paths": [str(folder / "prompts.jsonl")], "reference_column": "answer"},
            "heldout_fraction": 0.1,
            "block_size": 64,
        },
        "teacher": {
            "scratch": {
                "architecture": SHAPE | {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
                "vocab_size": 320,
            },
            "template": "{{ messages[-1].content }} =",
        },
        "student": {
            "scratch": {"architecture": SHAPE, "vocab_size": 320},
            "template": "{{ messages[-1].content }} =",
        },
        "sampling": {"teacher": role, "student": copy.deepcopy(role), "window": 2},
        "training": {
            "num_workers": 2,
            "micro_batch_tokens": 512,
            "teacher": phase | {"epochs": 4, "optimizer": {"name": "muon", "lr": 1e-2, "adam_lr": 5e-3}},
            "warmup": phase | {"epochs": 1},
            "round": phase | {"epochs": 8, "loss": {"mle_weight": 2.0}},
            "seqkd": phase,
        },
        "evaluation": {
            "limit": 40,
            "bootstrap": 200,
            "warmup_temperatures": [0.5],
            "candidates": 2,
        },
    }


def write_prompts(folder: Path, rows: int = 600) -> Path:
    """Write prompts that ask for the larger of two numbers, with references."""
    path = folder / "prompts.jsonl"
    with path.open("w") as file:
        for row in range(rows):
            a, b = row % 37, (row * 7) % 31
            file.write(json.dumps({"prompt": f"larger of {a} and {b}", "answer": f"it is {max(a, b)}"}) + "\n")
    return path


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def plad(*arguments: str, timeout: float = 600, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run `plad` in a process of its own."""
    command = [sys.executable, "-c", "from plad_dist.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a folder with prompts, and a config that reads them."""
    write_prompts(tmp_path)
    return tmp_path, tiny_config(tmp_path)
