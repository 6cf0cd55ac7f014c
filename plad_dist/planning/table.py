"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

_COLUMNS = {"tokens_per_s_per_device": ".0f", "hours": ".2f", "device_hours": ".1f"}


def plan_tables(name: str, plan: dict[str, Any]) -> Iterator[Table]:
    """Memory, and time where it is known."""
    hardware = plan["hardware"]
    per_node = hardware["devices_per_node"]
    where = f"{hardware['nodes']} x {per_node} {hardware['device']}" if per_node else f"{hardware['nodes']} x cpu"
    memory = Table(
        "stage", "devices", "GiB", "of which", "GiB of its node", "smallest that fits", "fits",
        title=f"{name} on {where}, {hardware['memory_gib']:g} GiB each",
    )  # fmt: skip
    for phases, found in _alike(plan["training"]):
        fewest, most = found["workers"]
        memory.add_row(
            f"train {', '.join(phases)}",
            f"{fewest} to {most}" if most > fewest else f"{fewest}",
            f"{found['device_gib']:.1f}",
            _parts(found["parts_gib"]),
            f"{found['host_gib_per_node']:,.0f}" if found["host_gib_per_node"] else "-",
            _workers(found["smallest_workers"]),
            _yes(found["fits"]),
        )
    for role, found in plan["sampling"].items():
        smallest = found["smallest_tensor_parallel_size"]
        memory.add_row(
            f"sample {role}" if not role.startswith("judge ") else role,
            f"{found['devices_per_engine']} an engine, {found['replicas']} engines",
            f"{found['device_gib']:.1f}",
            f"{_parts(found['parts_gib'])} ({found['kv_cache_tokens']:,} tokens, {found['responses_at_once']:,} responses at once)",
            "",
            f"tensor parallelism {smallest}" if smallest else "-" if not per_node else "none in a node",
            _yes(found["fits"]),
        )
    yield memory
    if plan["time"] is not None:
        time = Table("stage", "tokens", "tokens/s a device", "hours", f"hours x {plan['time']['devices']} devices")
        for stage, found in plan["time"]["stages"].items():
            time.add_row(
                stage,
                f"{found['tokens']:,}",
                *("?" if found[key] is None else f"{found[key]:,{form}}" for key, form in _COLUMNS.items()),
            )
        time.add_row("in all", "", "", f"{plan['time']['hours']:.2f}", f"{plan['time']['device_hours']:,.1f}")
        yield time


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """What goes under the tables."""
    hardware = plan["hardware"]
    if plan["fits"]:
        yield f"Fits {hardware['nodes']} x {hardware['devices_per_node'] or 1} {hardware['device']} ({hardware['source']})."
    yield "In training, of activations and optimizer step only the larger is there at a time."
    gpus = plan["gpus"]
    if gpus["most"]:
        yield f"GPUs: {gpus['fewest']} at least; no stage uses more than {gpus['most']} (engines that are `auto` take what there is)"
    disk = plan["disk_gib"]
    yield f"Disk: {sum(disk.values()):,.1f} GiB: {_parts(disk)}"
    if plan["time"] is None and plan["fits"]:
        yield "No hours and no cost of devices: " + (
            "give --prompts"
            if plan["work"]["prompts"] is None
            else "give --teacher-rate, --student-rate and --train-rate"
        )
    if plan["cost"]:
        yield f"Cost: {sum(plan['cost'].values()):,.2f}: " + ", ".join(
            f"{name} {value:,.2f}" for name, value in plan["cost"].items()
        )
    yield f"Assumed: {'; '.join(plan['assumptions'])}"
    for problem in plan["problems"]:
        yield f"Does not fit: {problem['what']}" + "".join(f"\n  try {remedy}" for remedy in problem["remedies"])


def _alike(plans: dict[str, Any]) -> list[tuple[list[str], Any]]:
    """Plans that are the same in one, with the names of all."""
    found: list[tuple[list[str], Any]] = []
    for name, plan in plans.items():
        names = next((names for names, other in found if other == plan), None)
        if names is None:
            found.append(([name], plan))
        else:
            names.append(name)
    return found


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.1f}" for name, value in parts.items() if value >= 0.05) or "-"


def _workers(number: int | None) -> str:
    return "none" if number is None else f"{number} worker{'s' * (number > 1)}"


def _yes(fits: bool) -> str:
    return "yes" if fits else "NO"
