"""A whole pipeline that is disturbed at random for as long as you like: what was lost, done twice, or hung in the end.

A cluster of a head without work and two nodes on this machine, each in a network namespace; real vLLM, Ray Train and DeepSpeed. One
command after the other distils a tiny student from a tiny teacher, each in a run directory of its own. While it samples, engines,
nodes and the driver are killed; while it trains, workers, nodes and the driver are killed, workers freeze, and nodes leave with
notice. Sampling is hit in the first third of the time alone, or a run would seldom come to training. What is hit and when follows from
the seed. A node that is gone is replaced, a driver that is gone is started again. When the
time is over the last run ends in peace, and every run is checked: each prompt has each of its samples once, every step was
trained, nothing that was committed is damaged. The phase that was disturbed most is trained once more in peace from the same pairs.

`lost`: samples or steps that are missing, and whatever `plad verify` finds. `duplicated`: samples that are there twice, steps that one
attempt took twice. `steps_taken_again`: those that an attempt took and a later one again. `recoveries`: blows after which more got
done than had been a few seconds after them. `hung`: times that nothing got on for five minutes; `failed`: commands that ended with an
error. Either ends the soak, with exit code 1. `max_rel_loss_diff`: between the disturbed phase and the one in peace.
Needs root and iproute2.
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
from plad_dist.verify import verify
from tests.nodes import Cluster, Node, available
from tests.tiny import sampling_config

PROMPTS, STEPS, EVERY = 600, 150, 10
PAUSE_S = (10.0, 40.0)  # between a blow and the next, while something gets on
HUNG_S = 300.0
_SETTLE_S = 5.0  # after a blow, in which what was under way may still end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
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
    """What ends a soak: a command that hung or failed."""

    def __init__(self, kind: str, log: Path) -> None:
        super().__init__(f"{kind}: {log.read_text()[-4000:]}")
        self.kind = kind


class Soak:
    """The cluster, the runs, and who hits them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self.cluster = Cluster(folder)
        self._nodes = [self.cluster.add(cpus=2), self.cluster.add(cpus=2)]
        self._runs: list[RunDir] = []  # that have ended
        self._faults: Counter[str] = Counter()
        self._spare_samplers_from = 0.0
        self._recoveries = 0
        self._command: subprocess.Popen[bytes] | None = None

    def disturb(self, seconds: float) -> None:
        """Run after run, hit at random until the time is over; the last one ends in peace."""
        begun = time.monotonic()
        until, self._spare_samplers_from = begun + seconds, begun + seconds / 3
        while time.monotonic() < until:
            self._begin(self._folder / f"run-{len(self._runs)}")
            self._start()
            self._see_through(until)
            self._runs.append(self._run)

    def compare(self) -> float:
        """Train the phase that had the most attempts once more, in peace. Returns the largest relative difference of losses."""
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
        self._see_through(until=0.0)
        expected = read_metrics(self._run.root / "events/round-0")[0]
        found = read_metrics(disturbed.root / "events/round-0")[0]
        return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(found, expected, strict=True))

    def figures(self) -> dict[str, Any]:
        counts: Counter[str] = Counter(lost=0, duplicated=0)
        for run in self._runs:
            counts.update(_wrong_with(run))
        return {
            "runs": len(self._runs),
            "faults": sum(self._faults.values()),
            "faults_by_kind": dict(self._faults),
            "recoveries": self._recoveries,
            **counts,
        }

    # -- a run

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

    def _see_through(self, until: float) -> None:
        """Watch a run to its end and hit it until the time is over."""
        assert self._command is not None
        done, moved, hit = self._progress(), time.monotonic(), False
        next_blow = time.monotonic() + self._random.uniform(*PAUSE_S)
        while (code := self._command.poll()) is None:
            time.sleep(0.5)
            now, got = time.monotonic(), self._progress()
            if got != done:
                self._recoveries += hit
                done, moved, hit = got, now, False
            elif now - moved > HUNG_S:
                raise Broken("hung", self._config.with_name("log"))
            spared = now >= self._spare_samplers_from and not self._workers()
            if now < until and now >= next_blow and not hit and got and not spared:
                hit = self._blow()
                time.sleep(_SETTLE_S if hit else 0.0)
                done, moved = self._progress(), time.monotonic()
                next_blow = time.monotonic() + self._random.uniform(*PAUSE_S)
        if code != 0:
            raise Broken("failed", self._config.with_name("log"))

    def _progress(self) -> tuple[int, int]:
        """Parts that are committed, and the highest step that was taken: what is done again is no progress."""
        parts = sum(1 for _ in self._run.root.glob("**/part-*.arrow"))
        return parts, max((row["step"] for row in _all_steps(self._run)), default=0)

    # -- blows

    def _blow(self) -> bool:
        """Hit something that is there. False where there is nothing to hit now."""
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
        return [pid for node in self._nodes for pid in node.processes("ray::RayTrainWorker")]

    def _signal(self, pids: list[int], number: int) -> bool:
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._random.choice(pids), number)
        return True

    def _replace(self, node: Node) -> None:
        self._nodes.remove(node)
        self._nodes.append(self.cluster.add(cpus=2))


def _wrong_with(run: RunDir) -> Counter[str]:
    """What is missing and what is there twice in a finished run."""
    found: Counter[str] = Counter()
    prompts = set(train_prompts(run.storage).read(["prompt_id"])["prompt_id"].to_pylist())
    for role in ("teacher", "student"):
        rows = Counter(run.samples(role).read(["prompt_id"])["prompt_id"].to_pylist())
        found["lost"] += len(prompts - rows.keys())
        found["duplicated"] += sum(count - 1 for count in rows.values())
    steps = Counter((row["attempt"], row["step"]) for row in _all_steps(run))
    found["lost"] += len(set(range(1, STEPS + 1)) - {step for _, step in steps})
    found["duplicated"] += sum(count - 1 for count in steps.values())
    found["steps_taken_again"] += len(steps) - STEPS
    checked, others = verify(run.storage.url)
    found["lost"] += len(others) + sum(len(item.problems) + (item.state != "complete") for item in checked)
    return found


def _all_steps(run: RunDir) -> list[dict[str, Any]]:
    """Figures of all steps of all attempts, those that were taken again too."""
    path = run.root / "events/round-0/metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # half written by a process that was killed
            rows.append(json.loads(line))
    return [row for row in rows if "loss" in row]


if __name__ == "__main__":
    main()
