"""Overlays as `kubectl kustomize` renders them, and functions that read them."""

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
    """Return the objects of a kustomization. Skips the test if kubectl is missing."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, whose kustomize renders the overlays")
    result = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.safe_load_all(result.stdout) if document]


@cache
def _text(overlay: str) -> str:
    return yaml.safe_dump_all(kustomize(K8S / "overlays" / overlay))


def render(overlay: str) -> Objects:
    """Return the objects of an overlay, as a copy that a test may change."""
    return list(yaml.safe_load_all(_text(overlay)))


def render_on_top(overlay: str, components: Sequence[str], folder: Path) -> Objects:
    """Return an overlay with components, added as a user does: in another kustomization over it."""
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
    """Return the spec of the RayCluster: that of the RayJob, or of the long-lived cluster."""
    specs = [item["spec"]["rayClusterSpec"] for item in of_kind(objects, "RayJob")]
    specs += [item["spec"] for item in of_kind(objects, "RayCluster")]
    assert len(specs) == 1
    return dict(specs[0])


def config_text(objects: Objects) -> str:
    (config_map,) = [item for item in of_kind(objects, "ConfigMap") if item["metadata"]["name"] == "plad-run"]
    return str(config_map["data"]["run.yaml"])


def config_of(objects: Objects) -> Config:
    return parse_config(yaml.safe_load(config_text(objects)), "run.yaml")


@dataclass(frozen=True)
class Pod:
    """A pod, with what the operator adds to its template.

    Attributes:
        kind: head, worker or submitter.
        containers: all containers, including the autoscaler in the head.
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


def _pod(name: str, kind: str, template: dict[str, Any], labels: dict[str, str], sidecars: Objects) -> Pod:
    spec = template["spec"]
    containers = [*spec["containers"], *spec.get("initContainers", []), *sidecars]
    return Pod(name, kind, {**template["metadata"]["labels"], **labels}, spec, containers)


def amount(quantity: str | int) -> float:
    """Return a Kubernetes quantity as a number."""
    text = str(quantity)
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def resource(group: dict[str, Any], name: str) -> float:
    """Return the amount of a resource that a pod of a worker group requests."""
    containers = group["template"]["spec"]["containers"]
    return sum(amount(container["resources"]["requests"].get(name, 0)) for container in containers)


def fewest_and_most(cluster: dict[str, Any], name: str) -> tuple[float, float]:
    """Return the least and the largest amount of a resource over all workers of a cluster."""
    groups = cluster["workerGroupSpecs"]
    return (
        sum(resource(group, name) * group["minReplicas"] for group in groups),
        sum(resource(group, name) * group["maxReplicas"] for group in groups),
    )
