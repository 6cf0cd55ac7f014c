"""Children of a warm server and of a new interpreter: both behave in the same way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plad_dist.errors import RunFailed, UserError
from plad_dist.nursery import client
from plad_dist.nursery.child import ChildFailed
from plad_dist.nursery.client import Child, ChildDied, interpreter, start_child
from tests.memory_faults import small_group

FUNCTIONS = "tests.unit.nursery.functions"


class Server:
    """Fork server of a test."""

    def __init__(self, path: Path, *modules: str) -> None:
        self.path = path
        end, self.lifeline = os.pipe()
        self.news, its_news = os.pipe()
        command = interpreter("plad_dist.nursery.server", end, its_news, path, *modules)
        os.environ.pop("PYTEST_CURRENT_TEST", None)  # it changes
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, pass_fds=(end, its_news), env=environment, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        os.close(end)
        os.close(its_news)
        deadline = time.monotonic() + 60
        while not path.exists() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def end(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "s", "colorsys", "numpy", FUNCTIONS, "no.such.module")
    yield server
    server.end()


@pytest.fixture(params=["warm", "cold"])
def path(request: pytest.FixtureRequest) -> Path | None:
    return request.getfixturevalue("server").path if request.param == "warm" else None


def start(name: str, *arguments: Any, server: Path | None) -> Child:
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # it changes
    child = start_child("plad:test", f"{FUNCTIONS}:{name}", arguments, server)
    assert child.is_warm == (server is not None)
    return child


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid)


def pid_of(child: Child) -> int:
    """Return the process id that a child tells first."""
    while True:
        kind, *rest = child._connection.recv()
        if kind == "tell":
            return int(rest[1])


def test_a_child_runs_in_the_environment_of_the_process_that_asks(
    path: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")  # Ray gives each worker its own
    said: list[str] = []
    with start("describe", "CUDA_VISIBLE_DEVICES", server=path) as child:
        answer = child.serve({"say": said.append, "add": lambda a, b: a + b}, 30)
    assert (answer["reply"], answer["variable"], said) == (3, "3,5", ["started"])
    assert answer["warm"] == (path is not None), "its modules are imported already"


def test_errors_of_a_child_arrive_as_what_they_are(path: Path | None) -> None:
    with start("refuse", server=path) as child, pytest.raises(UserError, match=r"prompts\.jsonl: row 3"):
        child.serve({}, 30)
    with start("fail", server=path) as child, pytest.raises(ChildFailed, match="OfALibrary: no memory"):
        child.serve({}, 30)


def test_the_death_of_a_child_is_told_with_its_cause(path: Path | None) -> None:
    for name, arguments, cause in (
        ("die", (signal.SIGKILL,), "killed by SIGKILL"),
        ("die", (signal.SIGSEGV,), "killed by SIGSEGV"),
        ("leave", (), "exit code 3"),
    ):
        with start(name, *arguments, server=path) as child, pytest.raises(ChildDied, match=cause):
            child.serve({"say": lambda text: None}, 30)


def test_a_child_that_the_kernel_kills_for_lack_of_memory_is_reported_so(path: Path | None) -> None:
    with (
        small_group(60 << 20) as add,
        start("allocate", 200 << 20, server=path) as child,
        pytest.raises(ChildDied, match=r"killed by SIGKILL on node .*: out of memory") as death,
    ):
        child.serve({"pid": add}, 30)
    assert death.value.lacked_memory


def test_a_silent_child_is_killed(path: Path | None) -> None:
    with start("be_deaf", server=path) as child:
        pids: list[int] = []
        with pytest.raises(ChildDied, match="no sign of life for 3 s"):
            child.serve({"pid": pids.append}, 3)
        wait_until_dead(pids[0])


@pytest.mark.parametrize("name", ["wait", "be_deaf"])
def test_a_child_dies_with_the_process_that_asked(path: Path | None, name: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    pid = os.fork()
    if pid == 0:
        try:
            note.write_text(f"{pid_of(start(name, server=path))}\n")
            time.sleep(600)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(note.read_text())
    assert is_alive(child)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until_dead(child)


def test_children_of_a_server_draw_different_random_numbers(server: Server) -> None:
    draws = set()
    for _ in range(2):
        with start("random_numbers", server=server.path) as child:
            draws |= set(child.serve({}, 30))
    assert len(draws) == 4


def test_a_server_with_another_environment_is_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable may be read when a library is imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "another value")
    with start_child("plad:test", f"{FUNCTIONS}:describe", ("HF_HUB_OFFLINE",), server.path) as child:
        assert not child.is_warm
        assert child.serve({"say": lambda text: None, "add": max}, 30)["variable"] == "another value"


@pytest.mark.parametrize("fault", ["dead", "frozen", "deaf", "foreign"])
def test_a_child_starts_without_a_server_that_works(
    server: Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_IDLE_S", 1.0)
    if fault == "dead":
        server.end()
    elif fault == "frozen":
        server.process.send_signal(signal.SIGSTOP)
    elif fault == "deaf":  # its children never say hello
        monkeypatch.setattr(client, "_responds", lambda connection, request: False)
    else:
        server.end()
        server.path.unlink()
        listener = socket.socket(socket.AF_UNIX)  # nobody answers
        listener.bind(str(server.path))
        listener.listen()
    with start_child("plad:test", f"{FUNCTIONS}:describe", ("X",), server.path) as child:
        assert not child.is_warm
        assert child.serve({"say": lambda text: None, "add": max}, 30)["reply"] == 2


def test_a_child_that_cannot_prepare_itself_is_replaced_by_a_new_interpreter(server: Server) -> None:
    first = f"{FUNCTIONS}:fill_the_disk"
    with start_child("plad:test", f"{FUNCTIONS}:describe", ("X",), server.path, first=first) as child:
        assert not child.is_warm
        assert child.serve({"say": lambda text: None, "add": max}, 30)["reply"] == 2


def test_a_new_interpreter_that_cannot_prepare_itself_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.Path, "cwd", lambda: "/no/such/folder")
    with pytest.raises(ChildDied, match="did not start: its child failed: FileNotFoundError"):
        start("describe", "X", server=None)


def test_a_child_has_the_environment_variables_that_the_imports_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setting.py").write_text("import os\nos.environ['SET_BY_IMPORT'] = 'yes'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    server = Server(tmp_path / "s", "setting", FUNCTIONS)
    try:
        with start_child("plad:test", f"{FUNCTIONS}:describe", ("SET_BY_IMPORT",), server.path) as child:
            assert child.is_warm
            assert child.serve({"say": lambda text: None, "add": max}, 30)["variable"] == "yes"
    finally:
        server.end()


@pytest.mark.parametrize("error", ["OSError(12, 'Cannot allocate memory')", "MemoryError()"])
def test_a_new_interpreter_serves_if_the_server_has_no_memory_for_another_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    source = f"import os\ndef fork(): raise {error}\nos.fork = fork\n"
    (tmp_path / "crowded.py").write_text(source)
    sys.path.append(str(tmp_path))
    try:
        server = Server(tmp_path / "s", "crowded")
        with start_child("plad:test", f"{FUNCTIONS}:describe", ("X",), server.path) as child:
            assert not child.is_warm
            assert child.serve({"say": lambda text: None, "add": max}, 30)["reply"] == 2
        assert server.process.poll() is None, "it goes on"
        assert "emory" in caplog.text, "the reason is logged"
    finally:
        sys.path.remove(str(tmp_path))
        server.end()


def test_a_request_of_any_size_reaches_the_child(path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets variables for every service of a namespace."""
    with start("describe", "X", "x" * 4_000_000, server=path) as child:
        assert child.serve({"say": lambda text: None, "add": max}, 30)["reply"] == 2


def test_a_death_is_named_although_a_sibling_outlives_the_server(server: Server) -> None:
    with start("wait", server=server.path) as sibling, start("wait", server=server.path) as child:
        pids = [pid_of(sibling), pid_of(child)]
        server.end()
        os.kill(pids[1], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(ChildDied, match="its process died"):
            child.serve({}, 30)
        assert time.monotonic() - started < 20
        assert is_alive(pids[0])


def test_a_killed_child_is_dead_when_it_is_left(path: Path | None) -> None:
    with start("wait", server=path) as child:
        pid = pid_of(child)
    assert not is_alive(pid)


def test_children_outlive_their_server(server: Server) -> None:
    with start("wait", server=server.path) as child:
        pid = pid_of(child)
        server.end()
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ChildDied, match="its process"):
            child.serve({}, 30)


def test_a_server_dies_with_its_keeper(server: Server) -> None:
    os.close(server.lifeline)
    server.lifeline = -1
    assert server.process.wait(30) == -signal.SIGKILL


def test_a_server_whose_modules_start_threads_ends(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()\n"
    )
    sys.path.append(str(tmp_path))
    try:
        server = Server(tmp_path / "s", "threaded")
    finally:
        sys.path.remove(str(tmp_path))
    _, err = server.process.communicate(timeout=90)
    assert "started threads" in err
    server.end()


def test_a_folder_of_sockets_that_others_may_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.tempfile, "gettempdir", lambda: str(tmp_path))
    assert client.socket_path("a").parent.stat().st_mode & 0o777 == 0o700
    client.socket_path("a").parent.chmod(0o755)
    with pytest.raises(RunFailed, match="only this user"):
        client.socket_path("a")
