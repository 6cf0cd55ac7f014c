"""A plan as tables and notes for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from plad_dist.planning.problem import count_text

Plan = dict[str, Any]  # as `plan_run` returns it


def plan_tables(name: str, plan: Plan) -> Iterator[Table]:
    """Yield the table of memory, and the table of hours if they are known."""
    yield memory_table(name, plan)
    if plan["time"] is not None:
        yield hours_table(plan)


def memory_table(name: str, plan: Plan) -> Table:
    """Return a table of memory: a line for each training phase and each kind of engine; equal
    phases share a line."""
    hardware = plan["hardware"]
    per_node = hardware["devices_per_node"]
    cluster = f"{hardware['nodes']} x {per_node} {hardware['device']}" if per_node else f"{hardware['nodes']} x cpu"
    table = Table(
        "stage", "devices", "GiB", "of which", "GiB of its node", "smallest that fits", "fits",
        title=f"{name} on {cluster}, {hardware['memory_gib']:g} GiB each",
    )  # fmt: skip
    for phases, memory in _equal_phases(plan["training"]):
        fewest, most = memory["workers"]
        table.add_row(
            f"train {', '.join(phases)}",
            f"{fewest} to {most}" if most > fewest else f"{fewest}",
            f"{memory['device_gib']:.1f}",
            _parts_text(memory["parts_gib"]),
            f"{memory['host_gib_per_node']:,.0f}" if memory["host_gib_per_node"] else "-",
            _workers_text(memory["smallest_workers"]),
            _yes_or_no(memory["fits"]),
        )
    for label, memory in plan["sampling"].items():
        smallest = memory["smallest_tensor_parallel_size"]
        cache = f"{memory['kv_cache_tokens']:,} tokens, {memory['responses_at_once']:,} responses at once"
        table.add_row(
            label if label.startswith("judge ") else f"sample {label}",
            f"{memory['devices_per_engine']} an engine, {_counted(memory['replicas'], 'engine')}",
            f"{memory['device_gib']:.1f}",
            f"{_parts_text(memory['parts_gib'])} ({cache})",
            "",
            f"tensor parallelism {smallest}" if smallest else "-" if not per_node else "none in a node",
            _yes_or_no(memory["fits"]),
        )
    return table


def hours_table(plan: Plan) -> Table:
    """Return a table of hours: a line for each stage, `?` for what is unknown, and the sum."""
    time = plan["time"]
    table = Table("stage", "tokens", "tokens/s a device", "hours", f"hours x {time['devices']} devices")
    for name, stage in time["stages"].items():
        table.add_row(
            name,
            f"{stage['tokens']:,}",
            _figure(stage["tokens_per_s_per_device"], ".0f"),
            _figure(stage["hours"], ".2f"),
            _figure(stage["device_hours"], ".1f"),
        )
    table.add_row("in all", "", "", f"{time['hours']:.2f}", f"{time['device_hours']:,.1f}")
    return table


def plan_notes(plan: Plan) -> Iterator[str]:
    """Yield the lines below the tables: fit, GPUs, disk, cost, assumptions and problems."""
    hardware, gpus, disk = plan["hardware"], plan["gpus"], plan["disk_gib"]
    if plan["fits"]:
        cluster = f"{hardware['nodes']} x {hardware['devices_per_node'] or 1} {hardware['device']}"
        yield f"Fits {cluster} ({hardware['source']})."
    yield "In training, activations and the optimizer step never coexist: only the larger of the two counts."
    if gpus["most"]:
        yield (
            f"GPUs: {gpus['fewest']} at least; no stage uses more than {gpus['most']} (engines with `replicas: auto` "
            "use all that are free)"
        )
    yield f"Disk: {_disk_text(disk)}" + _missing_prompts_text(plan)
    if plan["time"] is None and plan["fits"]:
        rates = "--teacher-rate, --student-rate and --train-rate"
        yield f"No hours and no cost of devices: give {'--prompts' if plan['work']['prompts'] is None else rates}"
    if plan["cost"]:
        costs = ", ".join(f"{name} {value:,.2f}" for name, value in plan["cost"].items())
        yield f"Cost: {sum(plan['cost'].values()):,.2f}: {costs}"
    for name, model in plan["models"].items():
        active = f", of which a token uses {count_text(model['active_parameters'])}" if model["is_mixture"] else ""
        yield f"{name}: {model['name']}, {count_text(model['parameters'])} parameters{active}"
    yield f"Assumed: {'; '.join(plan['assumptions'])}"
    for problem in plan["problems"]:
        yield f"Does not fit: {problem['what']}" + "".join(f"\n  try {remedy}" for remedy in problem["remedies"])


def _equal_phases(phases: dict[str, Plan]) -> list[tuple[list[str], Plan]]:
    """Return the phases whose plans are equal, with one plan for them."""
    groups: list[tuple[list[str], Plan]] = []
    for name, plan in phases.items():
        names = next((names for names, other in groups if other == plan), None)
        if names is None:
            groups.append(([name], plan))
        else:
            names.append(name)
    return groups


def _parts_text(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:,.1f}" for name, size in parts.items() if size >= 0.05) or "-"


def _disk_text(disk: dict[str, float]) -> str:
    total = sum(disk.values())
    return f"{total:,.1f} GiB: {_parts_text(disk)}" if total >= 0.05 else "less than 0.1 GiB"


def _missing_prompts_text(plan: Plan) -> str:
    is_unknown = plan["work"]["prompts"] is None
    return ", without prompts, samples and pairs, whose number is unknown: give --prompts" if is_unknown else ""


def _counted(number: int | str, noun: str) -> str:
    """Return a number with its noun, such as "2 engines"; `auto` is plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _figure(value: float | None, form: str) -> str:
    return "?" if value is None else f"{value:,{form}}"


def _workers_text(number: int | None) -> str:
    return "none" if number is None else _counted(number, "worker")


def _yes_or_no(fits: bool) -> str:
    return "yes" if fits else "NO"
