"""Overlays as `kubectl kustomize` renders them, and what the tests ask of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from plad_dist.config import Config
from plad_dist.config_file import parse_config

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = ["storage-pvc", "storage-s3", "endpoint-key", "hub-token"]
GPU = "nvidia.com/gpu"

Objects = list[dict[str, Any]]


def kustomize(folder: Path) -> Objects:
    """The objects of a kustomization. Skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, whose kustomize renders the overlays")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@cache
def _text(overlay: str) -> str:
    return yaml.safe_dump_all(kustomize(K8S / "overlays" / overlay))


def render(overlay: str) -> Objects:
    """The objects of an overlay: a copy, which a test may change."""
    return list(yaml.safe_load_all(_text(overlay)))


def render_on_top(overlay: str, components: Sequence[str], folder: Path) -> Objects:
    """An overlay with components as a user adds them, in a kustomization of their own over it."""
    to_k8s = os.path.relpath(K8S, folder.resolve())
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{to_k8s}/overlays/{overlay}"],
        "components": [f"{to_k8s}/components/{name}" for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


def of_kind(objects: Objects, kind: str) -> Objects:
    return [item for item in objects if item["kind"] == kind]


def cluster_of(objects: Objects) -> dict[str, Any]:
    """The RayCluster's spec: of the RayJob, or of the cluster that stays."""
    found = [item["spec"]["rayClusterSpec"] for item in of_kind(objects, "RayJob")]
    found += [item["spec"] for item in of_kind(objects, "RayCluster")]
    assert len(found) == 1
    return dict(found[0])


def config_text(objects: Objects) -> str:
    (config_map,) = [item for item in of_kind(objects, "ConfigMap") if item["metadata"]["name"] == "plad-run"]
    return str(config_map["data"]["run.yaml"])


def config_of(objects: Objects) -> Config:
    return parse_config(yaml.safe_load(config_text(objects)), "run.yaml")


@dataclass(frozen=True)
class Pod:
    """A pod as it comes to be, by its template and what the operator adds to it.

    Attributes:
        kind: head, worker or submitter.
        containers: all of them, the autoscaler's among the head's.
    """

    name: str
    kind: str
    labels: dict[str, str]
    spec: dict[str, Any]
    containers: list[dict[str, Any]]


def pods_of(objects: Objects) -> Iterator[Pod]:
    cluster = cluster_of(objects)
    head = cluster["headGroupSpec"]["template"]
    sidecars = [{"name": "autoscaler", **cluster["autoscalerOptions"]}] if cluster.get("autoscalerOptions") else []
    yield _pod("head", "head", head, {"ray.io/node-type": "head", "ray.io/group": "headgroup"}, sidecars)
    for group in cluster["workerGroupSpecs"]:
        labels = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
        yield _pod(group["groupName"], "worker", group["template"], labels, [])
    for job in of_kind(objects, "RayJob"):
        yield _pod("submitter", "submitter", job["spec"]["submitterPodTemplate"], {}, [])


def _pod(name: str, kind: str, template: dict[str, Any], labels: dict[str, str], more: Objects) -> Pod:
    spec = template["spec"]
    containers = [*spec["containers"], *spec.get("initContainers", []), *more]
    return Pod(name, kind, {**template["metadata"]["labels"], **labels}, spec, containers)


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number."""
    text = str(quantity)
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def resource(group: dict[str, Any], name: str) -> float:
    """What a pod of a worker group asks for of a resource."""
    containers = group["template"]["spec"]["containers"]
    return sum(amount(container["resources"]["requests"].get(name, 0)) for container in containers)


def fewest_and_most(cluster: dict[str, Any], name: str) -> tuple[float, float]:
    """Of a resource over all workers, as the cluster shrinks and grows."""
    groups = cluster["workerGroupSpecs"]
    return (
        sum(resource(group, name) * group["minReplicas"] for group in groups),
        sum(resource(group, name) * group["maxReplicas"] for group in groups),
    )
