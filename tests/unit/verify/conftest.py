"""A run directory to verify."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_dist.config_file import parse_config
from plad_dist.data.prompts import heldout_prompts, prepare, train_prompts
from plad_dist.rundir import RunDir, open_run
from tests.conftest import tiny_config, write_prompts
from tests.damaged_runs import write_samples


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Return a run with complete prompts and two samples of the teacher for each prompt."""
    write_prompts(tmp_path, 300)
    raw = tiny_config(tmp_path)
    raw["sampling"]["teacher"]["n"] = 2
    config = parse_config(raw, "test")
    prepare(config, open_run(config).storage)
    run = RunDir.of(config)  # without a claim, which a repair supersedes
    write_samples(run.samples("teacher"), train_prompts(run.storage), 2)
    write_samples(run.heldout_samples("teacher"), heldout_prompts(run.storage), 1)
    return run
