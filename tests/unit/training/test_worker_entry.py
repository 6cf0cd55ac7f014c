"""Entry of a Ray Train worker: light, and with the right device for its training process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from plad_dist.config_file import parse_config
from plad_dist.errors import RunFailed
from plad_dist.rundir import RunDir
from plad_dist.training.driver import trainer
from plad_dist.training.driver.elastic import GroupSettings, WorkerGroupCallbacks
from plad_dist.training.plan import plan_phase
from plad_dist.training.worker import entry
from tests.numerics.workers import config_with_pairs, make_run


def test_the_worker_of_ray_imports_neither_torch_nor_deepspeed() -> None:
    """Every restart of a group waits for its imports."""
    code = (
        "import sys, plad_dist.training.worker.entry; print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_ray_sends_to_a_worker_imports_no_torch_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = config_with_pairs(tmp_path)
    make_run(raw)
    config = parse_config(raw, "test")
    run = RunDir.of(config)
    sent: list[Any] = []
    monkeypatch.setattr(trainer, "Trainer", lambda function, **options: sent.append((function, options)))
    callbacks = WorkerGroupCallbacks(None, GroupSettings("round-0", 1, 1, 60.0, 5.0))
    trainer.build_trainer([plan_phase("round-0", config, run)], config, run, None, callbacks)
    function, options = sent[0]
    (tmp_path / "sent").write_bytes(
        ray.cloudpickle.dumps((function, options["train_loop_config"], options["backend_config"]))
    )
    code = (
        "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); print({'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sent")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_a_gpu_that_is_not_visible_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [3])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RunFailed, match="CUDA_VISIBLE_DEVICES=0,1: lacks GPU 3"):
        entry._device()


def test_a_relay_returns_the_latest_reply_without_waiting_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    replies: dict[str, int] = {}
    calls: list[str] = []

    def ask() -> str:
        calls.append(f"call {len(calls)}")
        return calls[-1]

    mailbox = SimpleNamespace(
        wants_yield=SimpleNamespace(remote=ask), present_group=SimpleNamespace(remote=lambda: "group")
    )
    replies["group"] = 1
    monkeypatch.setattr(ray, "wait", lambda pending, timeout: ([call for call in pending if call in replies], []))
    monkeypatch.setattr(ray, "get", replies.__getitem__)
    relay = entry._Relay(mailbox)
    assert relay.wants_yield() == 0
    assert relay.wants_yield() == 0, "no reply yet"
    replies["call 0"] = 7
    assert relay.wants_yield() == 7
    assert calls == ["call 0", "call 1"]
    assert relay.wants_yield() == 7


@pytest.mark.parametrize(
    ("gpus", "visible", "device"),
    [([], "", None), ([3], "1,3", 1), (["1"], "1,3", 0), ([3], None, 3), (["GPU-b"], "GPU-a,GPU-b", 1)],
)
def test_a_training_process_gets_its_own_gpu_among_those_of_the_node(
    monkeypatch: pytest.MonkeyPatch, gpus: list[int | str], visible: str | None, device: int | None
) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert entry._device() == device
