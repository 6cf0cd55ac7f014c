"""The objects of every overlay are valid, fit the config that they run, and refer to nothing that
is missing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import plad_dist
from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.preflight import check_inputs
from plad_dist.rundir import RunDir
from tests.k8s.rendered import (
    COMPONENTS,
    GPU,
    OVERLAYS,
    ROOT,
    Objects,
    amount,
    cluster_of,
    config_of,
    config_text,
    fewest_and_most,
    kustomize,
    of_kind,
    pods_of,
    render,
    render_on_top,
    resource,
)
from tests.k8s.schemas import is_custom, problem_of
from tests.tiny import make_random_model

ON_CPUS = ["cpu-smoke"]
ON_GPUS = [name for name in OVERLAYS if name not in ON_CPUS]
# The user creates the secrets, as the components' comments describe. Kubernetes creates the config
# map.
SECRETS_OF_THE_USER = {"plad-endpoint", "plad-hub", "plad-s3"}
CONFIG_MAPS_OF_KUBERNETES = {"kube-root-ca.crt"}


def test_all_overlays_are_tested() -> None:
    assert OVERLAYS == ["cpu-smoke", "kueue", "long-lived", "multi-node-spot", "single-node-8gpu"]


# -- valid


@pytest.mark.parametrize("custom", [False, True], ids=["of Kubernetes", "of KubeRay and Kueue"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str, custom: bool) -> None:
    objects = [item for item in render(overlay) if is_custom(item) == custom]
    assert objects
    assert [problem for item in objects if (problem := problem_of(item))] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_components_can_be_added_to_any_overlay(tmp_path: Path, overlay: str) -> None:
    components = [name for name in COMPONENTS if name != "storage-pvc"]  # the overlays include it
    objects = render_on_top(overlay, components, tmp_path)
    assert [problem for item in objects if (problem := problem_of(item))] == []
    names = {"OPENAI_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"}
    for pod in pods_of(objects):
        if pod.kind != "submitter":
            assert names <= {item["name"] for item in pod.spec["containers"][0]["env"]}, pod.name
    assert of_kind(objects, "PodTemplate") == []  # templates of the components are not applied
    assert_references_exist(objects)


def test_the_kustomization_in_the_readme_works(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "k8s" / "README.md").read_text(), re.DOTALL)
    to_root = os.path.relpath(ROOT, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(text.replace("../plad-dist", to_root))
    (tmp_path / "run.yaml").write_text("of: the user\n")
    objects = kustomize(tmp_path)
    assert [problem for item in objects if (problem := problem_of(item))] == []
    assert config_text(objects) == "of: the user\n"
    assert {item["metadata"]["namespace"] for item in objects} == {"distil"}
    images = {item["image"] for pod in pods_of(objects) for item in pod.containers if "image" in item}
    assert images == {f"registry.example.com/plad-dist:{plad_dist.__version__}"}
    assert_references_exist(objects)


def test_an_unknown_field_is_refused() -> None:
    for kind, path in (
        ("RayJob", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "lifecycle")),
        ("RayJob", ("spec",)),
        ("RayJob", ()),
        ("RayJob", ("metadata",)),
        ("ClusterQueue", ("spec", "resourceGroups", 0, "flavors", 0)),
        ("NetworkPolicy", ("spec", "podSelector")),
        ("PodDisruptionBudget", ("spec",)),
    ):
        (item, *_) = of_kind(render("kueue"), kind)
        assert problem_of(item) is None
        section: Any = item
        for key in path:
            section = section[key]
        section["tpyo"] = "x"
        assert "tpyo" in (problem_of(item) or ""), (kind, path)


def test_a_value_of_another_type_is_refused() -> None:
    (job,) = of_kind(render("kueue"), "RayJob")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert "is not of type 'string'" in (problem_of(job) or "")


def test_a_long_lived_cluster_has_the_pods_of_a_job_and_no_job() -> None:
    assert of_kind(render("long-lived"), "RayJob") == []
    assert cluster_of(render("long-lived")) == cluster_of(render("single-node-8gpu"))


# -- versions and names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_has_one_version_everywhere(overlay: str) -> None:
    version = cluster_of(render(overlay))["rayVersion"]
    for lock in ("cpu", "gpu"):
        assert f"\nray=={version} " in (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert f'"ray[default,train]=={version}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_has_the_image_of_this_version(overlay: str) -> None:
    expected = plad_dist.__version__ + ("-cpu" if overlay in ON_CPUS else "")
    images = {item["image"] for pod in pods_of(render(overlay)) for item in pod.containers if "image" in item}
    assert {image.rpartition(":")[2] for image in images} == {expected}
    assert len(images) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_entry_point_is_in_the_image(overlay: str) -> None:
    for job in of_kind(render(overlay), "RayJob"):
        match = re.fullmatch(r"python /opt/plad-dist/(ray_jobs/\w+\.py) --config (\S+)", job["spec"]["entrypoint"])
        assert match
        assert (ROOT / match[1]).is_file()
        assert "WORKDIR /opt/plad-dist\n" in (ROOT / "Dockerfile").read_text()
        (head, *_) = pods_of(render(overlay))
        (mount,) = [item for item in head.spec["containers"][0]["volumeMounts"] if item["name"] == "config"]
        assert match[2] == f"{mount['mountPath']}/run.yaml"


# -- sizes


def disagreement(objects: Objects) -> str | None:
    """Return how the GPUs of the worker groups differ from those that the config needs, or None if
    they agree."""
    from plad_dist.planning.engines import gpu_needs

    available, needed = fewest_and_most(cluster_of(objects), GPU), gpu_needs(config_of(objects))
    if available != needed:
        return f"the groups have {available[0]:g} to {available[1]:g} GPUs, the config needs {needed[0]} to {needed[1]}"
    return None


@pytest.mark.parametrize("overlay", ON_GPUS)
def test_the_groups_have_the_gpus_that_the_config_needs(overlay: str) -> None:
    assert disagreement(render(overlay)) is None


@pytest.mark.parametrize("overlay", ON_GPUS)
def test_groups_that_do_not_fit_the_config_are_found(overlay: str) -> None:
    objects = render(overlay)
    cluster_of(objects)["workerGroupSpecs"][-1]["maxReplicas"] += 1
    assert disagreement(objects) is not None
    objects = render(overlay)
    (config_map,) = of_kind(objects, "ConfigMap")
    raw = yaml.safe_load(config_map["data"]["run.yaml"])
    raw["training"]["num_workers"] = 64
    config_map["data"]["run.yaml"] = yaml.safe_dump(raw)
    assert "needs 64 to 64" in (disagreement(objects) or "")


@pytest.mark.parametrize("overlay", ON_GPUS)
def test_every_engine_fits_into_a_pod(overlay: str) -> None:
    config = config_of(render(overlay))
    groups = cluster_of(render(overlay))["workerGroupSpecs"]
    for role in (config.sampling.teacher, config.sampling.student):
        size = int(role.engine.get("tensor_parallel_size", 1))
        assert all(resource(group, GPU) % size == 0 for group in groups)
        for group in groups:
            engines = resource(group, GPU) / size
            assert resource(group, "cpu") >= engines * role.cpus
            assert resource(group, "cpu") >= resource(group, GPU) * config.training.cpus_per_worker


def cpus_needed(config: Config) -> float:
    """Return the CPUs of training, of both roles' engines together, or of pairing, whichever are
    most."""
    roles = (config.sampling.teacher, config.sampling.student)
    engines = sum(role.cpus * (1 if role.replicas == "auto" else role.replicas) for role in roles)
    training = config.training.workers[1] * config.training.cpus_per_worker
    return max(training, engines, config.pairing.workers * config.pairing.cpus_per_worker)


@pytest.mark.parametrize("overlay", ON_CPUS)
def test_on_cpus_the_groups_have_the_cpus_that_the_config_needs_and_no_gpu(overlay: str) -> None:
    cluster = cluster_of(render(overlay))
    assert fewest_and_most(cluster, GPU) == (0, 0)
    assert fewest_and_most(cluster, "cpu")[0] >= cpus_needed(config_of(render(overlay)))


def test_the_quota_covers_the_run_at_its_largest_size() -> None:
    objects = render("kueue")
    (queue,) = of_kind(objects, "ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    (job,) = of_kind(objects, "RayJob")
    flavors = {item["metadata"]["name"]: item["spec"]["nodeLabels"] for item in of_kind(objects, "ResourceFlavor")}
    for flavor in group["flavors"]:
        for quota in flavor["resources"]:
            used = 0.0
            for pod in pods_of(objects):
                if pod.spec["nodeSelector"] == flavors[flavor["name"]]:
                    groups = {
                        item["groupName"]: item["maxReplicas"] for item in cluster_of(objects)["workerGroupSpecs"]
                    }
                    requests = [item["resources"]["requests"] for item in pod.containers]
                    used += groups.get(pod.name, 1) * sum(amount(item.get(quota["name"], 0)) for item in requests)
            assert used <= amount(quota["nominalQuota"]), (flavor["name"], quota["name"])
    assert {
        name for pod in pods_of(objects) for item in pod.containers for name in item["resources"]["requests"]
    } <= set(group["coveredResources"])
    labels = job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] in {item["metadata"]["name"] for item in of_kind(objects, "LocalQueue")}
    classes = {item["metadata"]["name"] for item in of_kind(objects, "WorkloadPriorityClass")}
    assert labels["kueue.x-k8s.io/priority-class"] in classes
    # Kueue refuses a job that scales without being elastic, or that keeps its cluster. Kueue
    # suspends and resumes jobs.
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "suspend" not in job["spec"]


def test_runs_that_share_queues_define_no_queue_of_the_cluster(tmp_path: Path) -> None:
    objects = render_on_top("kueue", ["shared-queues"], tmp_path)
    kinds = {item["kind"] for item in objects if item["apiVersion"].startswith("kueue.")}
    assert kinds == {"LocalQueue"}
    assert {item["kind"] for item in render("kueue")} - {item["kind"] for item in objects} == {
        "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"
    }  # fmt: skip


# -- configs


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_config_is_valid_if_its_models_and_data_exist(tmp_path: Path, overlay: str) -> None:
    """The check is that of `plad validate`, with small models and a few prompts in place of the
    config's own."""
    raw = yaml.safe_load(config_text(render(overlay)))
    assert raw["run"]["dir"].startswith("/runs/")
    raw["run"]["dir"] = str(tmp_path / "run")
    for role in ("teacher", "student"):
        if "path" in raw[role]:
            raw[role]["path"] = str(model_with_chat_template(tmp_path / role))
    prompts = raw["prompts"]
    if prompts["source"]["type"] == "dataset":
        names = [value for key, value in prompts["source"].items() if key.endswith("_column")]
        rows = "".join(json.dumps(dict.fromkeys(names, f"Say {row}")) + "\n" for row in range(200))
        (tmp_path / "prompts.jsonl").write_text(rows)
        columns = {key: value for key, value in prompts["source"].items() if key.endswith("_column")}
        prompts["source"] = {"type": "files", "paths": [str(tmp_path / "prompts.jsonl")], **columns}
        prompts |= {"heldout": None, "heldout_fraction": 0.4}
    config = parse_config(raw, overlay)
    check_inputs(config, RunDir.of(config), all_rows=True)


def model_with_chat_template(folder: Path) -> Path:
    make_random_model(folder, max_position_embeddings=4096)
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


def test_the_smoke_test_runs_the_quickstart() -> None:
    ours = yaml.safe_load(config_text(render("cpu-smoke")))
    example = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    assert ours.pop("run") == example.pop("run") | {"dir": "/runs/quickstart"}
    assert ours == example


# -- references between objects


def assert_references_exist(objects: Objects) -> None:
    kinds = ("ConfigMap", "Secret", "PersistentVolumeClaim", "ServiceAccount")
    existing = {kind: {item["metadata"]["name"] for item in of_kind(objects, kind)} for kind in kinds}
    existing["Secret"] |= SECRETS_OF_THE_USER
    existing["ConfigMap"] |= CONFIG_MAPS_OF_KUBERNETES
    for pod in pods_of(objects):
        assert pod.spec["serviceAccountName"] in existing["ServiceAccount"]
        names = [volume["name"] for volume in pod.spec["volumes"]]
        assert len(names) == len(set(names)), pod.name
        for volume in pod.spec["volumes"]:
            sources = [volume, *volume.get("projected", {}).get("sources", [])]
            for source in sources:
                if "configMap" in source:
                    assert source["configMap"]["name"] in existing["ConfigMap"], volume
                if "persistentVolumeClaim" in source:
                    assert source["persistentVolumeClaim"]["claimName"] in existing["PersistentVolumeClaim"]
                assert "secret" not in source
        for container in pod.containers:
            mounts = container["volumeMounts"]
            assert {mount["name"] for mount in mounts} <= set(names), (pod.name, container["name"])
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
            variables = [item["name"] for item in container["env"]]
            assert len(variables) == len(set(variables))
            for item in container["env"]:
                if "valueFrom" in item:
                    assert item["valueFrom"]["secretKeyRef"]["name"] in existing["Secret"]
            assert "envFrom" not in container


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_reference_is_to_an_object_of_the_overlay_or_of_the_user(overlay: str) -> None:
    assert_references_exist(render(overlay))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_ray_pod_has_the_config_and_the_shared_volume(overlay: str) -> None:
    for pod in pods_of(render(overlay)):
        if pod.kind != "submitter":
            mounts = {mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]}
            assert {"/runs", "/etc/plad", "/tmp", "/dev/shm", "/home/plad"} <= mounts, pod.name


def test_every_secret_of_a_component_is_documented() -> None:
    text = (ROOT / "k8s" / "README.md").read_text()
    assert all(f"`{name}`" in text for name in SECRETS_OF_THE_USER | set(COMPONENTS))
    assert all(f"`{name}`" in text for name in OVERLAYS)
