"""Soak test: a whole pipeline under random faults, checked for lost or repeated work.

The cluster on this machine has a head that takes no work and two nodes, each in its own network
namespace. It runs real vLLM, Ray Train and DeepSpeed. Successive commands distil a tiny student
from a tiny teacher, each in its own run directory.

- During sampling, engines, nodes and the driver are killed.
- During training, workers, nodes and the driver are killed, workers freeze, and nodes leave with a
  preemption notice.
- Sampling has faults only in the first third of the time; otherwise a run would rarely reach
  training.

The seed determines the kind and time of the faults. A lost node is replaced, and a lost driver is
restarted. After the given time, the last run ends without further faults. Then every run is
checked: each prompt has each of its samples exactly once, every step was trained, and no committed
data is damaged. The phase with the most attempts is trained once more without faults, from the same
pairs.

Figures:

- `lost`: missing samples or steps, and problems that `plad verify` finds;
- `duplicated`: samples that exist twice, and steps that one attempt took twice;
- `steps_taken_again`: steps that a later attempt repeated;
- `recoveries`: faults after which the run made progress beyond the state five seconds after the
  fault;
- `hung`: periods of five minutes without progress;
- `failed`: commands that ended with an error;
- `max_rel_loss_diff`: largest relative loss difference between the disturbed phase and its
  repetition.

A hung or failed command ends the soak with exit code 1. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from plad_dist.config_file import load_config
from plad_dist.data.prompts import train_prompts
from plad_dist.rundir import RunDir, open_run
from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.verify.run import verify
from tests.nodes import Cluster, Node, available
from tests.tiny import sampling_config

PROMPTS, STEPS, EVERY = 600, 150, 10
PAUSE_S = (10.0, 40.0)  # between two faults
HUNG_S = 300.0
_SETTLE_S = 5.0  # after a fault, for work in flight to end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always the JSON object")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if (why := available()) is not None:
        print(json.dumps({"benchmark": "soak", "skipped": why}))
        return
    with tempfile.TemporaryDirectory(prefix="plad-soak-") as folder:
        soak, broken = Soak(Path(folder), arguments.seed), Counter(hung=0, failed=0)
        try:
            soak.disturb(arguments.minutes * 60)
            difference = soak.compare()
        except Broken as error:
            broken[error.kind] += 1
            print(error, file=sys.stderr)
            difference = None
        finally:
            soak.cluster.end()
        figures = soak.figures() | {"max_rel_loss_diff": difference} | broken
    print(json.dumps({"benchmark": "soak", "seed": arguments.seed, **figures}))
    sys.exit(1 if broken.total() else 0)


class Broken(Exception):
    """Raised when a command hung or failed, which ends the soak."""

    def __init__(self, kind: str, log: Path) -> None:
        super().__init__(f"{kind}: {log.read_text()[-4000:]}")
        self.kind = kind


class Soak:
    """The cluster, its runs and the faults injected into them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self.cluster = Cluster(folder)
        self._nodes = [self.cluster.add(cpus=2), self.cluster.add(cpus=2)]
        self._runs: list[RunDir] = []  # finished runs
        self._faults: Counter[str] = Counter()
        self._spare_samplers_from = 0.0
        self._recoveries = 0
        self._command: subprocess.Popen[bytes] | None = None

    def disturb(self, seconds: float) -> None:
        """Run commands under random faults until the time is over; the last ends undisturbed."""
        started = time.monotonic()
        until, self._spare_samplers_from = started + seconds, started + seconds / 3
        while time.monotonic() < until:
            self._begin(self._folder / f"run-{len(self._runs)}")
            self._start()
            self._finish(until)
            self._runs.append(self._run)

    def compare(self) -> float:
        """Train the phase with the most attempts again without faults.

        Returns:
            Largest relative difference of the losses.
        """
        disturbed = max(self._runs, key=lambda run: max(row["attempt"] for row in _all_steps(run)))
        again = self._folder / "again"
        again.mkdir()
        raw = yaml.safe_load((disturbed.root.parent / "run.yaml").read_text())
        raw["run"]["dir"] = str(again / "run")
        self._use(raw, again)
        open_run(load_config(self._config))
        for name in ("samples", "pairs", "prompts"):
            shutil.copytree(disturbed.root / name, self._run.root / name)
        for name in ("models", "events"):
            apart = shutil.ignore_patterns("round-0", ".ray-train")
            shutil.copytree(disturbed.root / name, self._run.root / name, ignore=apart)
        self._start()
        self._finish(until=0.0)
        expected = read_metrics(self._run.root / "events/round-0")[0]
        actual = read_metrics(disturbed.root / "events/round-0")[0]
        return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(actual, expected, strict=True))

    def figures(self) -> dict[str, Any]:
        counts: Counter[str] = Counter(lost=0, duplicated=0)
        for run in self._runs:
            counts.update(_count_faults(run))
        return {
            "runs": len(self._runs),
            "faults": sum(self._faults.values()),
            "faults_by_kind": dict(self._faults),
            "recoveries": self._recoveries,
            **counts,
        }

    # --- one run

    def _begin(self, folder: Path) -> None:
        folder.mkdir()
        raw = sampling_config(folder, PROMPTS, block_size=8, max_tokens=48)
        raw["sampling"] |= {"heartbeat_timeout_s": 20, "window": 1}
        raw["sampling"]["teacher"]["engine"] = {"max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 27}
        raw["sampling"]["student"] = {**raw["sampling"]["student"], "max_tokens": 8}
        raw["pairing"] = {"truncated_chosen": "keep"}
        raw["training"] = {
            "num_workers": [1, 2], "resize_check_s": 5, "worker_timeout_s": 15, "micro_batch_tokens": 1024,
            "round": {"epochs": 1000, "max_steps": STEPS, "batch_groups": 64, "checkpoint_every": EVERY},
        }  # fmt: skip
        raw["cluster"] = {"address": self.cluster.address, "start_timeout_s": 900}
        self._use(raw, folder)

    def _use(self, raw: dict[str, Any], folder: Path) -> None:
        self._config = folder / "run.yaml"
        self._config.write_text(yaml.safe_dump(raw))
        self._run = RunDir.at(raw["run"]["dir"])

    def _start(self) -> None:
        self._command = self.cluster.run("run", str(self._config), log=self._config.with_name("log"))

    def _finish(self, until: float) -> None:
        """Follow a run to its end and inject faults until the time is over."""
        assert self._command is not None
        done, moved, hit = self._progress(), time.monotonic(), False
        next_fault_at = time.monotonic() + self._random.uniform(*PAUSE_S)
        while (code := self._command.poll()) is None:
            time.sleep(0.5)
            now, got = time.monotonic(), self._progress()
            if got != done:
                self._recoveries += hit
                done, moved, hit = got, now, False
            elif now - moved > HUNG_S:
                raise Broken("hung", self._config.with_name("log"))
            spared = now >= self._spare_samplers_from and not self._workers()
            if now < until and now >= next_fault_at and not hit and got and not spared:
                hit = self._inject_fault()
                time.sleep(_SETTLE_S if hit else 0.0)
                done, moved = self._progress(), time.monotonic()
                next_fault_at = time.monotonic() + self._random.uniform(*PAUSE_S)
        if code != 0:
            raise Broken("failed", self._config.with_name("log"))

    def _progress(self) -> tuple[int, int]:
        """Return the committed parts and the highest step; repeated steps are no progress."""
        parts = sum(1 for _ in self._run.root.glob("**/part-*.arrow"))
        return parts, max((row["step"] for row in _all_steps(self._run)), default=0)

    # --- faults

    def _inject_fault(self) -> bool:
        """Inject a fault. Return False if it has no target at the moment."""
        trains = bool(self._workers())
        kinds = ["driver", "node"] + (["worker", "freeze", "leave"] if trains else ["engine"])
        kind = self._random.choice(kinds)
        node = self._random.choice(self._nodes)
        if not getattr(self, f"_hit_{kind}")(node):
            return False
        self._faults[kind] += 1
        return True

    def _hit_driver(self, _: Node) -> bool:
        assert self._command is not None
        os.killpg(self._command.pid, signal.SIGKILL)
        self._command.wait()
        self._start()
        return True

    def _hit_node(self, node: Node) -> bool:
        node.kill()
        self._replace(node)
        return True

    def _hit_leave(self, node: Node) -> bool:
        self.cluster.drain(node, 25)
        time.sleep(25)
        node.kill()
        self._replace(node)
        return True

    def _hit_engine(self, node: Node) -> bool:
        return self._signal(node.processes("VLLM::EngineCore"), signal.SIGKILL)

    def _hit_worker(self, _: Node) -> bool:
        return self._signal(self._workers(), signal.SIGKILL)

    def _hit_freeze(self, _: Node) -> bool:
        return self._signal(self._workers(), signal.SIGSTOP)

    def _workers(self) -> list[int]:
        names = ("ray::RayTrainWorker", "plad:train", "plad:nursery")
        return [pid for node in self._nodes for name in names for pid in node.processes(name)]

    def _signal(self, pids: list[int], number: int) -> bool:
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._random.choice(pids), number)
        return True

    def _replace(self, node: Node) -> None:
        self._nodes.remove(node)
        self._nodes.append(self.cluster.add(cpus=2))


def _count_faults(run: RunDir) -> Counter[str]:
    """Count lost, duplicated and repeated items in a finished run."""
    faults: Counter[str] = Counter()
    prompts = set(train_prompts(run.storage).read(["prompt_id"])["prompt_id"].to_pylist())
    for role in ("teacher", "student"):
        rows = Counter(run.samples(role).read(["prompt_id"])["prompt_id"].to_pylist())
        faults["lost"] += len(prompts - rows.keys())
        faults["duplicated"] += sum(count - 1 for count in rows.values())
    steps = Counter((row["attempt"], row["step"]) for row in _all_steps(run))
    faults["lost"] += len(set(range(1, STEPS + 1)) - {step for _, step in steps})
    faults["duplicated"] += sum(count - 1 for count in steps.values())
    faults["steps_taken_again"] += len(steps) - STEPS
    checked, others = verify(run.storage.url)
    faults["lost"] += len(others) + sum(len(item.problems) + (item.state != "complete") for item in checked)
    return faults


def _all_steps(run: RunDir) -> list[dict[str, Any]]:
    """Return the metrics of all steps of all attempts, including repeated steps."""
    path = run.root / "events/round-0/metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a killed process may leave a partial line
            rows.append(json.loads(line))
    return [row for row in rows if "loss" in row]


if __name__ == "__main__":
    main()
