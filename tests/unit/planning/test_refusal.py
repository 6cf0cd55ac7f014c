"""A run that cannot fit its cluster is refused before a device is held; others are not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from plad_dist.cluster import refuse_unfit
from plad_dist.config_file import load_config
from plad_dist.errors import UserError
from plad_dist.holders import Holder
from plad_dist.planning.fit import check_fits
from plad_dist.planning.hardware import Hardware, hardware_of_nodes
from tests.unit.planning.configs import H100, H100_NODES, qwen_72b_to_7b, ray_resources


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Capture the log that users see."""
    monkeypatch.setattr(logging.getLogger("plad"), "propagate", True)
    caplog.set_level(logging.INFO, logger="plad")
    return caplog


def test_a_run_that_cannot_fit_is_refused_unless_the_config_says_warn(log: pytest.LogCaptureFixture) -> None:
    hardware = hardware_of_nodes(ray_resources("H100"))
    assert hardware is not None
    assert hardware.gpu == H100
    with pytest.raises(
        UserError, match=r"does not fit:\n  training of Qwen/Qwen2.5-7B-Instruct(.|\n)*cluster.unfit=warn"
    ):
        refuse_unfit(qwen_72b_to_7b(num_workers=1), hardware)
    config = qwen_72b_to_7b(num_workers=1)
    warned = config.model_copy(update={"cluster": config.cluster.model_copy(update={"unfit": "warn"})})
    refuse_unfit(warned, hardware)
    assert "may not fit: training of" in log.text
    refuse_unfit(qwen_72b_to_7b(), hardware)


def test_finished_work_does_not_count() -> None:
    hardware = hardware_of_nodes(ray_resources("L4", gpus=1.0))
    with pytest.raises(UserError, match="does not fit"):
        refuse_unfit(qwen_72b_to_7b(), hardware)
    refuse_unfit(qwen_72b_to_7b(), hardware, [])
    refuse_unfit(qwen_72b_to_7b(), hardware, [Holder("judge")])


def test_an_elastic_group_is_refused_only_if_its_largest_size_does_not_fit_either(
    log: pytest.LogCaptureFixture,
) -> None:
    elastic = qwen_72b_to_7b(num_workers=(1, 16), deepspeed="zero3")
    (problem,) = check_fits(elastic, H100_NODES, [Holder("train", "round-0")])
    assert not problem.always
    refuse_unfit(elastic, hardware_of_nodes(ray_resources("H100", "H100")))
    assert "may not fit: training of" in log.text


@pytest.mark.parametrize("kinds", [("Sunway",), ("H100-MIG-1g",), ("L4", "H100")])
def test_nothing_is_refused_that_an_unknown_or_a_larger_node_may_hold(kinds: tuple[str, ...]) -> None:
    hardware = hardware_of_nodes(ray_resources(*kinds))
    assert hardware is None or hardware.gpu == H100
    refuse_unfit(qwen_72b_to_7b(), hardware)


def test_a_model_that_cannot_be_sized_stops_no_run(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 100}))
    config = load_config("examples/qwen-72b-to-7b.yaml", [f"teacher.path={tmp_path}"])
    with pytest.raises(UserError, match="cannot be sized"):
        check_fits(config, Hardware(H100, 1, 8, None))
    refuse_unfit(config, hardware_of_nodes(ray_resources("H100")))
    assert "not planned" in log.text
