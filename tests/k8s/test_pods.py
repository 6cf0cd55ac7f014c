"""The pods of a run are locked down, request what they use, and drain their Ray node before they
end."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.network import Peer, may_connect
from tests.k8s.rendered import (
    GPU,
    OVERLAYS,
    Pod,
    amount,
    cluster_of,
    config_text,
    fewest_and_most,
    of_kind,
    pods_of,
    render,
)
from tests.k8s.schemas import problem_of

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(r"sk-[A-Za-z0-9]{8}|hf_[A-Za-z0-9]{8}|AKIA[A-Z0-9]{12}|-----BEGIN|eyJ[A-Za-z0-9_-]{10}")
OPERATOR = Peer({"app.kubernetes.io/component": "kuberay-operator"}, "kuberay-system")
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, "monitoring")
DNS, OUTSIDE = Peer({"k8s-app": "kube-dns"}, "kube-system"), Peer({}, "outside")
STRANGERS = [Peer({}), Peer({"app": "other"}), Peer({"app.kubernetes.io/component": "ray"}), Peer({}, "other")]

pods = pytest.mark.parametrize(
    ("overlay", "kind"), [(name, kind) for name in OVERLAYS for kind in ("head", "worker", "submitter")]
)


def pods_of_kind(overlay: str, kind: str) -> list[Pod]:
    matching = [pod for pod in pods_of(render(overlay)) if pod.kind == kind]
    assert matching or (kind == "submitter" and overlay == "long-lived")
    return matching


# -- locked down


@pods
def test_no_container_is_root_or_can_become_root(overlay: str, kind: str) -> None:
    for pod in pods_of_kind(overlay, kind):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (1000, 1000, 1000)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any("hostPath" in volume for volume in pod.spec["volumes"])
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pods
def test_only_the_autoscaler_has_a_token_of_the_kubernetes_api(overlay: str, kind: str) -> None:
    accounts = {item["metadata"]["name"]: item for item in of_kind(render(overlay), "ServiceAccount")}
    for pod in pods_of_kind(overlay, kind):
        assert pod.spec["automountServiceAccountToken"] is False
        assert accounts[pod.spec["serviceAccountName"]]["automountServiceAccountToken"] is False
        tokens = {
            volume["name"]
            for volume in pod.spec["volumes"]
            if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
        }
        holders = {item["name"] for item in pod.containers if tokens & {m["name"] for m in item["volumeMounts"]}}
        assert holders == ({"autoscaler"} if any(item["name"] == "autoscaler" for item in pod.containers) else set())


def test_the_shell_pod_is_as_restricted_as_the_pods_of_a_run() -> None:
    shell = yaml.safe_load(Path("k8s/shell.yaml").read_text())
    assert problem_of(shell) is None
    objects = render("single-node-8gpu")
    (claim,) = of_kind(objects, "PersistentVolumeClaim")
    claims = [v["persistentVolumeClaim"]["claimName"] for v in shell["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [claim["metadata"]["name"]]
    run = next(pods_of(objects))
    assert shell["spec"]["securityContext"] == run.spec["securityContext"]
    (container,) = shell["spec"]["containers"]
    assert container["image"] == run.containers[0]["image"]
    assert container["securityContext"] == run.containers[0]["securityContext"]
    assert shell["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_overlay_grants_rights(overlay: str) -> None:
    kinds = {item["kind"] for item in render(overlay)}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Secret"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_in_plain_text(overlay: str) -> None:
    for pod in pods_of(render(overlay)):
        for container in pod.containers:
            for item in container["env"]:
                assert "valueFrom" in item or not SECRET_NAME.search(item["name"]), item
                assert not SECRET_VALUE.search(item.get("value", ""))
    assert not SECRET_VALUE.search(config_text(render(overlay)))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_requires_a_token_and_publishes_nothing(overlay: str) -> None:
    cluster = cluster_of(render(overlay))
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert (head["serviceType"], head.get("enableIngress", False)) == ("ClusterIP", False)
    assert 10001 not in {port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}


# -- the network


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_of_the_run_is_closed_to_strangers(overlay: str) -> None:
    objects = render(overlay)
    for pod in pods_of(objects):
        for port in (22, 6379, 8080, 8265, 10001, 12345, 52365):
            for stranger in STRANGERS:
                assert not may_connect(objects, stranger, Peer(pod.labels), port), (pod.name, port, stranger)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_of_a_run_reach_what_they_need_and_nothing_else(overlay: str) -> None:
    objects = render(overlay)
    by_kind = {pod.kind: Peer(pod.labels) for pod in pods_of(objects)}
    head, worker = by_kind["head"], by_kind["worker"]
    assert all(may_connect(objects, a, b, port) for a, b in ((head, worker), (worker, head)) for port in (6379, 23456))
    for pod in (head, worker):
        assert may_connect(objects, pod, DNS, 53, "UDP")
        assert may_connect(objects, pod, OUTSIDE, 443)
        assert not may_connect(objects, pod, OUTSIDE, 80)
    assert may_connect(objects, OPERATOR, head, 8265)
    assert may_connect(objects, PROMETHEUS, head, 8080)
    assert may_connect(objects, PROMETHEUS, worker, 8080)
    closed = [(OPERATOR, head, 10001), (OPERATOR, worker, 8265), (PROMETHEUS, head, 8265), (PROMETHEUS, head, 10001)]
    if "submitter" in by_kind:
        assert may_connect(objects, by_kind["submitter"], head, 8265)
        closed += [(by_kind["submitter"], head, port) for port in (6379, 10001)]
        closed += [(by_kind["submitter"], worker, 8265), (head, by_kind["submitter"], 8080)]
    for source, target, port in closed:
        assert not may_connect(objects, source, target, port), (source, target, port)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_is_not_evicted(overlay: str) -> None:
    (budget,) = of_kind(render(overlay), "PodDisruptionBudget")
    (head,) = pods_of_kind(overlay, "head")
    assert budget["spec"]["minAvailable"] == 1
    assert budget["spec"]["selector"]["matchLabels"].items() <= head.labels.items()


# -- resources


@pods
def test_every_container_has_requests_equal_to_its_limits_except_for_cpu(overlay: str, kind: str) -> None:
    for pod in pods_of_kind(overlay, kind):
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) == set(resources["limits"])
            for name in set(resources["requests"]) - {"cpu"}:
                assert resources["requests"][name] == resources["limits"][name], (pod.name, name)


@pods
def test_every_folder_on_the_node_has_a_limit(overlay: str, kind: str) -> None:
    for pod in pods_of_kind(overlay, kind):
        disk = 0.0
        for volume in pod.spec["volumes"]:
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"], (pod.name, volume)
                disk += amount(volume["emptyDir"]["sizeLimit"]) * ("medium" not in volume["emptyDir"])
        request = pod.spec["containers"][0]["resources"]["requests"].get("ephemeral-storage")
        assert request is None or amount(request) > disk


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_object_store_fits_into_shared_memory_and_shared_memory_into_the_container(overlay: str) -> None:
    cluster = cluster_of(render(overlay))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (shm,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
        memory = amount(spec["containers"][0]["resources"]["limits"]["memory"])
        assert shm["medium"] == "Memory"
        assert amount(group["rayStartParams"]["object-store-memory"]) < amount(shm["sizeLimit"]) < memory / 2


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_work_runs_on_the_head(overlay: str) -> None:
    head = cluster_of(render(overlay))["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert GPU not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_with_gpus_tolerate_the_taint_of_gpu_nodes(overlay: str) -> None:
    for group in cluster_of(render(overlay))["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        if GPU in spec["containers"][0]["resources"]["limits"]:
            assert {"key": GPU, "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]


@pytest.mark.parametrize("overlay", ["multi-node-spot", "kueue"])
def test_groups_that_scale_start_at_their_smallest_size(overlay: str) -> None:
    cluster = cluster_of(render(overlay))
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] < group["maxReplicas"]
    assert fewest_and_most(cluster, GPU) == (8, 32)


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name not in ("multi-node-spot", "kueue")])
def test_other_groups_do_not_scale(overlay: str) -> None:
    cluster = cluster_of(render(overlay))
    assert "enableInTreeAutoscaling" not in cluster
    assert all(g["replicas"] == g["minReplicas"] == g["maxReplicas"] for g in cluster["workerGroupSpecs"])


# -- shutdown


def stop_hook(overlay: str) -> tuple[str, dict[str, Any]]:
    """Return the command that a worker's pod runs before it ends, and the pod's spec."""
    (worker, *_) = pods_of_kind(overlay, "worker")
    (*_, command) = worker.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    return command, worker.spec


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_stays_as_long_as_it_promises_ray(overlay: str) -> None:
    command, spec = stop_hook(overlay)
    drain_timeout, deadline, wait = (
        int(re.search(pattern, command)[1])  # type: ignore[index]
        for pattern in (r"timeout (\d+)", r"--deadline-remaining-seconds (\d+)", r"sleep (\d+)")
    )
    assert deadline == wait
    assert drain_timeout + wait < spec["terminationGracePeriodSeconds"] == 120


@pytest.mark.parametrize(("node", "exit_code", "drains"), [("ab12", 0, True), ("ab12", 1, True), (None, 0, False)])
def test_a_pod_that_ends_drains_its_ray_node_first(
    tmp_path: Path, node: str | None, exit_code: int, drains: bool
) -> None:
    """The processes and commands are fakes.

    If Ray does not answer or does not run, the pod does not wait.
    """
    for number, arguments in enumerate(
        (["bash"], ["raylet", "--x=1", f"--node_id={node}", "--y=2"] if node else ["x"])
    ):
        (tmp_path / "proc" / str(number)).mkdir(parents=True)
        (tmp_path / "proc" / str(number) / "cmdline").write_bytes(b"".join(f"{a}\0".encode() for a in arguments))
    (tmp_path / "bin").mkdir()
    for name, code in (("ray", exit_code), ("sleep", 0)):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@" >>{tmp_path}/calls\nexit {code}\n')
        script.chmod(0o755)
    command = stop_hook("multi-node-spot")[0].replace("/proc/", f"{tmp_path}/proc/")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RAY_ADDRESS": "head:6379"}
    subprocess.run(["bash", "-c", command], check=True, timeout=20, env=environment)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    drain = [
        "ray", "drain-node", "--address", "head:6379", "--node-id", "ab12", "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "its pod was told to go", "--deadline-remaining-seconds", "90",
    ]  # fmt: skip
    assert calls == (drain if drains else []) + (["sleep", "90"] if drains and exit_code == 0 else [])
