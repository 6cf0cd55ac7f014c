"""A real Ray head with its job server and token authentication, in a session of its own."""

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
    """A head that is up.

    Attributes:
        url: of its dashboard.
        metrics: of its Prometheus exporter.
        environment: of a user who has the token.
    """

    url: str
    metrics: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def plad(self, *arguments: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `plad` as that user; `environment` is set beside."""
        return subprocess.run(
            [sys.executable, "-c", "from plad_dist.cli import main; main()", *arguments],
            capture_output=True, text=True, timeout=timeout, check=False, env=self.environment | environment,
        )  # fmt: skip

    def kill(self) -> None:
        """All of its processes at once, as when the machine is lost."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def head(cpus: int = 4) -> Iterator[Head]:
    """Start a head, and end it with everything that it started."""
    ports = [_free_port() for _ in range(5)]
    # Sockets have short names, so it is not in pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="plad-head-", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an environment that is activated
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
        found = Head(f"http://127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}/metrics", process, environment)
        try:
            _wait_for(found, Path(folder) / "head.log")
            yield found
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    found.kill()
            _kill_left(folder)


def _wait_for(found: Head, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert found.process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{found.url}/api/version", timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it is up, and asks for the token
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def _kill_left(folder: str) -> None:
    """What the head left of its session: workers and their engines, which carry the folder's name."""
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
