"""A Ray cluster of several nodes on one machine, each with its own network namespace and address.

So a whole node can be killed, frozen or cut off from the network. Needs root and iproute2; see
:func:`available`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PORT = 6379
# A silent node is dead after about five seconds; by default, Ray waits for half a minute.
_ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,  # for these clusters only
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "GLOO_SOCKET_IFNAME": "eth0",  # the machine's name resolves to the loopback address
}


def available() -> str | None:
    """Return why namespaces cannot be used on this machine, or None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"plad-probe-{os.getpid()}"
    attempt = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if attempt.returncode:
        return f"no network namespaces here: {attempt.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=False)
    return None


class Node:
    """One node of the cluster: a namespace and the Ray processes in it."""

    def __init__(self, name: str, address: str, bridge: str) -> None:
        self.name, self.address = name, address
        self._outside = f"{name}o"
        _ip("netns", "add", name)
        _ip("link", "add", self._outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", self._outside, "master", bridge, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", name, "link", "set", device, "up")

    def command(self, *command: str) -> list[str]:
        """Return a command that runs another one on this node."""
        return ["ip", "netns", "exec", self.name, *command]

    def pids(self) -> list[int]:
        """Return the processes of this node."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def processes(self, word: str) -> list[int]:
        """Return the processes of this node whose command line contains a word."""
        matches = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                    matches.append(pid)
        return matches

    def kill(self, *, quietly: bool = True) -> None:
        """Kill every process of the node.

        Args:
            quietly: cut the network first, so that the other nodes learn nothing.
        """
        if quietly:
            self.cut()
        self._send(signal.SIGKILL)

    def freeze(self) -> None:
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def cut(self) -> None:
        """Cut the node off from the network."""
        _ip("link", "set", self._outside, "down")

    def mend(self) -> None:
        _ip("link", "set", self._outside, "up")

    def remove(self) -> None:
        self._send(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)
        for command in (("link", "delete", self._outside), ("netns", "delete", self.name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*command)

    def _send(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Cluster:
    """A head without CPUs, and nodes that join and leave.

    Args:
        folder: folder for the logs of the nodes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._prefix = f"p{os.getpid() % 100_000}"
        self._bridge, self._net = f"{self._prefix}b", f"10.{77 + os.getpid() % 100}.{os.getpid() % 250}"
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self._net}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        self.nodes: list[Node] = []
        self.head = self._new_node()
        self._start(self.head, "--head", f"--port={_PORT}", "--num-cpus=0", "--include-dashboard=false")
        self.address = f"{self.head.address}:{_PORT}"

    def add(self, cpus: int = 1) -> Node:
        """Add a node and wait until Ray runs on it."""
        node = self._new_node()
        self._start(node, f"--address={self.address}", f"--num-cpus={cpus}")
        return node

    def run(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a `plad` command on the head. Its output is appended to a log."""
        command = self.head.command(sys.executable, "-c", "from plad_dist.cli import main; main()", *arguments)
        with log.open("ab") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, env=os.environ | _ENVIRONMENT, cwd=Path(__file__).parent.parent,
                start_new_session=True,
            )  # fmt: skip

    def drain(self, node: Node, seconds: int) -> None:
        """Announce to Ray that a node will leave after some seconds."""
        code = (
            f"import ray; ray.init(address='{self.address}', logging_level='ERROR', log_to_driver=False); "
            "print(*(node['NodeID'] for node in ray.nodes() if node['Alive'] and "
            f"node['NodeManagerAddress'] == '{node.address}'))"
        )
        python = self.head.command(sys.executable, "-c", code)
        environment = os.environ | _ENVIRONMENT
        listing = subprocess.run(python, capture_output=True, text=True, check=True, timeout=120, env=environment)
        node_id = listing.stdout.split()[-1]
        command = self.head.command(
            str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={self.address}", f"--node-id={node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot",
            f"--deadline-remaining-seconds={seconds}",
        )  # fmt: skip
        subprocess.run(command, capture_output=True, check=True, timeout=120, env=environment)

    def end(self) -> None:
        for node in reversed(self.nodes):
            node.thaw()
            node.remove()
        _ip("link", "delete", self._bridge)

    def _new_node(self) -> Node:
        self._count += 1
        node = Node(f"{self._prefix}n{self._count}", f"{self._net}.{self._count + 1}", self._bridge)
        self.nodes.append(node)
        return node

    def _start(self, node: Node, *arguments: str) -> None:
        ray = str(Path(sys.executable).parent / "ray")
        command = node.command(
            ray, "start", *arguments, f"--node-ip-address={node.address}", "--block", "--disable-usage-stats",
            f"--object-store-memory={200 << 20}",
        )  # fmt: skip
        with (self._folder / f"{node.name}.log").open("wb") as log:
            subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | _ENVIRONMENT, start_new_session=True)
        path = self._folder / f"{node.name}.log"
        wait(lambda: "Ray runtime started" in path.read_text(), 120, f"{node.name} to start", every=0.2)


def wait(condition: Callable[[], Any], seconds: float, goal: str, every: float = 0.05) -> Any:
    """Wait until a condition returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {goal}"
        time.sleep(every)
    return result


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
