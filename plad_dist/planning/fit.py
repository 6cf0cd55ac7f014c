"""Fit of a config on a cluster: problems of all phases, all engines and the number of GPUs."""

from __future__ import annotations

from collections.abc import Collection

from plad_dist.config import Config
from plad_dist.holders import Holder
from plad_dist.phases import TEACHER, phases_of
from plad_dist.planning.engine_fit import engine_problems
from plad_dist.planning.engines import engine_specs, gpu_needs
from plad_dist.planning.hardware import Hardware
from plad_dist.planning.problem import Problem
from plad_dist.planning.sizes import Device, ModelSize, size_of
from plad_dist.planning.training_fit import longest_group, training_problem
from plad_dist.rundir import RunDir


def check_fits(config: Config, hardware: Hardware, remaining: Collection[Holder] | None = None) -> list[Problem]:
    """Return the problems of a config on a cluster.

    Args:
        remaining: parts of the run that are still to do; None for all.

    Raises:
        UserError: a model cannot be sized.
    """
    sizes = sizes_of(config, hardware.device)
    longest = longest_group(config, sizes["student"])
    problems: list[Problem | None] = []
    for name, phase in phases_of(config).items():
        if remaining is None or Holder("train", name) in remaining:
            size = trained_size(name, sizes)
            problems.append(training_problem(config.training, phase.optimizer, size, hardware, longest))
    for spec in engine_specs(config):
        if remaining is None or spec.holder in remaining:
            problems += engine_problems(config, spec, sizes[spec.label], hardware)
    problems.append(_gpu_problem(config, hardware))
    return list({problem.description: problem for problem in problems if problem is not None}.values())


def _gpu_problem(config: Config, hardware: Hardware) -> Problem | None:
    """Return the problem of a cluster with fewer GPUs than the config needs."""
    if not hardware.gpu or hardware.nodes is None:
        return None
    fewest, _ = gpu_needs(config)
    if fewest <= hardware.nodes * hardware.gpus_per_node:
        return None
    return Problem(
        f"the config needs {fewest} GPUs at least, the cluster has {hardware.nodes} x {hardware.gpus_per_node}",
        (f"{hardware.nodes_for(fewest)} nodes, or fewer training.num_workers and sampling.*.min_replicas",),
    )


def sizes_of(config: Config, device: Device) -> dict[str, ModelSize]:
    """Return the size of every model that is run or trained, by the label of its engines.

    Raises:
        UserError: a model cannot be sized.
    """
    root = RunDir.of(config).storage.local_root
    return {
        spec.label: size_of(spec.model, device, root / "models" / f"{spec.role}-init" if root else None)
        for spec in engine_specs(config)
    }


def shortest_context(sizes: dict[str, ModelSize]) -> int:
    """Return the longest sequence that the teachers and the student all take, in tokens.

    Args:
        sizes: as :func:`sizes_of` returns them.
    """
    return min(size.context for label, size in sizes.items() if not label.startswith("judge "))


def trained_size(phase: str, sizes: dict[str, ModelSize]) -> ModelSize:
    """Return the size of the model that a phase trains."""
    return sizes["teacher" if phase == TEACHER else "student"]
