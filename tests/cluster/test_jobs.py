"""Jobs on a real Ray head with token authentication: submitted, followed, stopped, resubmitted,
finished."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from plad_dist import prometheus
from plad_dist.fleet.metrics import FLEET
from plad_dist.training.driver.metrics import TRAINING
from tests.cluster.heads import TOKEN, Head, head
from tests.conftest import write_config
from tests.tiny import sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head() as running:
        yield running


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    raw = sampling_config(folder, prompts=20_000, block_size=32)
    raw["prompts"]["heldout_fraction"] = 0.01
    return write_config(folder, raw)


def test_a_stopped_job_resumes_when_it_is_submitted_again(cluster: Head, config: Path) -> None:
    root = config.parent / "run"
    submitted = cluster.plad("submit", str(config), "--stage", "sample", "--address", cluster.url)
    assert submitted.returncode == 0, submitted.stderr
    job = re.search(r"Submitted: (\S+)", submitted.stdout)[1]

    again = cluster.plad("submit", str(config), "--stage", "sample", "--address", cluster.url)
    assert again.returncode == 2, again.stdout
    assert f"job {job} works on this run already" in again.stderr

    deadline = time.monotonic() + 300
    while not parts(root):
        assert time.monotonic() < deadline, cluster.plad("logs", job, "--address", cluster.url).stdout
        time.sleep(0.2)
    assert "RUNNING" in cluster.plad("status", job, "--address", cluster.url).stdout
    scraped = scrape(cluster)
    committed = parts(root)
    stopped = cluster.plad("stop", job, "--address", cluster.url)
    assert (stopped.returncode, "STOPPED" in stopped.stdout) == (0, True), stopped.stderr
    assert not (root / "samples" / "student" / "round-0" / "manifest.json").exists(), (
        "stopped too late to prove anything"
    )

    followed = cluster.plad(
        "submit", str(config), "--stage", "sample", "--address", cluster.url, "--follow", timeout=900
    )
    assert followed.returncode == 0, followed.stdout[-3000:] + followed.stderr
    assert "sample: done" in followed.stdout
    for role in ("teacher", "student"):
        assert json.loads((root / "samples" / role / "round-0" / "manifest.json").read_text())["parts"]
    assert {path: path.stat().st_mtime_ns for path in committed} == committed, "a part was written twice"

    jobs = cluster.plad("status", "--address", cluster.url).stdout
    assert "STOPPED" in jobs
    assert "SUCCEEDED" in jobs
    exported = set(re.findall(r"^ray_plad_(\w+?)(?:_total|_bucket|_sum|_count)?\{", scraped, re.MULTILINE))
    assert {"run_up", "disk_free_bytes", "rows", "tokens", "actors", "engine_starts", "block_seconds"} <= exported
    assert exported <= {*FLEET, *TRAINING, *prometheus.RUN}
    for path in [*root.rglob("*.log"), *root.rglob("*.json"), *root.rglob("*.yaml")]:
        assert TOKEN not in path.read_text(), path


def parts(root: Path) -> dict[Path, int]:
    """Return the committed parts with their times of modification."""
    return {path: path.stat().st_mtime_ns for path in (root / "samples").rglob("part-*.arrow")}


def scrape(cluster: Head) -> str:
    """Return the exported metrics, once they include those of the fleet."""
    text, deadline = "", time.monotonic() + 60
    while "ray_plad_rows_total" not in text and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(cluster.metrics, timeout=10) as response:
            text = response.read().decode()
    return text


def test_a_wrong_token_is_refused_and_never_shown(cluster: Head, config: Path) -> None:
    refused = cluster.plad("submit", str(config), "--address", cluster.url, RAY_AUTH_TOKEN="wrong-token-0123456789")
    assert refused.returncode == 2
    assert "refuses this token: it is wrong, or has expired" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "wrong-token" not in refused.stderr


def test_a_missing_token_is_requested(cluster: Head) -> None:
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    listed = subprocess.run(
        [sys.executable, "-c", "from plad_dist.cli import main; main()", "status", "--address", cluster.url],
        capture_output=True, text=True, timeout=120, check=False, env=environment,
    )  # fmt: skip
    assert listed.returncode == 2
    assert "requires a token; set RAY_AUTH_MODE=token" in listed.stderr


def test_a_bad_config_fails_before_it_is_submitted(cluster: Head, config: Path) -> None:
    relative = cluster.plad("submit", str(config), "run.dir=runs/here", "--address", cluster.url)
    assert (relative.returncode, "run.dir: runs/here: is relative" in relative.stderr) == (2, True), relative.stderr
    unknown = cluster.plad("submit", str(config), "sampling.limt=3", "--address", cluster.url)
    assert (unknown.returncode, "sampling.limt" in unknown.stderr) == (2, True), unknown.stderr
    stage = cluster.plad("submit", str(config), "--stage", "tune", "--address", cluster.url)
    assert (stage.returncode, "--stage tune: expected one of" in stage.stderr) == (2, True), stage.stderr
    secret = cluster.plad("submit", str(config), "sampling.teacher.engine.hf_token=hf_secret", "--address", cluster.url)
    assert (secret.returncode, "hf_token: secrets are not kept in configs" in secret.stderr) == (2, True), secret.stderr
    assert "hf_secret" not in secret.stdout + secret.stderr


def test_a_config_that_cannot_fit_is_refused_before_an_engine_starts(cluster: Head, config: Path) -> None:
    large = cluster.plad(
        "submit", str(config), "sampling.student.engine.kv_cache_memory_bytes=9000000000000", "--stage", "sample",
        f"run.dir={config.parent / 'large'}", "--address", cluster.url, "--follow",
    )  # fmt: skip
    assert large.returncode == 2, large.stdout + large.stderr
    assert "does not fit" in large.stdout
    assert "a smaller sampling.student.engine.kv_cache_memory_bytes" in large.stdout
    assert "is up" not in large.stdout


def test_an_unknown_job_is_named(cluster: Head) -> None:
    for arguments in (["logs"], ["logs", "--follow"], ["status"], ["stop"]):
        missing = cluster.plad(*arguments, "plad-none-000000-1", "--address", cluster.url)
        assert missing.returncode == 2, missing.stderr
        assert "has no job plad-none-000000-1" in missing.stderr
        assert "Traceback" not in missing.stderr


def test_a_job_with_bad_input_ends_the_command_with_exit_code_2(cluster: Head, config: Path) -> None:
    failed = cluster.plad(
        "submit", str(config), "prompts.source.paths=[/nowhere/prompts.jsonl]", f"run.dir={config.parent / 'other'}",
        "--stage", "sample", "--address", cluster.url, "--follow",
    )  # fmt: skip
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "/nowhere/prompts.jsonl" in failed.stdout


def test_wrong_addresses_and_dead_heads_are_named(config: Path) -> None:
    with head(cpus=1) as running:
        wrong = running.plad("status", "--address", "http://127.0.0.1:9")
        assert (wrong.returncode, "no Ray dashboard answers there" in wrong.stderr) == (2, True), wrong.stderr
        odd = running.plad("status", "--address", "localhost:8265")
        assert (odd.returncode, "expected the dashboard's URL" in odd.stderr) == (2, True), odd.stderr
        job = running.plad(
            "submit", str(config), "--stage", "sample", f"run.dir={config.parent / 'dead'}", "--address", running.url
        )
        assert job.returncode == 0, job.stderr
        name = re.search(r"Submitted: (\S+)", job.stdout)[1]
        command = ["logs", name, "--follow", "--address", running.url]
        with (config.parent / "followed.log").open("w") as log:
            following = subprocess.Popen(
                [sys.executable, "-c", "from plad_dist.cli import main; main()", *command],
                stdout=log, stderr=subprocess.PIPE, text=True, env=running.environment,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while "begins" not in (config.parent / "followed.log").read_text():
            assert time.monotonic() < deadline, "the job has logged nothing"
            time.sleep(0.5)
        running.kill()
        _, stderr = following.communicate(timeout=180)
        assert following.returncode == 1, stderr
        assert "does not answer any more" in stderr
        assert "submit the same config again" in stderr
