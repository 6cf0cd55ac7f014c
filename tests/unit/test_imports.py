"""Imports run downward, and never in a circle.

`FLOORS` lists the rooms of the package from the ground up. A file may import from its own room and
from rooms below it, never from a room on the same floor or above. Imports inside functions and
under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A name that ends in a dot is a package, any other a file. The longest matching
# name decides.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "plad_dist",
        "plad_dist.errors",
        "plad_dist.holders",
        "plad_dist.fingerprint",
        "plad_dist.devices",
        "plad_dist.resources",
        "plad_dist.timeline",
        "plad_dist.systems",
        "plad_dist.untrusted",
    ),
    ("plad_dist.bounded_templates", "plad_dist.progress"),
    (
        "plad_dist.reach",
        "plad_dist.text_metrics",
        "plad_dist.prometheus",
        "plad_dist.config.",
        "plad_dist.config_yaml",
        "plad_dist.compat.",
    ),
    ("plad_dist.config_file", "plad_dist.phases", "plad_dist.harvest."),
    ("plad_dist.data.", "plad_dist.recipes"),
    ("plad_dist.drafts",),
    ("plad_dist.rundir",),
    ("plad_dist.catalog", "plad_dist.run_logs"),
    ("plad_dist.reuse",),
    ("plad_dist.decoding_checks",),
    ("plad_dist.nursery.",),
    ("plad_dist.fleet.",),
    ("plad_dist.sampling.backend", "plad_dist.sampling.spool", "plad_dist.sampling.vllm_models."),
    ("plad_dist.sampling.thoughts",),
    ("plad_dist.sampling.endpoint.",),
    ("plad_dist.sampling.",),
    ("plad_dist.pairing.",),
    ("plad_dist.training.losses", "plad_dist.training.agreement", "plad_dist.training.messages"),
    ("plad_dist.training.batches.",),
    ("plad_dist.training.job",),
    ("plad_dist.training.model.",),
    ("plad_dist.training.cut.",),
    ("plad_dist.training.records.",),
    ("plad_dist.training.checkpoints.",),
    ("plad_dist.training.plan",),
    ("plad_dist.training.worker.",),
    ("plad_dist.training.driver.",),
    ("plad_dist.evaluation.",),
    ("plad_dist.status", "plad_dist.verify.", "plad_dist.study", "plad_dist.push"),
    ("plad_dist.planning.",),
    ("plad_dist.preflight", "plad_dist.cluster"),
    ("plad_dist.doctor.", "plad_dist.pipeline", "plad_dist.jobs", "plad_dist.terminal", "plad_dist.cli_arguments"),
    ("plad_dist.cli",),
    ("ray_jobs.", "benchmarks."),
)


def module_name(path: Path) -> str:
    """Return the dotted name of a source file; a package is named like its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    """Return the text of every module of the product by its dotted name."""
    files = (file for folder in ("plad_dist", "ray_jobs", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
    return {module_name(file): file.read_text(encoding="utf-8") for file in files}


@cache
def statements(text: str) -> list[ast.AST]:
    """Return the import statements of a source text."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(text: str, modules: Iterable[str]) -> set[str]:
    """Return the modules of the product that a source text imports, at any depth of nesting."""
    known, targets = set(modules), set()
    for node in statements(text):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {name if name in known else node.module for name in names}
    return targets & known


def floor_of(module: str) -> int:
    """Return the number of a module's floor, the ground being 0."""
    entries = {name: number for number, names in enumerate(FLOORS) for name in names}
    matching = [name for name in entries if module == name or (name.endswith(".") and f"{module}.".startswith(name))]
    assert matching, f"{module} is on no floor: add it to FLOORS in {Path(__file__).name}"
    return entries[max(matching, key=len)]


def room_of(module: str) -> str:
    """Return the entry of `FLOORS` that a module belongs to."""
    names = [name for names in FLOORS for name in names]
    return max(
        (name for name in names if module == name or (name.endswith(".") and f"{module}.".startswith(name))), key=len
    )


def upward_imports(texts: Mapping[str, str]) -> list[str]:
    """Return the imports that do not run downward, as `importer -> imported`."""
    return sorted(
        f"{module} -> {target}"
        for module, text in texts.items()
        for target in imports_of(text, texts)
        if room_of(target) != room_of(module) and floor_of(target) >= floor_of(module)
    )


def circle(texts: Mapping[str, str]) -> list[str] | None:
    """Return the modules of one circle of imports, or None if there is none."""
    graph = {module: imports_of(text, texts) - {module} for module, text in texts.items()}
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return None
        for target in sorted(graph[module]):
            if cycle := visit(target, [*path, module]):
                return cycle
        finished.add(module)
        return None

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), None)


def test_every_import_runs_downward() -> None:
    assert upward_imports(sources()) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(sources()) is None


def test_every_room_of_the_list_exists() -> None:
    modules = sources()
    missing = [
        name
        for names in FLOORS
        for name in names
        if name.removesuffix(".") not in modules and name not in ("ray_jobs.",)
    ]
    assert missing == []


@pytest.mark.parametrize(
    "statement",
    [
        "import plad_dist.cli",
        "from plad_dist.cli import main",
        "from plad_dist import cli",
        "def load():\n    from plad_dist.training.plan import plan_phase\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from plad_dist.rundir import RunDir\n",
    ],
)
def test_an_upward_import_is_reported(statement: str) -> None:
    texts = sources()
    texts["plad_dist.errors"] += f"\n{statement}\n"
    assert [line for line in upward_imports(texts) if line.startswith("plad_dist.errors -> ")]


def test_a_circle_is_reported() -> None:
    texts = sources()
    texts["plad_dist.data.schemas"] += "\nfrom plad_dist.data.dataset import Dataset\n"
    texts["plad_dist.data.storage"] += "\nfrom plad_dist.data.schemas import PROMPTS\n"
    assert circle(texts) is not None


def test_commands_begin_without_the_imports_of_the_engines() -> None:
    """They take ten seconds of a processor, which `plad status` or a finished run does not need."""
    modules = ("torch", "transformers", "vllm", "deepspeed", "datasets")
    program = f"import sys, plad_dist.cli, plad_dist.pipeline; print([m for m in {modules} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
