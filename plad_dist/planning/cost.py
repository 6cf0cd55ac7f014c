"""Cost of a run: devices and endpoints."""

from __future__ import annotations

import math

from plad_dist.config import Config, Endpoint
from plad_dist.planning.problem import Problem
from plad_dist.planning.workload import Workload


def estimate_cost(
    config: Config, work: Workload, device_hours: float | None, price: float | None
) -> dict[str, float] | None:
    """Return the cost of devices and of endpoints with known prices, or None without any price.

    Args:
        device_hours: None if they are unknown.
        price: of a device per hour.
    """
    cost: dict[str, float] = {}
    if device_hours is not None and price is not None:
        cost["devices"] = round(price * device_hours, 2)
    teachers = config.all_teachers()
    shares = sum(teacher.share for teacher in teachers.values())
    for name, teacher in teachers.items():
        if teacher.endpoint is not None and work.sampled_prompts is not None:
            requests = work.sampled_responses(config, "teacher") + work.heldout_responses(config, "teacher")
            spent = _endpoint_cost(teacher.endpoint, work, requests * teacher.share / shares)
            if spent is not None:
                cost[f"endpoint {name}"] = round(spent, 2)
    return cost or None


def _endpoint_cost(endpoint: Endpoint, work: Workload, requests: float) -> float | None:
    """Return the cost of an endpoint, or None if it has no prices.

    Each response is counted with its prompt, as if it were a request of its own.
    """
    if endpoint.input_price is None or endpoint.output_price is None:
        return None
    per_request = work.prompt_tokens * endpoint.input_price + work.response_tokens["teacher"] * endpoint.output_price
    return requests * per_request / 1e6


def overspending(config: Config, cost: dict[str, float]) -> list[Problem]:
    """Return a problem for each endpoint whose spending limit would stop its stage early."""
    problems = []
    for name, teacher in config.all_teachers().items():
        limit, spent = teacher.endpoint.max_spend if teacher.endpoint else None, cost.get(f"endpoint {name}", 0.0)
        if limit is not None and spent > limit:
            key = f"teachers.{name}" if config.teachers else "teacher"
            description = (
                f"{key}.endpoint.max_spend: {limit:,.2f}: the responses cost about {spent:,.2f}, so the stage would "
                "stop"
            )
            remedies = (f"{key}.endpoint.max_spend={math.ceil(spent)}", "a smaller sampling.limit")
            problems.append(Problem(description, remedies, always=False))
    return problems
