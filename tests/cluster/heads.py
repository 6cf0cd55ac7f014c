"""A real Ray head with its job server and token authentication, in its own session of processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOKEN = "a-token-that-only-this-test-knows-0123456789"


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        url: URL of its dashboard.
        metrics: URL of its Prometheus exporter.
        environment: environment variables of a user who has the token.
    """

    url: str
    metrics: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def plad(self, *arguments: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `plad` as that user, with additional environment variables."""
        return subprocess.run(
            [sys.executable, "-c", "from plad_dist.cli import main; main()", *arguments],
            capture_output=True, text=True, timeout=timeout, check=False, env=self.environment | environment,
        )  # fmt: skip

    def kill(self) -> None:
        """Kill all processes of the head at once, like the loss of its machine."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def head(cpus: int = 4) -> Iterator[Head]:
    """Start a head, and stop it with everything that it started."""
    ports = [_free_port() for _ in range(5)]
    # Paths of sockets must be short, so the folder is not in pytest's.
    with tempfile.TemporaryDirectory(prefix="plad-head-", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated environment
        }
        command = [
            "ray", "start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}",
            f"--metrics-export-port={ports[2]}", f"--ray-client-server-port={ports[3]}",
            f"--dashboard-agent-listen-port={ports[4]}", f"--num-cpus={cpus}",
            "--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--temp-dir={folder}/ray",
        ]  # fmt: skip
        command[0] = str(Path(sys.executable).with_name("ray"))
        with (Path(folder) / "head.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        running = Head(f"http://127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}/metrics", process, environment)
        try:
            _wait_for(running, Path(folder) / "head.log")
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    running.kill()
            _kill_remaining(folder)


def _wait_for(running: Head, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert running.process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{running.url}/api/version", timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it runs, and requires the token
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def _kill_remaining(folder: str) -> None:
    """Kill the workers and engines that outlive the head.

    Their command lines contain the folder's name.
    """
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if folder.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
