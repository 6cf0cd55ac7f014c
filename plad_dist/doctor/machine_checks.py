"""Checks of one machine: GPUs, network interfaces, shared memory, limits of processes, disk."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plad_dist.compat.linux import cgroup_limits
from plad_dist.devices import GIB
from plad_dist.doctor.findings import MIB, Finding, fail, format_size, ok, warn
from plad_dist.doctor.node import Node
from plad_dist.doctor.software_checks import installed_version

_DISK_WARN, _DISK_FAIL = 20 * GIB, GIB
_SHM = "/dev/shm"  # noqa: S108 - the mount itself
_SHM_WARN, _SHM_FAIL = GIB, 64 * MIB
_OPEN_FILES, _OPEN_FILES_IN_CLUSTER = 4096, 65_536  # limits that Ray warns below and recommends for clusters
_LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}  # by major version of CUDA, from NVIDIA's release notes
_TORCH_QUERY = """
import json, torch
nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
print(json.dumps({
    "cuda": torch.version.cuda,
    "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
}))
"""


def check_gpus(node: Node) -> Iterator[Finding]:
    """Compare the GPUs that the driver and Ray report with those that torch can use."""
    cards, torch = nvidia_cards(), torch_facts()
    count = max(len(cards), int(node.gpus))
    is_cpu_build = torch["cuda"] is None or installed_version("vllm") is None
    if count == 0 and is_cpu_build:
        yield ok("no GPU, builds for CPU")
    elif count == 0:
        yield warn(
            f"no GPU, but builds for CUDA {torch['cuda']}",
            "fine for a head node and for runs that only use endpoints; otherwise check the driver (`nvidia-smi`), or "
            "install requirements/cpu.txt",
        )
    else:
        name, driver = cards[0] if cards else ("GPU", "unknown")
        gpus = f"{count} x {name}, driver {driver}"
        if is_cpu_build:
            package = "torch" if torch["cuda"] is None else "vLLM"
            yield fail(
                f"{gpus}, but {package} is not a build for CUDA", "install requirements/gpu.txt, or use the gpu image"
            )
        else:
            yield _check_cuda(gpus, driver, torch, node.gpus)


def _check_cuda(gpus: str, driver: str, torch: dict[str, Any], offered: float) -> Finding:
    """Check that torch for CUDA can use the GPUs with the driver.

    Args:
        gpus: number, name and driver of the GPUs, for messages.
        offered: GPUs that Ray offers.
    """
    least = _LEAST_DRIVER.get(int(torch["cuda"].split(".")[0]), ())
    is_old_driver = driver[:1].isdigit() and tuple(map(int, re.findall(r"\d+", driver)[:2])) < least
    newer_driver = f"install driver {'.'.join(map(str, least))} or later"
    if not torch["devices"] or torch["devices"] < offered:
        return fail(
            f"{gpus}: torch for CUDA {torch['cuda']} can use {torch['devices']} of them",
            newer_driver
            if is_old_driver
            else "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and whether the container has access to the GPUs",
        )
    if torch["nccl"] is None:
        return fail(f"{gpus}: torch.distributed has no NCCL", "install requirements/gpu.txt: training needs NCCL")
    if is_old_driver:
        return warn(
            f"{gpus}: older than CUDA {torch['cuda']} requires, and works only through compatibility libraries",
            newer_driver,
        )
    return ok(f"{gpus}, CUDA {torch['cuda']}, NCCL {torch['nccl']}")


def nvidia_cards() -> list[tuple[str, str]]:
    """Return the name and the driver's version of every GPU that `nvidia-smi` lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    rows = [line.rpartition(", ") for line in answer.stdout.splitlines() if answer.returncode == 0]
    return [(name, driver.strip()) for name, _, driver in rows if name]


def torch_facts() -> dict[str, Any]:
    """Return `cuda`, `devices` and `nccl` of torch.

    A process of its own asks, so no GPU memory stays in use.
    """
    answer = subprocess.run(
        [sys.executable, "-c", _TORCH_QUERY], capture_output=True, text=True, timeout=100, check=False
    )
    if answer.returncode:
        raise RuntimeError(f"`import torch` fails: {(answer.stderr.strip().splitlines() or ['killed'])[-1]}")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def check_network(node: Node) -> Iterator[Finding]:
    """Check that the network interfaces in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME exist."""
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if not value or value.startswith("^"):  # ^ lists interfaces to exclude
            continue
        is_exact = value.startswith("=") or variable.startswith("GLOO")
        names = [name for name in value.lstrip("=").split(",") if name]
        if any(
            interface == name or (not is_exact and interface.startswith(name))
            for name in names
            for interface in interfaces
        ):
            yield ok(f"{variable}={value}")
        else:
            yield fail(
                f"{variable}={value}: no such interface",
                f"set it to one of {', '.join(interfaces)} on {node.name}, or unset it",
            )


def check_shared_memory(node: Node) -> Iterator[Finding]:
    """Check /dev/shm, through which Ray's object store, engines and trainers exchange data."""
    total = shutil.disk_usage(_SHM).total
    remedy = "give containers more: `--shm-size=8g`, on Kubernetes a memory emptyDir mounted at /dev/shm"
    text = f"{_SHM} has {format_size(total)}"
    if total < _SHM_FAIL:
        yield fail(text, remedy)
    elif total < _SHM_WARN:
        yield warn(text, remedy)
    elif node.object_store is None:
        yield ok(text)
    elif node.object_store > total:
        yield warn(
            f"{text}, but Ray's object store may take {format_size(node.object_store)}",
            f"start Ray with a smaller --object-store-memory, or {remedy}",
        )
    else:
        yield ok(f"{text}, {format_size(node.object_store)} of it for Ray's objects")


def check_limits(node: Node) -> Iterator[Finding]:
    """Report the memory and the CPUs that processes may use."""
    memory, cpus = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), float(len(os.sched_getaffinity(0)))
    memory_limit, cpu_limit = cgroup_limits()
    text = f"{format_size(min(memory, memory_limit))} of memory, {min(cpus, cpu_limit):g} CPUs"
    limited = [
        name for name, is_limited in (("memory", memory_limit < memory), ("CPUs", cpu_limit < cpus)) if is_limited
    ]
    yield ok(f"{text} ({' and '.join(limited)} by the container's limit)" if limited else text)


def check_open_files(node: Node) -> Iterator[Finding]:
    """Check the limit of open files: a node of a large cluster has thousands of connections and
    open parts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ray raises the limit of a driver. A node keeps the limit that `ray start` was given.
    if node.role == "member":
        limit, needed = soft, _OPEN_FILES_IN_CLUSTER
    else:
        limit, needed = max(soft, min(hard, 65_536)), _OPEN_FILES
    if limit >= needed:
        yield ok(f"{limit:,} open files")
    else:
        yield warn(
            f"at most {limit:,} open files",
            f"run `ulimit -n {needed}` before `ray start` on {node.name}; for containers it is a setting of their "
            "runtime",
        )


def check_disk(node: Node) -> Iterator[Finding]:
    """Check the free space where the run and Ray write, once for each file system."""
    folders = [(site.key, root) for site in node.sites if (root := site.storage.local_root) is not None]
    staging = "training.staging_dir" if node.staging else "temporary files"
    folders.append((staging, Path(node.staging or tempfile.gettempdir())))
    folders.append(("Ray", Path(node.ray_folder)))
    file_systems: dict[int, tuple[Path, list[str]]] = {}
    for use, folder in folders:
        existing = existing_ancestor(folder)
        file_systems.setdefault(existing.stat().st_dev, (existing, []))[1].append(use)
    for folder, uses in file_systems.values():
        free = shutil.disk_usage(folder).free
        text = f"{format_size(free)} free at {folder} ({', '.join(uses)})"
        remedy = f"free some space, or use another disk for {' and '.join(uses)}; `plad plan` shows what a run needs"
        if free < _DISK_FAIL:
            yield fail(text, remedy)
        else:
            yield warn(text, remedy) if free < _DISK_WARN else ok(text)


def existing_ancestor(folder: Path) -> Path:
    """Return a folder, or the nearest folder above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
