"""`plad doctor`: exit codes, output, and what it does about faulty configs, clusters and checks."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config_file import load_config, parse_config
from plad_dist.devices import GIB, GPUS
from plad_dist.doctor.checks import NODE_CHECKS
from plad_dist.doctor.config_checks import check_fit
from plad_dist.doctor.findings import Finding
from plad_dist.doctor.node import Node, local_node
from plad_dist.planning.hardware import Hardware
from tests.conftest import write_config
from tests.unit.doctor.findings import DiskUsage, contents, failures, only, states

Doctor = Callable[..., tuple[int, str]]


def test_a_sound_machine_and_config_exit_with_0_and_nothing_stays_behind(
    run: tuple[Path, dict[str, Any]], doctor: Doctor
) -> None:
    folder, raw = run
    config = str(write_config(folder, raw))
    before = contents(folder)
    code, printed = doctor(config, "run.dir=" + str(folder / "deep" / "er" / "run"), "--json")
    assert code == 0, printed
    assert all(set(finding) == {"check", "node", "state", "found", "remedy"} for finding in json.loads(printed))
    assert {"versions", "engine", "GPUs", "shared memory", "open files", "disk", "storage", "inputs", "models"} <= {
        finding["check"] for finding in json.loads(printed)
    }
    assert contents(folder) == before


def test_the_table_shows_the_findings_and_a_summary(doctor: Doctor) -> None:
    code, printed = doctor()
    assert code == 0
    assert all(word in printed for word in ("check", "node", "state", "remedy", "this machine", "torch", "/dev/shm"))
    assert "failed" in printed or "All is well" in printed or "warning" in printed


def test_a_bad_config_exits_with_2(run: tuple[Path, dict[str, Any]], doctor: Doctor) -> None:
    folder, raw = run
    config = str(write_config(folder, raw))
    code, printed = doctor(config, "run.sed=3")
    assert (code, "did you mean `seed`?" in printed) == (2, True)
    code, printed = doctor(config, "run.dir=ftp://host/folder")
    assert (code, "expected a path or a file://" in printed) == (2, True)


def test_an_interrupt_exits_with_130_and_removes_the_probes(
    run: tuple[Path, dict[str, Any]], doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(node: Node) -> list[Finding]:
        assert list((folder / "run").iterdir()), "a probe exists"
        raise KeyboardInterrupt

    folder, raw = run
    monkeypatch.setitem(NODE_CHECKS, "endpoints", interrupted)
    code, printed = doctor(str(write_config(folder, raw)))
    assert (code, "interrupted" in printed, "Traceback" in printed) == (130, True, False)
    assert not (folder / "run").exists()


def test_each_problem_of_the_inputs_is_a_failure_of_its_own(run: tuple[Path, dict[str, Any]], doctor: Doctor) -> None:
    folder, raw = run
    raw["student"]["path"] = str(folder / "nowhere")
    raw["training"] = {"deepspeed": "zero9"}
    code, printed = doctor(str(write_config(folder, raw)), "--json")
    assert code == 1
    texts = [finding["found"] for finding in failures(printed) if finding["check"] == "inputs"]
    assert any("zero9" in text for text in texts)
    assert any("no such model folder" in text for text in texts)
    assert not [finding for finding in failures(printed) if finding["check"] == "models"], "reported once"


def test_a_check_that_raises_is_a_failure_and_the_other_checks_run(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(node: Node) -> Iterable[Finding]:
        raise LookupError("no such thing\nsecond line")

    monkeypatch.setitem(NODE_CHECKS, "engine", broken)
    code, printed = doctor("--json")
    (failure,) = failures(printed)
    assert (code, failure["check"]) == (1, "engine")
    assert failure["found"] == "could not be checked: LookupError: no such thing"
    assert "disk" in printed


# -- the address of a cluster


def test_an_unreachable_cluster_is_a_failure_and_the_other_checks_run(doctor: Doctor, closed_port: int) -> None:
    code, printed = doctor("--address", f"127.0.0.1:{closed_port}", "--json")
    (failure,) = failures(printed)
    assert code == 1
    assert (failure["check"], failure["node"]) == ("cluster", f"127.0.0.1:{closed_port}")
    assert "refused" in failure["found"]
    assert "--address" in failure["remedy"]


def test_without_a_cluster_the_doctor_reports_that_it_checked_this_machine_alone(doctor: Doctor) -> None:
    code, printed = doctor("--json")
    (finding,) = [finding for finding in json.loads(printed) if finding["check"] == "cluster"]
    assert (code, finding["state"], "this machine alone" in finding["found"]) == (0, "ok", True)


def test_the_remedy_for_a_dashboards_url_is_the_address_of_ray(doctor: Doctor) -> None:
    code, printed = doctor("--json", "--address", "http://head:8265")
    (finding,) = failures(printed)
    assert (code, "head:6379" in finding["remedy"]) == (1, True)


def test_a_port_of_another_server_is_a_failure_at_once(doctor: Doctor) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, printed = doctor("--json", "--address", f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    (finding,) = failures(printed)
    assert (code, finding["found"]) == (1, "no Ray cluster answers there: the server at this address is not Ray")


# -- what the config needs


def test_a_config_that_does_not_fit_the_cluster_fails_with_the_remedies_of_the_plan() -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", ["training.num_workers=1"])
    findings = list(check_fit(config, Hardware(GPUS["h100-80g"], 1, 8, None)))
    failed = [finding for finding in findings if finding.state == "fail"]
    assert {"training.num_workers=4 or more" in finding.remedy for finding in failed} == {True, False}
    assert len(failed) == 2
    alone = list(check_fit(config))
    assert "this machine cannot run it" in only(alone[:1], "warn").text


def test_a_run_that_needs_more_disk_than_is_free_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", [f"run.dir={tmp_path}"])
    hardware = Hardware(GPUS["h100-80g"], 1, 8, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2 << 40, 0, 2 << 40))
    assert states(check_fit(config, hardware)) == ["ok", "ok"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2 << 40, 0, 100 * GIB))
    assert "100 GiB are free" in only(check_fit(config, hardware), "warn").text


def test_models_with_a_path_do_not_count_as_models_of_the_hub() -> None:
    config = load_config("examples/tldr-llama2-13b-to-7b.yaml", ["teacher.path=/runs/models/teacher", "run.dir=/tmp/x"])
    assert local_node(config).hub_models == ("meta-llama/Llama-2-7b-hf",)


def test_nodes_receive_absolute_run_directories(
    run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, raw = run
    raw["run"]["dir"] = "relative/run"
    monkeypatch.chdir(folder)
    node = local_node(parse_config(raw, "test"))
    assert [site.url for site in node.sites] == [str(folder / "relative" / "run")]
